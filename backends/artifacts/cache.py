"""The artifact cache: content key, file lock, atomic rename, verification, size cap.

An entry is a folder named by its key; `entry.json`, written last, lists every file with its size,
modification time and hash. A file whose size or time differs is hashed again before it is
believed, so a torn or edited artifact is compiled anew instead of loaded.

A large file that another entry holds too is a hard link to it: the weights of a part that was
compiled under several keys (another level, an older revision of the passes) lie on disk once. A
link is an entry's own: it outlives the other entry, and is hashed before it takes a file's place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from core.errors import AddbenchError, PreconditionError
from core.files import build_root, read_json, sha256_file, staged_folder, write_json

ENTRY = "entry.json"
SCHEMA = 1
WORTH_SHARING = 1 << 20
"""Bytes. Smaller files are not looked for in other entries."""
JUST_USED_S = 600
"""Entries used within this time are never pruned automatically: a process may be loading them."""


def default_cap_gb() -> float:
    text = os.environ.get("ADDBENCH_CACHE_GB", "30")
    try:
        return float(text)
    except ValueError:
        raise PreconditionError(
            f"ADDBENCH_CACHE_GB={text} is not a number", "it is the cache's cap in GB", "set 30"
        ) from None


@contextlib.contextmanager
def waiting_lock(file: Path) -> Iterator[None]:
    """Hold the lock `file`; say so where another process has it."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for the process that holds {file}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Entry:
    """One artifact on disk.

    Attributes:
        bytes: of all its files.
        files: bytes by device and inode: files of several entries may be one.
    """

    key: str
    path: Path
    label: str
    bytes: int
    used: float
    files: Mapping[tuple[int, int], int]

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = read_json(self.path / ENTRY)
        return record


def disk_bytes(entries: Iterable[Entry]) -> int:
    """What they take together: a file that several hold counts once."""
    files: dict[tuple[int, int], int] = {}
    for entry in entries:
        files |= entry.files
    return sum(files.values())


class ArtifactCache:
    def __init__(self, root: Path | None = None, cap_gb: float | None = None) -> None:
        self.root = root or build_root() / "cache"
        self.cap_gb = default_cap_gb() if cap_gb is None else cap_gb

    def get_or_make(self, key: str, label: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
        """The folder of `key` and whether it was there. One process makes it, others wait."""
        folder = self.root / key
        if self._sound(folder):
            with contextlib.suppress(OSError):  # a cache that others fill, read-only here
                os.utime(folder / ENTRY)
            return folder, True
        self.root.mkdir(parents=True, exist_ok=True)
        with waiting_lock(self.root / f".{key}.lock"):
            if self._sound(folder):
                return folder, True
            with staged_folder(folder) as scratch:
                make(scratch)
                self._share(scratch)
                self._seal(scratch, key, label)
        self.prune(self.cap_gb, keep=key, spare_recent=True)
        return folder, False

    def _share(self, folder: Path) -> None:
        """Put hard links in the place of large files of `folder` that another entry holds too."""
        large = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        large = {file: size for file, size in large.items() if size >= WORTH_SHARING}
        if not large:
            return
        known: dict[tuple[int, str], list[Path]] = {}
        for entry in self.entries():
            try:
                files = entry.record["files"]
            except OSError:
                continue  # pruned by another process
            for name, file in files.items():
                place = (file["bytes"], file["sha256"])
                known.setdefault(place, []).append(entry.path / name)
        sizes = {size for size, _ in known}
        for file, size in large.items():
            digest = sha256_file(file) if size in sizes else ""
            for other in known.get((size, digest), ()):
                if link_in_place(other, file, digest):
                    break

    @staticmethod
    def _seal(folder: Path, key: str, label: str) -> None:
        files = {
            str(file.relative_to(folder)): {**_stamp(file), "sha256": sha256_file(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        if not files:
            raise AddbenchError(
                f"compiling {label} wrote nothing",
                "the backend's compiler ended without output",
                "run it again with --backend NAME and look at the messages above",
            )
        record = {"schema": SCHEMA, "key": key, "label": label, "files": files}
        write_json(folder / ENTRY, record | {"created": time.time()})

    @staticmethod
    def _sound(folder: Path, deep: bool = False) -> bool:
        """Whether the entry's files are the ones that were written; `deep` hashes all of them."""
        try:
            record = read_json(folder / ENTRY)
            if record["schema"] != SCHEMA:
                return False
            for name, known in record["files"].items():
                found = _stamp(folder / name)
                if found["bytes"] != known["bytes"]:
                    return False
                changed = found["mtime_ns"] != known["mtime_ns"]
                if (changed or deep) and sha256_file(folder / name) != known["sha256"]:
                    return False
        except (OSError, AddbenchError, KeyError, TypeError):
            return False
        return True

    def entries(self) -> list[Entry]:
        """Every complete entry, least recently used first."""
        found = []
        for marker in self.root.glob(f"*/{ENTRY}"):
            try:
                record = read_json(marker)
                stats = [(marker.parent / name).stat() for name in record["files"]]
                entry = Entry(
                    record["key"],
                    marker.parent,
                    record["label"],
                    sum(found.st_size for found in stats),
                    marker.stat().st_mtime,
                    {(found.st_dev, found.st_ino): found.st_size for found in stats},
                )
            except (OSError, AddbenchError, KeyError, TypeError):
                continue  # torn or foreign: get_or_make replaces it, verify reports it
            found.append(entry)
        return sorted(found, key=lambda entry: entry.used)

    def discard(self, folder: Path, inode: int) -> None:
        """Drop an entry that is whole and that its runtime refuses, to have it made again.

        Args:
            inode: of the folder as it was refused; one that was made again meanwhile stays.
        """
        with FileLock(self.root / f".{folder.name}.lock"):
            if folder.exists() and folder.stat().st_ino == inode:
                shutil.rmtree(folder)

    def verify(self) -> dict[str, bool]:
        """Hash every file of every entry: folder name -> sound. Those that are not are removed."""
        found = {}
        for marker in sorted(self.root.glob(f"*/{ENTRY}")):
            folder = marker.parent
            with FileLock(self.root / f".{folder.name}.lock"):
                found[folder.name] = self._sound(folder, deep=True)
                if not found[folder.name]:
                    shutil.rmtree(folder)
        return found

    def prune(
        self, cap_gb: float, keep: str | None = None, spare_recent: bool = False
    ) -> list[Entry]:
        """Remove least recently used entries until at most `cap_gb` remain; returns them.

        What killed compiles left goes in any case.
        """
        for litter in self.root.glob(".staging-*"):
            owner = litter.name.removeprefix(".staging-").split("-")[1]
            if not Path(f"/proc/{owner}").exists():
                shutil.rmtree(litter, ignore_errors=True)
        entries = self.entries()
        removed: list[Entry] = []
        for entry in entries:
            if disk_bytes(one for one in entries if one not in removed) <= cap_gb * 1e9:
                break
            recent = time.time() - entry.used < JUST_USED_S
            if entry.key == keep or (spare_recent and recent):
                continue
            try:
                with FileLock(self.root / f".{entry.key}.lock", timeout=0):
                    shutil.rmtree(entry.path)
            except (Timeout, FileNotFoundError):
                continue  # being made or removed by another process
            removed.append(entry)
        return removed


def link_in_place(source: Path, target: Path, digest: str) -> bool:
    """Make `target` a hard link to `source` if that is there and still has the hash `digest`.

    By way of another name, hashed under it: `target` is whole at every moment, and no later change
    of what `source` names can slip in.
    """
    fresh = target.with_name(f".{target.name}.link")
    try:
        if source.samefile(target):  # the compiler linked it: there is one file already
            return True
        os.link(source, fresh)
        if sha256_file(fresh) == digest:
            os.replace(fresh, target)
            return True
    except OSError:
        pass  # pruned meanwhile, unreadable, or a disk without hard links: it keeps its own
    fresh.unlink(missing_ok=True)
    return False


def _stamp(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
