"""Whole sweeps on the null backend: real workers, real faults, every status."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from made import gone

from backends.null import NullBackend
from bench.rows.cell import Cell
from bench.rows.fields import COLUMNS
from bench.rows.store import Row, Run, open_run
from bench.show.publish import private
from export.bundle import Bundle

Sweep = Callable[..., int]
FAST = ["--min-samples", "3", "--min-time", "0.01", "--max-time", "5"]
"""Three samples and no waiting: what these tests are about is not the figures."""
ONE = ["--decoder", "taesd", "--batch", "1", *FAST]


@dataclass(frozen=True)
class Done:
    code: int
    run: Run
    rows: list[Row]
    out: str
    err: str

    def status(self, options: str, steps: int) -> str:
        (found,) = [r for r in self.rows if r["options"] == options and r["steps"] == steps]
        return str(found["status"])


@pytest.fixture(scope="module")
def faults(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One sweep in which each backend fails in its own way, in one of two cells."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("runs")
    backends = [
        "null",
        "null:fail=crash,only_steps=1",  # kills the worker: steps 2 needs a fresh one
        "null:at=5,fail=oom,only_steps=2",
        "null:fail=nan,only_steps=1",
        "null:fail=wrong,only_steps=1",
        "null:at=8,fail=error,only_steps=2",  # in the middle of the samples
        "null:usable=0",
    ]
    flags = [word for text in backends for word in ("--backend", text)]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = sweep(out, "--steps", "1,2", *flags, *ONE)
    run = open_run("latest", out)
    return Done(code, run, run.rows(), stdout.getvalue(), stderr.getvalue())


def test_every_fault_is_a_row_with_its_status(faults: Done) -> None:
    found = {(r["options"], r["steps"]): r["status"] for r in faults.rows}
    assert found == {
        ("", 1): "ok",
        ("", 2): "ok",
        ("fail=crash,only_steps=1", 1): "crashed",
        ("fail=crash,only_steps=1", 2): "ok",
        ("at=5,fail=oom,only_steps=2", 1): "ok",
        ("at=5,fail=oom,only_steps=2", 2): "oom",
        ("fail=nan,only_steps=1", 1): "non_finite",
        ("fail=nan,only_steps=1", 2): "ok",
        ("fail=wrong,only_steps=1", 1): "mismatch",
        ("fail=wrong,only_steps=1", 2): "ok",
        ("at=8,fail=error,only_steps=2", 1): "ok",
        ("at=8,fail=error,only_steps=2", 2): "failed",
        ("usable=0", 1): "unavailable",
        ("usable=0", 2): "unavailable",
    }


def test_a_sweep_with_faults_ends_with_4_and_a_list(faults: Done) -> None:
    assert faults.code == 4
    assert "7 cells failed, 0 missing" in faults.err
    assert "SIGSEGV" in faults.err
    for status in ("crashed", "oom", "non_finite", "mismatch", "unavailable", "failed"):
        assert f"  {status}: null" in faults.err
    assert "--retry-failed" in faults.err


def test_rows_are_whole_whatever_happened(faults: Done) -> None:
    for row in faults.rows:
        assert tuple(row) == COLUMNS
        assert row["provenance"] == "measured"
        assert (row["error"] is None) == (row["status"] == "ok")
        if row["error"]:
            assert row["error"]["what"]
            assert row["error"]["next"]
    assert not list(private(faults.rows))
    assert not list(private(faults.run.header))


def test_figures_of_a_good_row(faults: Done, tiny_bundle: Bundle) -> None:
    row = next(r for r in faults.rows if r["options"] == "" and r["steps"] == 2)
    assert len(row["samples_ms"]) == 3
    assert row["nfe"] == 2
    assert [len(unet) for unet in row["stages_samples_ms"]["unet"]] == [2, 2, 2]
    assert row["stages_ms"]["unet_step"] >= 2.0
    assert row["warmup_calls"] == 1
    assert row["cold_ms"] > 0
    assert row["process_cold"] is False  # steps 1 went first
    assert 100 < row["peak_memory_mb"] < 5000
    assert row["bundle_hash"] == tiny_bundle.hash
    assert set(row["artifacts"]) == {"text_encoder", "text_encoder_2", "unet", "taesd_decoder"}
    assert row["image_check"] == {"status": "ok", "psnr_db": 100.0, "ssim": 1.0}
    first = next(r for r in faults.rows if r["options"] == "" and r["steps"] == 1)
    assert first["stages_ms"]["unet_step"] is None
    assert first["process_cold"] is True


def test_a_wrong_image_is_a_mismatch_that_says_by_how_much(faults: Done) -> None:
    row = next(r for r in faults.rows if r["status"] == "mismatch")
    assert row["image_check"]["status"] == "mismatch"
    assert row["image_check"]["psnr_db"] < 30
    assert "dB" in row["error"]["what"]
    assert (row["samples_ms"], row["median_ms"]) == ([], None), "times of a wrong image are none"
    assert row["cold_ms"] > 0
    assert "under_sampled" not in row["flags"]


def test_the_run_folder_holds_what_is_said(faults: Done) -> None:
    names = {file.name for file in faults.run.path.iterdir()}
    assert {"header.json", "rows.jsonl", "table.md", "table.csv", "plot.svg", "plot.png"} <= names
    assert str(faults.run.path) in faults.out
    assert "median (ms)" in faults.out
    log = next((faults.run.path / "logs").glob("*fail=error*")).read_text()
    assert "the scripted device failed" in log


def test_what_libraries_print_stays_out_of_the_protocol(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interpreter of the backend's own, which here prints before it becomes the worker."""
    import sys

    noisy = tmp_path / "python"
    noisy.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "'
        "import sys, os, bench.worker as w; s = w.take_stdout;"
        "w.take_stdout = lambda: (lambda r: (print('noise'), os.system('echo more noise'), r)[2])"
        '(s()); sys.exit(w.main())"\n'
    )
    noisy.chmod(0o755)
    monkeypatch.setattr(NullBackend, "interpreter", noisy)
    assert sweep(tmp_path / "runs", "--backend", "null", "--steps", "1", *ONE) == 0
    run = open_run("latest", tmp_path / "runs")
    (log,) = (run.path / "logs").iterdir()
    assert "noise\n" in log.read_text()
    assert "more noise\n" in log.read_text()


def test_a_worker_that_dies_at_once_is_a_crash(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(NullBackend, "interpreter", broken)
    assert sweep(tmp_path / "runs", "--backend", "null", "--steps", "1,2,4", *ONE) == 4
    rows = open_run("latest", tmp_path / "runs").rows()
    assert [row["status"] for row in rows] == ["crashed"] * 3
    assert "exited with 3" in rows[0]["error"]["what"]


def test_what_hangs_is_killed_with_its_children(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the worker: loads, begins a cell, then waits for a child for ever."""
    pids = tmp_path / "pids"
    hanging = tmp_path / "python"
    hanging.write_text(
        '#!/bin/sh\necho \'{"event": "loaded", "shared": {"load_s": 0.5}}\'\n'
        f"sleep 1000 &\necho $! >> {pids}\n"
        'echo \'{"event": "begin", "cell": 0}\'\nwait\n'
    )
    hanging.chmod(0o755)
    monkeypatch.setattr(NullBackend, "interpreter", hanging)
    flags = ["--backend", "null", "--steps", "1,2", "--timeout", "0.5", *ONE]
    assert sweep(tmp_path / "runs", *flags) == 4
    rows = open_run("latest", tmp_path / "runs").rows()
    assert [row["status"] for row in rows] == ["timeout", "timeout"]
    assert "within 0.5 s" in rows[0]["error"]["what"]
    assert rows[0]["load_s"] == 0.5
    children = [int(pid) for pid in pids.read_text().split()]
    assert len(children) == 2  # the second cell had a fresh process
    assert all(gone(pid) for pid in children)


@pytest.mark.slow
def test_a_hang_is_a_timeout_and_the_next_cell_goes_on(sweep: Sweep, tmp_path: Path) -> None:
    hang = "null:fail=hang,only_steps=1"
    flags = ["--backend", hang, "--steps", "1,2", "--timeout", "30", *ONE]
    assert sweep(tmp_path, *flags) == 4
    rows = open_run("latest", tmp_path).rows()
    assert [row["status"] for row in rows] == ["timeout", "ok"]


def test_none_usable_starts_nothing(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    assert sweep(out, "--backend", "null:usable=0", "--steps", "1") == 2
    assert not out.exists()
    # The probe comes before the bundle.
    assert sweep(out, "--backend", "null:usable=0", "--model", "/nonexistent") == 2
    errors = capsys.readouterr().err
    assert errors.count("cannot be used") == 2
    assert "drop usable=0" in errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backend", "nonsense"], "no backend called"),
        (["--backend", "null", "--backend", "null"], "once a round"),
        (["--backend", "null", "--decoder", "jpeg"], "no decoder called"),
        (["--backend", "null", "--size", "100x100"], "64x64"),
        (["--backend", "null", "--steps", "0"], "at least 1"),
        (["--backend", "null", "--max-time", "1", "--min-time", "2"], "--max-time 1"),
        (["--retry-failed"], "--resume"),
        (["--resume", "--quick"], "--quick"),
        (["--resume", "nonsense"], "not a run"),
    ],
)
def test_misuse_is_2_and_says_so(
    sweep: Sweep, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "runs", *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_dry_run_measures_nothing(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str], faults: Done
) -> None:
    flags = ["--backend", "null", "--steps", "1,2", "--decoder", "taesd", "--dry-run"]
    assert sweep(tmp_path / "runs", *flags) == 0
    text = capsys.readouterr().out
    assert "2 cells in 1 process," in text
    assert "at least 3 s (no figure yet)" in text
    assert sweep(tmp_path / "runs", *flags, "--rounds", "5") == 0
    text = capsys.readouterr().out
    assert "10 cells in 5 processes" in text
    assert [line.split("  ")[1] for line in text.splitlines() if line.startswith("  ")] == (
        ["rounds 1 to 5, each"] * 2
    )
    assert not (tmp_path / "runs").exists()
    # With an earlier run on this machine there is a figure.
    assert sweep(faults.run.path.parent, *flags) == 0
    assert f"(run {faults.run.name})" in capsys.readouterr().out


def test_a_spent_budget_leaves_cells_missing_and_resume_measures_them(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--backend", "null", "--backend", "null:usable=0", "--steps", "1,2", *ONE]
    assert sweep(tmp_path, *flags, "--budget", "0.3") == 4
    errors = capsys.readouterr().err
    assert "4 missing" in errors
    assert "budget of 0.3 s" in errors
    run = open_run("latest", tmp_path)
    assert run.rows() == []
    assert sweep(tmp_path, "--resume") == 4
    assert "2 cells failed, 0 missing" in capsys.readouterr().err
    assert [row["status"] for row in run.rows()] == ["ok", "ok", "unavailable", "unavailable"]
    # Nothing is left: a second resume measures nothing; --retry-failed only what failed.
    before = run.all_rows()
    header = json.loads((run.path / "header.json").read_text())
    (run.path / "header.json").write_text(json.dumps(header | {"git_commit": "abc"}))
    assert sweep(tmp_path, "--resume", run.name) == 4
    errors = capsys.readouterr().err
    assert f"run {run.name} began at commit abc, this is" in errors
    again = f"go on with: addbench sweep --resume {run.name} --runs {tmp_path} --retry-failed"
    assert again in errors
    assert run.all_rows() == before
    assert sweep(tmp_path, "--resume", "latest", "--retry-failed") == 4
    added = run.all_rows()[len(before) :]
    assert [(Cell.of(row).options, row["steps"]) for row in added] == [
        ("usable=0", 1),
        ("usable=0", 2),
    ]


@pytest.mark.parametrize(
    "flags", [["--precision", "int8"], ["--device", "ai100-ultra"], ["--no-images"]]
)
def test_resume_refuses_what_it_would_not_do(
    flags: list[str], sweep: Sweep, capsys: pytest.CaptureFixture[str], faults: Done
) -> None:
    assert sweep(faults.run.path.parent, "--resume", *flags) == 2
    assert f"{flags[0]} does not go with --resume" in capsys.readouterr().err
    assert sweep(faults.run.path.parent, "--resume", "--quality", "9") == 2
    assert "--quality was 0 and is 9" in capsys.readouterr().err


def test_resume_refuses_what_differs(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str], faults: Done
) -> None:
    out = faults.run.path.parent
    assert sweep(out, "--resume", "--steps", "1,2,8", "--min-time", "9") == 2
    errors = capsys.readouterr().err
    assert "--steps was [1, 2] and is [1, 2, 8]" in errors
    assert "--min-time was 0.01 and is 9.0" in errors
    file = tmp_path / "made" / "header.json"
    file.parent.mkdir()
    header = json.loads((faults.run.path / "header.json").read_text())
    header["bundle"]["hash"] = "0" * 64
    header["environment"]["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(header))
    assert sweep(tmp_path, "--resume", "made") == 2
    errors = capsys.readouterr().err
    assert "bundle's hash" in errors
    assert "versions" in errors
