"""Files that people trust: written to a temporary name, flushed, renamed; hashed; sized first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.amounts import bytes_text
from core.errors import AddbenchError, PreconditionError

ROOT = Path(__file__).resolve().parent.parent
"""The checkout. Commands may be started from anywhere."""


def build_root() -> Path:
    """Where bundles and the artifact cache live: `build/`, or ADDBENCH_BUILD."""
    return Path(os.environ.get("ADDBENCH_BUILD") or ROOT / "build")


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` so that `path` holds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: when one cannot be written, the others are as before.

    After an interrupt too; a killed process leaves a part of them.
    """
    contents = {p: new for p, new in contents.items() if not (p.exists() and p.read_bytes() == new)}
    before = {path: path.read_bytes() if path.exists() else None for path in contents}
    folders = {folder for path in contents for folder in path.parents if not folder.exists()}
    try:
        for path, new in contents.items():
            write_atomic(path, new)
    except BaseException:
        for path in [path for path, old in before.items() if old is None and path.exists()]:
            path.unlink()  # first: it makes room
        for path, old in before.items():
            if old is not None and path.read_bytes() != old:
                write_atomic(path, old)
        for folder in sorted(folders, reverse=True):  # what lies in a folder comes before it
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Read a JSON file; a torn or foreign one is an AddbenchError that names it."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AddbenchError(
            f"{path} cannot be read as JSON", str(error), "delete it and make it again"
        ) from error


OLD = "replaced-by-staging"
"""Name of a folder's old content while the new one takes its place."""


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target` that becomes `target` when the block ends well.

    The folder at `target` is replaced as a whole; on any exception (an interrupt too) the scratch
    folder is removed and `target` stays as it was. A killed process can leave a `.staging-*`
    folder: the next call for the same target removes those whose process is gone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".staging-{target.name}-"
    for old in target.parent.glob(f"{prefix}*"):
        owner = old.name.removeprefix(prefix).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            if (old / OLD).exists() and not target.exists():
                os.rename(old / OLD, target)  # killed between taking the old away and the new in
            shutil.rmtree(old, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{prefix}{os.getpid()}-"))
    try:
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        os.chmod(scratch, 0o755)
        if target.exists():
            grave = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{prefix}{os.getpid()}-old-"))
            os.rename(target, grave / OLD)
            try:
                os.rename(scratch, target)
            except BaseException:
                os.rename(grave / OLD, target)
                raise
            shutil.rmtree(grave, ignore_errors=True)
        else:
            os.rename(scratch, target)
        fsync_folder(target.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def require_disk(folder: Path, need_bytes: int, purpose: str) -> None:
    """Refuse work that would fill the disk of `folder` (created later, maybe) with the estimate."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if need_bytes > free:
        raise PreconditionError(
            f"{purpose} needs {bytes_text(need_bytes)} of disk and {bytes_text(free)} are free",
            f"{existing} is the disk it would be written to",
            "free some room (`addbench cache prune`) or set ADDBENCH_BUILD",
        )
