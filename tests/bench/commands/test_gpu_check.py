"""`addbench gpu-check`, the whole flow on a CPU: tiny-sdxl, and nothing installed beside
torch, diffusers and transformers. What needs a GPU is said to be left out, or not judged."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from pathlib import Path
from subprocess import TimeoutExpired
from types import SimpleNamespace
from typing import Any

import pytest
from made import cell, row

from bench.commands import gpu_check
from bench.gpu.report import GOALS, goals
from bench.rows.store import open_run, run_names
from core.cli import run as command
from core.errors import EXIT_FAILED, EXIT_OK, PreconditionError

ABSENT = ("accelerate", "cpuinfo", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript",
          "pandas", "psutil", "pynvml", "scipy", "skimage")  # fmt: skip
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Hidden(PathFinder):
    '''A test double of an environment without these packages.'''
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {ABSENT!r}
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]
"""
ARGUMENTS = ["--model", "tiny-sdxl", "--device", "cpu", "--backend", "torch:mode=graph", "--quick",
             "--batch", "1", "--decoder", "taesd"]  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build folder of its own, in an environment without the optional packages."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # diffusers decided at its import what there is, and imports it when it is needed
    kept = {"scipy"} if "diffusers" in importlib.sys.modules else set()  # type: ignore[attr-defined]
    for name in sorted({*ABSENT} - kept):
        monkeypatch.setitem(importlib.sys.modules, name, None)  # type: ignore[attr-defined]
    return tmp_path


def checks_in_process(command: Any, *, input: str, **_: Any) -> SimpleNamespace:
    """Stands for the checks' process: importing torch and diffusers once more takes seconds."""
    from bench.gpu.checks import run
    from bench.gpu.job import GpuJob

    assert command[1:] == ["-m", "bench.gpu.checks"]
    run(GpuJob(**json.loads(input)))
    return SimpleNamespace(returncode=0)


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_is_cut_off_and_goes_on(
    apart: bool, bare: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not apart:
        stand_in = SimpleNamespace(run=checks_in_process, TimeoutExpired=TimeoutExpired)
        monkeypatch.setattr(gpu_check, "subprocess", stand_in)
    out, steps = bare / "runs", [1, 2] if apart else [1]
    arguments = [*ARGUMENTS, "--steps", ",".join(map(str, steps)), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(gpu_check, "TAIL_S", 1e9)  # the sweep's second is over before its first cell
        assert command(gpu_check.main, arguments) == EXIT_FAILED
    said = capfd.readouterr()
    (name,) = run_names(out)
    assert len(open_run(name, out).missing()) == len(steps)
    assert "go on with: addbench gpu-check --model tiny-sdxl" in said.err

    assert command(gpu_check.main, arguments) == EXIT_OK, capfd.readouterr().err
    said = capfd.readouterr()
    assert run_names(out) == [name], "one run"
    assert "sanity ..." not in said.out, "its checks are not made again"
    target = open_run(name, out)
    found = [(measured["status"], measured["steps"], measured["nfe"]) for measured in target.rows()]
    assert found == [("ok", count, count) for count in steps]
    for measured in target.rows():
        assert measured["stages_ms"] is None
        assert measured["stages_from"] is None
        assert measured["accelerator"] is None
        assert measured["image_check"]["status"] == "no_reference", "scikit-image is missing"

    report = json.loads((target.path / "gpu_check.json").read_text())
    assert {s: found["status"] for s, found in report["results"].items()} == {
        "sanity": "ok",
        "parity": "ok",
        "profile": "ok",
    }
    assert {"nvidia-ml-py", "scikit-image", "matplotlib", "pandas"} <= set(report["left_out"])
    images = report["results"]["parity"]["images"]
    assert images["taesd-1"]["whole_to_steps_db"] > 60
    parts = report["results"]["profile"]["parts"]
    assert set(parts) == {"text_encoder", "text_encoder_2", "unet", "taesd_decoder"}
    assert all(part["floor_ms"] > 0 for part in parts.values())
    top = report["results"]["profile"]["images"]["taesd-1"]["top"]
    assert top[0]["ms"] >= top[-1]["ms"] > 0
    assert [goal["met"] for goal in report["goals"]] == [None] * len(GOALS)
    written = (target.path / "gpu_check.md").read_text()
    for words in ("## Left out", "## Goals", "not judged: another device", "## Profile: ok",
                  "None that was published concerns", "| unet"):  # fmt: skip
        assert words in written
        assert words in said.out


def test_a_stage_that_fails_is_a_result(tmp_path: Path) -> None:
    from bench.gpu.checks import known, run
    from bench.gpu.job import GpuJob

    job = GpuJob(str(tmp_path), "cpu", ["vae"], [1], 1, True, str(tmp_path / "out.json"))
    (tmp_path / "out.json").write_text(json.dumps({"sanity": {"status": "ok"}}))
    found = run(job)
    assert found["sanity"] == {"status": "ok"}, "not run again"
    assert found["parity"]["status"] == found["profile"]["status"] == "failed"
    assert "is not a bundle" in found["parity"]["error"]["what"]
    assert known(tmp_path / "out.json") == found
    (tmp_path / "out.json").write_text('{"torn')
    assert known(tmp_path / "out.json") == {}


def test_goals_are_judged_on_an_h200_only() -> None:
    def measured(**more: Any) -> Any:
        rest = {"model": "sdxl-turbo", "size": "512x512", "device": "cuda", "backend": "torch"}
        ms = more.pop("ms")
        return row(cell(**rest, **more), [ms] * 3)

    rows = [
        measured(batch=1, steps=1, decoder="taesd", ms=9.0, options="mode=graph"),
        measured(batch=1, steps=1, decoder="taesd", ms=30.0, options="mode=eager"),
        measured(batch=1, steps=4, decoder="vae", ms=41.0, options="mode=graph"),
    ]
    found = {one.goal.name: one for one in goals(rows, "NVIDIA H200")}
    best = found["batch 1, steps 1, taesd"]
    assert (best.ms, best.backend, best.met) == (9.0, "torch:mode=graph", True)
    assert found["batch 1, steps 4, vae"].met is False
    assert found["batch 4, steps 1, taesd"].met is None
    assert all(one.met is None for one in goals(rows, "NVIDIA L4"))


def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    from backends.nvidia.gpu import torch_on_gpu

    if torch_on_gpu() is None:
        pytest.skip("this machine has a GPU")
    assert command(gpu_check.main, []) == 2
    assert "gpu_check cannot run" in capsys.readouterr().err


def test_without_diffusers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "diffusers" else real(name)
    )
    with pytest.raises(PreconditionError, match="diffusers missing") as caught:
        gpu_check.require_machine("cpu")
    assert caught.value.next == "pip install diffusers"


def test_what_torch_compile_misses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda _: None)
    monkeypatch.setattr(gpu_check.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: name)
    assert gpu_check.compiler_lacks() == ["a C compiler (gcc)", "Python's headers (python3-dev)"]
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert gpu_check.compiler_lacks() == []


def test_backends_that_cannot_be_used_are_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from backends.trt import TrtBackend

    if any(gpu_check.GRAPH_BACKENDS) and os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    assert TrtBackend.name in gpu_check.GRAPH_BACKENDS
    skipped: dict[str, str] = {}
    found = gpu_check.usable_backends(None, "cuda", skipped)
    assert found[0] == "torch:device=cuda,mode=graph"
    assert {"backend trt", "backend cuda"} <= set(skipped)


def test_backends_that_were_asked_for_are_refused_before_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    asked = ["--model", "tiny-sdxl", "--device", "cpu", "--backend", "trt", "--out", str(tmp_path)]
    assert command(gpu_check.main, asked) == 2
    said = capsys.readouterr()
    assert "backend trt cannot be used" in said.err
    assert not said.out
    found = gpu_check.usable_backends(["trt", "torch"], "cpu", {})
    assert found == ["trt", "torch"], "the sweep says why not"


def test_a_backend_without_graphs_leaves_nothing_to_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    monkeypatch.setattr(gpu_check, "export", lambda _: False)
    with pytest.raises(PreconditionError, match="no backend left: trt") as caught:
        gpu_check.bundle_for("tiny-sdxl", "cpu", ["trt:level=1"], {})
    assert "addbench export --model tiny-sdxl" in caught.value.next
    skipped: dict[str, str] = {}
    left = ["torch", "trt"]
    assert not gpu_check.bundle_for("tiny-sdxl", "cpu", left, skipped).has_graphs
    assert left == ["torch"]
    assert "backend trt" in skipped
