"""Files that people trust survive kills, full disks and readers at the wrong moment."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import AddbenchError, PreconditionError
from core.files import (
    ROOT,
    read_json,
    require_disk,
    staged_folder,
    write_atomic,
    write_json,
    write_together,
)


def test_write_atomic_replaces_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file.json"
    write_json(file, {"a": 1})
    write_json(file, {"a": 2})
    assert read_json(file) == {"a": 2}
    assert [p.name for p in file.parent.iterdir()] == ["file.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomic(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "\ud800")
    with pytest.raises(TypeError):
        write_atomic(file, 3)  # type: ignore[arg-type]
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_that_belong_together_are_all_written_or_none(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "deep" / "er" / "new"
    old.write_text("old")
    with pytest.raises(FileExistsError):  # the last one's folder is a file
        write_together({old: b"changed", new: b"x", old / "below": b"x"})
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]
    before = old.stat()
    write_together({old: b"old", new: b"new"})
    assert new.read_text() == "new"
    assert old.stat() == before  # what is as it should be is not written


def test_a_torn_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text('{"a": ')
    with pytest.raises(AddbenchError, match=r"manifest\.json cannot be read"):
        read_json(file)


def test_staging_replaces_a_folder_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for content in ("one", "two"):
        with staged_folder(target) as scratch:
            (scratch / content).write_text(content)
    assert [p.name for p in target.iterdir()] == ["two"]
    with pytest.raises(KeyboardInterrupt), staged_folder(target) as scratch:
        (scratch / "three").write_text("x")
        raise KeyboardInterrupt
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_killed_writer_leaves_the_old_folder_and_its_litter_is_swept(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staged_folder(target) as scratch:
        (scratch / "old").write_text("old")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom core.files import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'half').write_text('x')\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert victim.stdout is not None
    assert victim.stdout.readline() == "ready\n"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    time.sleep(0.05)
    assert [p.name for p in target.iterdir()] == ["old"]
    assert list(tmp_path.glob(".staging-*"))
    with staged_folder(target) as scratch:
        (scratch / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_disk_is_estimated_first(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "there" / "yet", 1, "a byte")
    with pytest.raises(PreconditionError, match="the moon needs 1000000000000.0 GB of disk"):
        require_disk(tmp_path, 10**21, "the moon")
