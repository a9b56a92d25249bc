"""What `trt` says where it cannot run, the commands it prints, and what its double may claim."""

from __future__ import annotations

import ctypes
import importlib.metadata
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any

import onnx
import pytest

from backends.__main__ import main
from backends.base import Shapes
from backends.nvidia import driver as gpu
from backends.nvidia.driver import Gpu, NoGpu
from backends.registry import parse_backend
from backends.tensorrt import probe
from core.errors import PreconditionError
from core.files import ROOT
from export.bundle import Bundle

sys.path.insert(0, str(ROOT / "tests" / "doubles"))
import tensorrt_double as double

H200 = Gpu("NVIDIA H200", (9, 0), (13, 0), 141 * 10**9)


# ---- where it cannot run


@pytest.mark.skipif(isinstance(gpu.find_gpu(), Gpu), reason="this machine has a GPU")
def test_a_sweep_without_gpu_ends_at_once_with_what_to_do() -> None:
    command = "-m bench.sweep --backend trt --model sdxl-turbo --steps 1,2,4 --batch 1,4"
    done = subprocess.run(
        [sys.executable, *shlex.split(command), "--decoder", "vae,taesd"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    for words in ("backend trt cannot be used", "NVIDIA driver", "--gpus all", "nvcr.io/nvidia/",
                  "compile --backend trt --dry-run"):  # fmt: skip
        assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "what", "next"),
    [
        ({}, "", ""),
        ({"find_gpu": NoGpu("there is no driver", "get one")}, "no driver", "get one"),
        ({"library_version": None}, "tensorrt is missing", "pypi.nvidia.com tensorrt-cu13"),
        ({"library_version": "8.6.1"}, "older than 10.1", "nvcr.io/nvidia/tensorrt"),
        ({"torch_cuda": None}, "has no CUDA", "pip install torch"),
        ({"find_gpu": Gpu("V100", (7, 0), (13, 0), 1)}, "capability 7.0", "Turing"),
        ({"find_gpu": Gpu("H200", (9, 0), (12, 4), 1)}, "driver is too old", "r580"),
    ],
)
def test_the_probe_names_what_is_missing_and_how_to_get_it(
    change: dict[str, Any], what: str, next: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"find_gpu": H200, "library_version": "10.14.1.48", "torch_cuda": 13} | change
    for name, value in found.items():
        monkeypatch.setattr(probe, name, lambda value=value: value)
    capability = probe.capability("summary")
    assert capability.usable == (not change)
    assert what in capability.what + " summary"
    assert next in capability.next


def test_type_stubs_alone_are_not_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert probe.library_version() is None


class LibCudaDouble:
    """A test double of libcuda.so.1: a driver with one GPU, or one that does not start."""

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def cuInit(self, flags: int) -> int:
        return self.start

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, label: Any, size: int, device: Any) -> int:
        label.value = b"NVIDIA H200"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = 141 * 10**9
        return 0

    def cuDeviceGetAttribute(self, number: Any, which: int, device: Any) -> int:
        number._obj.value = {75: 9, 76: 0}[which]
        return 0

    def cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = 13010
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"unknown error"
        return 0


@pytest.mark.parametrize(
    ("start", "words"),
    [(100, "sees no GPU"), (803, "different versions"), (999, "does not start: unknown error")],
)
def test_a_driver_that_does_not_start_says_why(
    start: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: LibCudaDouble(start))
    found = gpu.find_gpu.__wrapped__()
    assert isinstance(found, NoGpu)
    assert words in found.why


def test_the_gpu_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: LibCudaDouble())
    assert gpu.find_gpu.__wrapped__() == Gpu("NVIDIA H200", (9, 0), (13, 1), 141 * 10**9)


# ---- the commands


def test_a_dry_run_needs_no_gpu_and_prints_commands_that_fit(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    argv = ["compile", "--backend", "trt:level=4,workspace=2", "--model", str(tiny_bundle.path)]
    assert main([*argv, "--decoder", "taesd", "--batch", "2", "--dry-run"]) == 0
    lines = [shlex.split(x, comments=True) for x in capsys.readouterr().out.splitlines()]
    commands = [words for words in lines if words]
    assert len(commands) == 3 * 5  # three a part; the UNet is two
    lower, trtexec, clear = commands[-3:]
    assert trtexec[0] == "trtexec"
    options = dict(word.partition("=")[::2] for word in trtexec[1:])
    assert options["--builderOptimizationLevel"] == "4"
    assert options["--memPoolSize"] == "workspace:2048M"
    assert options["--decomposableAttentions"] == "*"
    assert not {"--fp16", "--minShapes"} & set(options)
    assert lower[:2] == ["python", "-c"]
    exec(lower[2], {})
    written = onnx.load(options["--onnx"], load_external_data=False)
    (latents,) = written.graph.input
    assert [dim.dim_value for dim in latents.type.tensor_type.shape.dim] == [2, 4, 8, 8]
    assert latents.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert clear[:2] == ["rm", "-f"]
    assert {Path(name).name for name in clear[2:]} == {
        file.name for file in Path(options["--onnx"]).parent.iterdir()
    }
    for name in clear[2:]:
        Path(name).unlink()


def test_a_dry_run_leaves_a_folder_that_another_machine_builds_from(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "here" / "folder"
    argv = ["compile", "--model", str(tiny_bundle.path), "--dry-run", "--out", str(folder)]
    assert main([*argv, "--backend", "trt", "--decoder", "taesd", "--batch", "1,2"]) == 0
    assert "copy it to a machine with TensorRT" in capsys.readouterr().out
    moved = folder.rename(tmp_path / "there")
    for graph in moved.glob("onnx/*/model.onnx"):
        onnx.load(graph)  # with its weights
        assert not any(
            file.is_symlink() or file.stat().st_nlink > 1 for file in graph.parent.iterdir()
        )
    text = (moved / "trtexec.sh").read_text()
    assert str(tmp_path) not in text
    assert str(tiny_bundle.path) not in text
    bash = shutil.which("bash") or "bash"
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "dirname").symlink_to(shutil.which("dirname") or "")
    (bare / "mkdir").symlink_to(shutil.which("mkdir") or "")
    run = [bash, str(moved / "trtexec.sh")]
    refused = subprocess.run(run, env={"PATH": str(bare)}, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "next: run this in" in refused.stderr
    double = bare / "trtexec"  # takes each graph's size for the plan
    double.write_text(
        f"#!{bash}\n"
        "for word; do\n"
        "  case $word in --onnx=*) o=${word#*=};; --saveEngine=*) p=${word#*=};; esac\n"
        "done\n"
        '[ -f "$o" ] && echo "$o" > "$p"\n'
    )
    double.chmod(0o755)
    subprocess.run(run, env={"PATH": str(bare)}, check=True)
    plans = sorted(plan.name for plan in (moved / "plans").iterdir())
    assert len(plans) == 2 * 5
    assert "taesd_decoder-batch2.plan" in plans


@pytest.mark.parametrize("words", [["--dry-run", "--backend", "trt:precision=fp8"], []])
def test_what_has_no_folder_leaves_none(
    words: list[str], tiny_bundle: Bundle, tmp_path: Path
) -> None:
    argv = ["compile", "--model", str(tiny_bundle.path), "--out", str(tmp_path / "folder"), *words]
    with pytest.raises(PreconditionError, match="--out|no folder"):
        main(argv)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("version", "text", "expected", "absent"),
    [
        ("10.13.3.9", "", ["--stronglyTyped"], ["--decomposableAttentions=*", "--stripWeights"]),
        ("11.1.0.106", "", ["--decomposableAttentions=*"], ["--stronglyTyped"]),
        ("10.14.1.48", "refit=1", ["--stripWeights", "--stronglyTyped"], []),
        (
            "10.14.1.48",
            "batch=1-4,hardware=ampere+,version_compatible=1,context=inline",
            [
                "--minShapes=sample:1x4x8x8,encoder_hidden_states:1x77x80,text_embeds:1x48,time_ids:1x6",
                "--maxShapes=sample:4x4x8x8,encoder_hidden_states:4x77x80,text_embeds:4x48,time_ids:4x6",
                "--hardwareCompatibilityLevel=ampere+",
                "--versionCompatible",
            ],
            [],
        ),
    ],
)
def test_the_options_of_a_plan_are_those_of_trtexec(
    version: str,
    text: str,
    expected: list[str],
    absent: list[str],
    tiny_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    double.install(monkeypatch, version)
    backend = parse_backend(f"trt:{text}" if text else "trt")
    _, words, _ = backend.dry_run(tiny_bundle, "unet", Shapes(1, *tiny_bundle.size))
    assert {"--skipInference", "--noTF32", *expected} <= set(words)
    assert not set(absent) & set(words)


# ---- the double against the published API


def stub_classes() -> dict[str, dict[str, list[list[str]]]]:
    """Class -> member -> parameters of each overload, from the type stubs (TensorRT 10.13).

    Read by line: they are no valid Python (a keyword as a parameter, defaults before others).
    """
    try:
        files = importlib.metadata.files("tensorrt-stubs") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package tensorrt-stubs is missing; `make install` gets it")
    (stub,) = (f for f in files if f.name == "tensorrt.pyi")
    classes: dict[str, dict[str, list[list[str]]]] = {}
    members: dict[str, list[list[str]]] = {}
    for line in Path(str(stub.locate())).read_text().splitlines():
        if found := re.match(r"class (\w+)", line):
            members = classes[found[1]] = {}
        elif found := re.match(r"    def (\w+)\((.*)\)", line):
            parameters = re.findall(r"(?:^|, )(\w+)(?=[:,]|$)", found[2])[1:]
            members.setdefault(found[1], []).append(parameters)
        elif found := re.match(r"    (\w+): ", line):
            members.setdefault(found[1], [])
    return classes


def test_the_double_has_only_what_the_api_has() -> None:
    stubs = stub_classes()
    assert stubs["IExecutionContext"]["set_tensor_address"] == [["name", "memory"]]
    checked = 0
    for name, cls in vars(double).items():
        if not inspect.isclass(cls) or name not in stubs:
            continue
        members = stubs[name]
        if issubclass(cls, IntEnum):
            assert {m.name for m in cls} <= members.keys(), name
            checked += len(cls)
            continue
        for member, value in vars(cls).items():
            if member.startswith("_") and (member != "__init__" or member not in members):
                continue  # ours, or a class that its users do not make
            if inspect.isfunction(value):
                ours = list(inspect.signature(value).parameters)[1:]
                assert ours in members.get(member, []), f"{name}.{member}({ours})"
            elif not inspect.isclass(value):
                assert member in members, f"{name}.{member}"
            checked += 1
    assert checked > 60
