"""Memory that may still be taken: the machine's, or the container's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from core import memory, readahead
from core.errors import PreconditionError
from core.files import ROOT
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


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is too small to be read ahead: also a pipe, which holds its reader up."""
    monkeypatch.setattr(memory, "WORTH_READING_AHEAD", 0)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("apart", [True, False])
def test_what_is_read_ahead_is_in_the_page_cache_and_dropped_it_is_not(
    apart: bool, tmp_path: Path
) -> None:
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
    with reading_ahead(file, _apart=apart):
        until = time.monotonic() + 20
        while cached_pages(file) < 16 and time.monotonic() < until:
            time.sleep(0.01)
    assert cached_pages(file) == 16


def test_a_missing_file_is_nobody_s_loss(tmp_path: Path) -> None:
    drop_cached(tmp_path / "none")
    with reading_ahead(tmp_path / "none"):
        assert psutil.Process().children() == []


def test_a_small_file_is_not_worth_a_process(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(1 << 20))
    with reading_ahead(tmp_path / "small"):
        assert psutil.Process().children() == []


@pytest.mark.usefixtures("any_size")
def test_nothing_is_read_ahead_into_memory_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    with reading_ahead(tmp_path / "weights"):
        assert psutil.Process().children() == []


@pytest.fixture
def endless(any_size: None, tmp_path: Path) -> Path:
    """A pipe that nobody writes to: who opens it waits, as for a disk that does not answer."""
    os.mkfifo(tmp_path / "endless")
    return tmp_path / "endless"


def test_the_reader_ends_with_the_block_however_that_ends(endless: Path) -> None:
    with reading_ahead(endless):
        (reader,) = psutil.Process().children()
    assert not reader.is_running()
    with pytest.raises(KeyboardInterrupt), reading_ahead(endless):
        (reader,) = psutil.Process().children()
        raise KeyboardInterrupt
    assert not reader.is_running()


def test_a_reader_that_is_killed_is_nobody_s_loss(endless: Path) -> None:
    with reading_ahead(endless):
        (reader,) = psutil.Process().children()
        reader.kill()
        until = time.monotonic() + 20
        while reader.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
            time.sleep(0.01)
    assert not reader.is_running(), "not even as a zombie"


def test_without_a_process_to_be_had_the_block_runs(
    endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(memory.subprocess, "Popen", none_left)
    with reading_ahead(endless):
        assert psutil.Process().children() == []


PARENT = """
import sys, time
from pathlib import Path
import psutil
from core import memory
memory.WORTH_READING_AHEAD = 0
with memory.reading_ahead(Path(sys.argv[1])):
    (reader,) = psutil.Process().children()
    print(reader.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_parent_leaves_no_reader(endless: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(endless)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    reader = psutil.Process(int(parent.stdout.readline()))
    assert reader.status() != psutil.STATUS_ZOMBIE
    parent.kill()
    parent.wait()
    psutil.wait_procs([reader], timeout=20)
    assert not reader.is_running() or reader.status() == psutil.STATUS_ZOMBIE


def test_a_parent_that_is_gone_before_the_reader_starts(endless: Path) -> None:
    """Its number is another's by then, or nobody's."""
    command = [sys.executable, "-m", "core.readahead", str(endless), str(os.getppid())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_file_that_shrinks_or_goes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, pieces = tmp_path / "weights", 0
    file.write_bytes(bytes(1 << 20))
    monkeypatch.setattr(readahead, "PIECE", 1 << 16)

    def shrink() -> bool:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            os.truncate(file, 1 << 18)
            file.unlink()
        return False

    readahead.read_through(file, shrink)
    assert pieces == 5, "four that were left, and the end"
    with pytest.raises(FileNotFoundError):
        readahead.read_through(file)
