"""Host memory: refuse what does not fit, give back what is no longer needed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.amounts import bytes_text
from core.errors import PreconditionError

PIECE = 1 << 24
"""Bytes read ahead at once, before looking whether there is still somebody who wants them."""


def require_memory(need_bytes: int, purpose: str, instead: str = "") -> None:
    """Refuse work whose estimated peak does not fit the memory that is available now.

    Args:
        instead: the nearest thing that needs less, if there is one.
    """
    available = available_memory()
    if need_bytes > available:
        raise PreconditionError(
            f"{purpose} needs about {bytes_text(need_bytes)} of memory"
            f" and {bytes_text(available)} are available",
            "the estimate comes from the size of its weights",
            "close other programs, or use a machine with more memory"
            + (f"; or {instead}" if instead else ""),
        )


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: of the machine, or less where its cgroup says so.

    Reads version 2 (containers see their own group at the root); page cache that the kernel would
    give back counts as available.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return available  # no cgroup, or the root one: the machine is the limit
    if limit == "max":
        return available
    return min(available, max(0, int(limit) - used + int(stat.get("inactive_file", 0))))


def give_memory_back(*, cycles: bool = True) -> None:
    """Free what lies in reference cycles and, after it, in the heap's free lists.

    glibc keeps freed tensors below 32 MB: 1.3 GB of SDXL's second text encoder, 6 GB of its UNet.

    Args:
        cycles: look for them, among all objects that torch and transformers have made.
    """
    if cycles:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def drop_cached(file: Path) -> None:
    """Drop what the system's page cache holds of `file` and nobody maps: it is read from disk next.

    Nothing happens where there is no such file or no such call.
    """
    if file.exists() and hasattr(os, "posix_fadvise"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def reading_ahead(file: Path) -> Iterator[None]:
    """Bring `file` into the page cache while the block runs, for what maps it to find it there.

    Page faults read at a fraction of a disk's speed. Left out where memory holds little more than
    the file: what is read ahead would be dropped before it is used. A reader that fails is no
    failure: the block reads for itself. (A process in the thread's place was no faster.)
    """
    ended = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError), file.open("rb") as opened, open(os.devnull, "wb") as out:
            # The system reads, and nothing is copied.
            while not ended.is_set() and os.sendfile(out.fileno(), opened.fileno(), None, PIECE):
                pass

    if file.exists() and 1.5 * file.stat().st_size < available_memory():
        threading.Thread(target=read, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
