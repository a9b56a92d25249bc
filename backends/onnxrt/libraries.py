"""Libraries that were built here: where they lie, and whether they are what was built.

A library is code that the process will run, and a file is no proof of itself: it may be torn, or
another user's. Its hash lies beside it. It is believed where it has that hash, and where nobody but
this user, root and whoever owns this code may write to it, or to a folder above it.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from backends.artifacts.cache import waiting_lock
from backends.base import BackendError
from core.files import build_root, sha256_file, write_atomic


def folders() -> list[Path]:
    """Where they are looked for, and built: below the build root; in this user's own cache where
    others can write to that, or nobody can."""
    cached = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return [build_root() / "native", Path(cached) / "addbench" / "native"]


def library(name: str, build: Callable[[Path], None]) -> Path:
    """The library of this name, built where there is none that can be believed.

    Args:
        build: writes it to a path, or raises BackendError.
    """
    for folder in folders():
        if is_ours(folder / name):
            return folder / name
    refused = []
    for folder in folders():
        if reason := why_not_in(folder):
            refused.append(reason)
            continue
        if refused:
            say_once(f"{refused[0]}: what is compiled is kept in {folder}")
        return _built(folder / name, build)
    raise BackendError(
        "what is compiled for this machine can be kept nowhere",
        "; ".join(refused),
        "set ADDBENCH_BUILD to a folder that is yours alone",
    )


def is_ours(library: Path) -> bool:
    """Whether a library is the one that was built: nobody else owns it or may write to it, or to
    a folder above, and its content has the hash that lies beside it."""
    note = library.with_suffix(".sha256")
    try:
        for file in (library, note):
            state = file.stat(follow_symlinks=False)
            if not stat.S_ISREG(state.st_mode) or _others(state):
                return False
        return not _others_above(library.parent) and note.read_text() == sha256_file(library)
    except (OSError, UnicodeDecodeError):
        return False


def verify() -> dict[Path, bool]:
    """Hash every library: file -> whether it would be loaded. Those that would not are removed."""
    states = {}
    for folder in folders():
        for file in sorted(folder.glob("*.so")):
            states[file] = is_ours(file)
            if not states[file]:
                with contextlib.suppress(OSError), waiting_lock(file.with_suffix(".lock")):
                    if not is_ours(file):  # it was not built again meanwhile
                        _remove(file)
    return states


def why_not_in(folder: Path) -> str:
    """Why nothing can be built in a folder, which is made; "" where it can."""
    try:
        if reason := _others_above(folder):
            return reason
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        return _others_above(folder) or (
            "" if os.access(folder, os.W_OK) else f"{folder} is read-only"
        )
    except OSError as error:
        return f"{folder} cannot be written to ({error.strerror})"


@cache
def say_once(line: str) -> None:
    """Print a line on stderr, the first time that this process has it to say."""
    print(line, file=sys.stderr, flush=True)


def _built(file: Path, build: Callable[[Path], None]) -> Path:
    """Build it; it takes its name when it is whole, and its hash comes last."""
    with waiting_lock(file.with_suffix(".lock")):
        if is_ours(file):
            return file
        for litter in file.parent.glob(f".build-{file.stem}-*"):  # of builds that were killed
            shutil.rmtree(litter, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".build-{file.stem}-") as fresh:
            build(Path(fresh) / file.name)
            _remove(file)  # another user's, or torn: not written over
            write_atomic(file, (Path(fresh) / file.name).read_bytes())
        write_atomic(file.with_suffix(".sha256"), sha256_file(file))
    return file


def _remove(file: Path) -> None:
    file.with_suffix(".sha256").unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def _others_above(folder: Path) -> str:
    """Who else could replace what lies in a folder: by writing to it, or to one above it."""
    whole = folder.resolve()
    for place in dict.fromkeys((whole, *whole.parents, *folder.absolute().parents)):
        if not place.exists():
            continue
        state = place.stat()
        # In a folder as /tmp is, nobody can replace what belongs to another.
        sticky = place != whole and state.st_mode & stat.S_ISVTX
        reason = _others(state)
        if reason and not (sticky and _is_trusted(state.st_uid)):
            return f"{place} {reason}"
    return ""


def _others(state: os.stat_result) -> str:
    """Who else may write to a file or folder; "" where nobody else may."""
    if not _is_trusted(state.st_uid):
        return "belongs to another user"
    if state.st_mode & stat.S_IWOTH:
        return "can be written to by everybody"
    if state.st_mode & stat.S_IWGRP and not _is_private(state.st_gid):
        return "can be written to by a group"
    return ""


def _is_trusted(user: int) -> bool:
    """Whether a user could change what runs here anyway."""
    return user in (0, os.getuid(), Path(__file__).stat().st_uid)


def _is_private(group: int) -> bool:
    """Whether a group is that of this user alone, as many systems make one for each; or root's."""
    try:
        entry, user = grp.getgrgid(group), pwd.getpwuid(os.getuid())
    except KeyError:
        return group == 0
    return group == 0 or (entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name})
