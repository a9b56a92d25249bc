"""Memory that may still be taken: the machine's, or the container's."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from core import memory
from core.errors import PreconditionError
from core.memory import available_memory, drop_cached, reading_ahead, require_memory


def write_cgroup(folder: Path, limit: str, used: int, cache: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    return folder


def test_a_container_limit_counts_less_what_is_used_plus_what_is_cache(tmp_path: Path) -> None:
    assert available_memory(write_cgroup(tmp_path, "1000", 700, 200)) == 500


def test_an_overdrawn_container_has_nothing(tmp_path: Path) -> None:
    assert available_memory(write_cgroup(tmp_path, "1000", 1400, 100)) == 0


@pytest.mark.parametrize("limit", ["max", str(2**62)])
def test_without_a_limit_the_machine_counts(tmp_path: Path, limit: str) -> None:
    found = available_memory(write_cgroup(tmp_path, limit, 0, 0))
    assert found == pytest.approx(psutil.virtual_memory().available, rel=0.5)


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    assert available_memory(tmp_path) > 0


def test_what_does_not_fit_is_refused_with_both_figures() -> None:
    with pytest.raises(PreconditionError, match=r"the load needs about 1000000\.0 GB"):
        require_memory(10**15, "the load")


def cached_pages(file: Path) -> int:
    """Of the first 16 pages of `file`, those that can be read without waiting for the disk."""
    found = 0
    with file.open("rb") as opened:
        for page in range(16):
            try:
                os.preadv(opened.fileno(), [bytearray(4096)], page * 4096, os.RWF_NOWAIT)
                found += 1
            except BlockingIOError:
                pass
    return found


def test_what_is_read_ahead_is_in_the_page_cache_and_dropped_it_is_not(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    with file.open("wb") as opened:
        opened.write(os.urandom(1 << 22))
        os.fsync(opened.fileno())
    drop_cached(file)
    try:
        before = cached_pages(file)
    except OSError:
        pytest.skip("this file system does not say what is cached")
    if before == 16:
        pytest.skip("this file system keeps its files in memory")
    with reading_ahead(file):
        until = time.monotonic() + 20
        while cached_pages(file) < 16 and time.monotonic() < until:
            time.sleep(0.01)
    assert cached_pages(file) == 16


def test_a_missing_file_is_nobody_s_loss(tmp_path: Path) -> None:
    drop_cached(tmp_path / "none")
    with reading_ahead(tmp_path / "none"):
        pass


def test_nothing_is_read_ahead_into_memory_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    before = threading.active_count()
    with reading_ahead(tmp_path / "weights"):
        assert threading.active_count() == before
