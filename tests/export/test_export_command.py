"""`addbench export`: interrupted, killed, out of disk, twice at once, and once too often."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from core.cli import run
from core.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, PreconditionError
from core.files import ROOT
from export.__main__ import _is_there, main
from export.bundle import Bundle
from export.models import SHAPES_TURBO

TINY = ["--model", "tiny-sdxl", "--weights", "random", "--no-parity"]


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "export", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A test run in the background of a shell ignores Ctrl-C, and what it starts would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Until `condition`, for at most two minutes; fails when the process ends before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_first_part(process: subprocess.Popen[str], target: Path) -> None:
    """Until the scratch folder of the export holds its first graph: it is in the middle of it."""
    pattern = f".staging-{target.name}-{process.pid}-*/text_encoder/model.onnx"
    wait_for(lambda: list(target.parent.glob(pattern)), process)


def leftovers(target: Path) -> list[str]:
    return [p.name for p in target.parent.iterdir() if p.name.startswith(".staging")]


def test_help_is_fast_and_imports_no_torch() -> None:
    script = (
        "import sys, export.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'pandas', 'numpy'}\n"
        "sys.exit(bool(heavy & sys.modules.keys()))"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert time.perf_counter() - started < 2  # half a second on an idle machine
    assert "RUNS CODE" in done.stdout


def test_killed_and_interrupted_exports_leave_the_old_bundle(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    process = start(*TINY, "--force", "--out", str(target))
    wait_for_first_part(process, target)
    process.kill()
    process.communicate()
    assert leftovers(target)  # a killed process cannot clean up; the next export does
    assert Bundle.open(target).verify() == []
    process = start(*TINY, "--force", "--out", str(target))
    wait_for_first_part(process, target)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == EXIT_INTERRUPTED
    assert stderr.endswith("interrupted\n")
    assert Bundle.open(target).verify() == []
    assert not leftovers(target)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root and the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_leaves_nothing(small_disk: Path) -> None:
    target = small_disk / "bundle"
    process = start(*TINY, "--out", str(target))
    wait_for_first_part(process, target)
    with pytest.raises(OSError, match="No space left"), (small_disk / "ballast").open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    _, stderr = process.communicate()
    assert process.returncode == EXIT_FAILED, stderr
    assert "is full" in stderr
    assert "next:" in stderr
    assert not target.exists()
    assert not leftovers(target)


def test_too_small_a_disk_is_told_before_work_starts(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(12 << 20))
    process = start(*TINY, "--out", str(small_disk / "bundle"))
    _, stderr = process.communicate()
    assert process.returncode == EXIT_USAGE
    assert "MB of disk" in stderr
    assert not (small_disk / "bundle").exists()


def test_what_is_there_and_matches_is_left_alone(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    before = (target / "manifest.json").stat().st_mtime_ns
    assert run(main, [*TINY, "--out", str(target)]) == EXIT_OK
    assert "nothing to do" in capsys.readouterr().out
    assert (target / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "3"], "seed: 0 there, 3 asked for"),
        (["--size", "128"], "size: 64 there, 128 asked for"),
        (["--dtype", "fp32"], "dtype: fp16 there, fp32 asked for"),
    ],
)
def test_another_bundle_is_not_replaced_unasked(
    tiny_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    said: str,
) -> None:
    target = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    assert run(main, [*TINY, *flags, "--out", str(target)]) == EXIT_USAGE
    stderr = capsys.readouterr().err
    assert said in stderr
    assert "--force" in stderr
    assert Bundle.open(target).hash == tiny_bundle.hash


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_folder_that_is_no_bundle_is_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], force: list[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").write_bytes(b"x")
    assert run(main, [*TINY, *force, "--out", str(tmp_path / "photos")]) == EXIT_USAGE
    assert "not a bundle" in capsys.readouterr().err
    assert (tmp_path / "photos" / "holiday.png").read_bytes() == b"x"


def test_two_exports_at_once_make_one_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The other export is this test: it holds the lock, and a finished bundle turns up."""
    target = tmp_path / "bundle"
    with FileLock(tmp_path / ".bundle.lock"):
        process = start(*TINY, "--out", str(target))
        assert process.stdout is not None
        assert "waiting" in process.stdout.readline()
        shutil.copytree(tiny_bundle.path, target)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_OK
    assert "nothing to do" in stdout


def test_a_size_that_is_no_multiple_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, [*TINY, "--size", "70", "--out", str(tmp_path / "b")]) == EXIT_USAGE
    assert "multiples of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "sdxl-turbe"], "sdxl-turbo"),
        (["--model", "./no-such-folder"], "not a checkpoint in diffusers format"),
        (["--dtype", "int4"], "--help"),
        (["--weights", "nowhere"], "no such folder"),
        (["verify"], "--help"),
    ],
)
def test_mistakes_on_the_command_line_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    out = [] if argv[0] == "verify" else ["--out", str(tmp_path / "b")]
    assert run(main, [*argv, *out]) == EXIT_USAGE
    assert said in capsys.readouterr().err


def test_a_folder_is_exported_and_a_changed_one_is_noticed(folder: Path, tmp_path: Path) -> None:
    """From a local checkpoint with overflowing weights nothing is left; mended, it exports."""
    target = tmp_path / "bundle"
    argv = ["--model", str(folder), "--no-parity", "--out", str(target)]
    file = folder / "text_encoder" / "model.safetensors"
    whole = load_file(file)
    broken = {name: tensor.clone() for name, tensor in whole.items()}
    name = next(name for name in whole if name.endswith("layers.0.mlp.fc1.weight"))
    broken[name].fill_(1e6)
    save_file(broken, file, metadata={"format": "pt"})
    process = start(*argv)
    _, stderr = process.communicate()
    assert process.returncode == EXIT_USAGE
    assert "layers.0.mlp.fc1.weight" in stderr
    assert not target.exists()
    assert not leftovers(target)
    save_file(whole, file, metadata={"format": "pt"})
    process = start(*argv)
    stdout, stderr = process.communicate()
    assert process.returncode == EXIT_OK, stderr
    assert "licence: not known" in stdout
    bundle = Bundle.open(target)
    assert (bundle.name, bundle.weights, bundle.size) == ("my-sdxl", "folder", (64, 64))
    assert bundle.manifest["source"]["path"] == str(folder)
    assert bundle.checkpoint().origins["unet"].folder == folder / "unet"
    for text in (stdout, stderr):
        assert "Warning" not in text
        assert "torch.onnx" not in text
    (folder / "unet" / "config.json").touch()
    process = start(*argv)
    _, stderr = process.communicate()
    assert process.returncode == EXIT_USAGE
    assert "have changed since" in stderr


def test_a_shipped_checkpoint_that_changed_is_exported_again(
    shapes_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """It came with a newer checkout; a folder of the user's own is refused instead."""
    asked = {k: v for k, v in shapes_bundle.manifest["request"].items() if k != "model"}
    assert _is_there(shapes_bundle.path, SHAPES_TURBO, asked, force=False)
    newer = asked | {"fingerprint": "another"}
    assert not _is_there(shapes_bundle.path, SHAPES_TURBO, newer, force=False)
    assert (
        "the checkpoint's files have changed since: exporting it again" in capsys.readouterr().err
    )
    own = replace(SHAPES_TURBO, folder=None)
    with pytest.raises(PreconditionError, match="holds another bundle"):
        _is_there(shapes_bundle.path, own, newer, force=False)
