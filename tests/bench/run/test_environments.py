"""A backend with an environment of its own: the worker runs there, and its rows say so."""

from __future__ import annotations

import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.null import NullBackend
from bench.rows.store import open_run

ONE = ["--backend", "null", "--decoder", "taesd", "--steps", "1", "--min-samples", "3",
       "--min-time", "0.01", "--max-time", "5", "--warmup", "0"]  # fmt: skip


@pytest.fixture
def other_environment(tmp_path: Path) -> Path:
    """The interpreter of a second environment: a double of one with packages that clash.

    It has the project's packages by a path file, and before them one that the project lacks.
    """
    venv.create(tmp_path / "env", symlinks=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "home.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    info = site / "optimum_onnx-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: optimum-onnx\nVersion: 9.9.9\n")
    (site / "sitecustomize.py").write_text(
        "import os, pathlib, sys\n"
        "said = [sys.executable, *map(os.environ.get, ('ADDBENCH_PYTHON', 'PYTHONPATH'))]\n"
        f"pathlib.Path({str(tmp_path / 'marker')!r}).write_text('\\n'.join(map(str, said)))\n"
    )
    return tmp_path / "env" / "bin" / "python"


def test_the_worker_runs_there_and_its_row_says_what_is_installed(
    sweep: Callable[..., int],
    tmp_path: Path,
    other_environment: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(NullBackend, "interpreter", other_environment)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert sweep(tmp_path / "runs", *ONE) == 0
    (row,) = open_run("latest", tmp_path / "runs").rows()
    assert row["versions"]["optimum-onnx"] == "9.9.9"
    executable, home, path = (tmp_path / "marker").read_text().splitlines()
    assert executable == str(other_environment)
    assert home == sys.executable, "it is told where the project's own environment is"
    assert path == "None", "it is given none of the project's packages"


def test_an_interpreter_that_is_gone_makes_its_cells_unavailable(
    sweep: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(NullBackend, "interpreter", tmp_path / "gone" / "bin" / "python")
    assert sweep(tmp_path / "runs", *ONE) == 4
    (row,) = open_run("latest", tmp_path / "runs").rows()
    assert row["status"] == "unavailable"
    assert row["error"]["what"] == "the worker of null could not be started"
    assert "No such file" in row["error"]["why"]
    assert "addbench backends" in capsys.readouterr().err
