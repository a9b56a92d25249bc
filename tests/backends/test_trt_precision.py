"""`trt:precision=fp8|int8`: the quantised UNet from calibration file to plan.

TensorRT, the GPU and nvidia-modelopt are test doubles here (tests/doubles); what runs for real is
the recording, the pairs in the graph and the comparison on the CPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pickle
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from backends.__main__ import main
from backends.base import BackendError, Shapes, UnsupportedError, artifact_key
from backends.check import scales_parity
from backends.check.gate import GATES, gate_for, image_distance
from backends.commands.calibrate import record
from backends.load import load_pipeline
from backends.ort import OrtBackend
from backends.quantised import scales
from backends.registry import parse_backend
from backends.tensorrt import probe
from core.cli import run as shell
from core.errors import PreconditionError
from core.files import ROOT, read_json
from export.bundle import Bundle
from export.models import CONTEXT_PART
from export.quantize.calibration import calibration_path

sys.path.insert(0, str(ROOT / "tests" / "doubles"))
import gpu_double
import tensorrt_double as double

STANDIN = str(ROOT / "tests" / "doubles" / "modelopt_standin")


def install(patch: pytest.MonkeyPatch) -> gpu_double.World:
    """The doubles, in this process and in those that it starts."""
    patch.syspath_prepend(STANDIN)
    patch.setenv("PYTHONPATH", f"{STANDIN}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    patch.setenv("OMP_NUM_THREADS", "1")
    return double.install(patch)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle) -> Path:
    """A build folder with the tiny bundle's calibration file in it."""
    folder = tmp_path_factory.mktemp("build")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADDBENCH_BUILD", str(folder))
        record(
            tiny_bundle, OrtBackend({"graph": "canonical", "threads": "1"}),
            calibration_path(tiny_bundle), prompts=["a fox", "a hen"], steps=2,
            random_weights=True, say=lambda line: None,
        )  # fmt: skip
    return folder


@pytest.fixture
def world(build: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_double.World:
    monkeypatch.setenv("ADDBENCH_BUILD", str(build))
    return install(monkeypatch)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The child processes' work in this one, which is quicker; the modules that were asked for."""
    asked: list[str] = []
    work: dict[str, Callable[[dict[str, Any]], None]] = {
        "backends.quantised.scales": scales._calibrate,
        "backends.check.scales_parity": scales_parity._compare,
    }

    def run(module: str, job: dict[str, Any], folder: Path, **words: Any) -> None:
        asked.append(module)
        work[module](job)

    monkeypatch.setattr(scales, "run_child", run)
    monkeypatch.setattr(scales_parity, "IMAGES", 1)
    return asked


def shapes(bundle: Bundle, batch: int = 1) -> Shapes:
    return Shapes(batch, *bundle.size)


def unet_inputs(bundle: Bundle, batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        spec.name: torch.full((1,), 500.0)
        if spec.name == "timestep"
        else torch.randn(batch, *spec.shape[1:], generator=generator).to(  # type: ignore[arg-type]
            getattr(torch, spec.dtype)
        )
        for spec in bundle.parts["unet"].inputs
    }


def plan_graph(folder: Path) -> onnx.ModelProto:
    """The graph that a plan of the double was built from."""
    content = (folder / "model.plan").read_bytes()
    return onnx.load_from_string(pickle.loads(content[4:])["graph"])


# ---- plans


def test_an_fp8_plan_is_built_compared_and_kept(
    world: gpu_double.World, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the recorded file, in real child processes."""
    backend = parse_backend("trt:precision=fp8,context=inline")
    assert backend.precision(tiny_bundle) == backend.storage(tiny_bundle) == "fp8"
    artifact = backend.compile(tiny_bundle, "unet", shapes(tiny_bundle))
    assert artifact.path is not None
    assert {"model.plan", "plan.json", "parity.json"} <= {f.name for f in artifact.path.iterdir()}
    compared = read_json(artifact.path / "parity.json")
    assert compared["scheme"] == "qdq-fp8"
    assert 1e-4 < compared["unet"]["relative_error"] < GATES["fp8"].relative_error
    assert compared["unet"]["worst"] >= compared["unet"]["relative_error"]
    assert [image["seed"] for image in compared["images"]] == [1002, 1003, 1004, 1005], "new ones"
    assert min(image["psnr_db"] for image in compared["images"]) > GATES["fp8"].psnr_db
    for text in (backend.remark(artifact), capsys.readouterr().err):
        assert "qdq-fp8 on the CPU, against FP32: UNet relative error" in text
    assert read_json(artifact.path / "plan.json")["quantisation"]["modelopt"] == "0.0"
    graph = plan_graph(artifact.path).graph
    zeros = {t.name: t.data_type for t in graph.initializer if t.name.endswith("/zero")}
    assert set(zeros.values()) == {onnx.TensorProto.FLOAT8E4M3FN}
    counts = Counter(node.op_type for node in graph.node)
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] > compared["layers"] > 10
    assert compared["left"] == 0
    feeds = unet_inputs(tiny_bundle)
    plain = parse_backend("trt:context=inline")
    as_is = plain.compile(tiny_bundle, "unet", shapes(tiny_bundle))
    with backend.load(tiny_bundle, artifact) as low, plain.load(tiny_bundle, as_is) as high:
        got, expected = (s.run(feeds)["out_sample"].float() for s in (low, high))
    assert 1e-4 < (got - expected).norm() / expected.norm() < 0.1
    assert plain.remark(as_is) == ""


def test_scales_serve_every_batch_and_each_scheme_has_its_own(
    world: gpu_double.World, tiny_bundle: Bundle, inline: list[str]
) -> None:
    backend = parse_backend("trt:precision=int8")
    folders = [
        backend.compile(tiny_bundle, "unet", shapes(tiny_bundle, batch)).path for batch in (1, 2)
    ]
    assert None not in folders
    assert inline == ["backends.quantised.scales", "backends.check.scales_parity"]
    assert read_json(folders[0] / "parity.json")["scheme"] == "qdq-int8"  # type: ignore[operator]
    zeros = {
        t.data_type
        for t in plan_graph(folders[1]).graph.initializer  # type: ignore[arg-type]
        if t.name.endswith("/zero")
    }
    assert zeros == {onnx.TensorProto.INT8}
    assert backend.compile(tiny_bundle, "unet", shapes(tiny_bundle)).cached
    data = tiny_bundle.parts["unet"].data
    assert data is not None
    kept = folders[0].parent.rglob("*")  # type: ignore[union-attr]
    assert not [file for file in kept if file.is_file() and file.samefile(data)], "a link is left"


def test_only_the_unet_depends_on_the_precision(
    world: gpu_double.World, tiny_bundle: Bundle, build: Path, tmp_path: Path
) -> None:
    def key(text: str, part: str = "unet") -> str:
        return artifact_key(parse_backend(text), tiny_bundle, part, shapes(tiny_bundle))

    assert key("trt:precision=fp16") == key("trt")
    assert key("trt:precision=fp8", "vae_decoder") == key("trt", "vae_decoder")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(calibration_path(tiny_bundle).read_bytes())
    fp8 = key("trt:precision=fp8")
    assert key(f"trt:precision=fp8,calibration={copy}") == fp8  # its content counts
    other = record(
        tiny_bundle, OrtBackend({"graph": "canonical", "threads": "1"}),
        tmp_path / "other.safetensors", prompts=["a cow"], steps=1, random_weights=True,
        say=lambda line: None,
    ).path  # fmt: skip
    keys = {key("trt"), fp8, key("trt:precision=int8")}
    keys.add(key(f"trt:precision=fp8,calibration={other}"))
    assert len(keys) == 4


def test_both_halves_are_quantised_and_compared_once(
    world: gpu_double.World, tiny_bundle: Bundle, inline: list[str]
) -> None:
    """The pairs around what is made of the prompt alone go with it; between them, all of them."""
    counts = {}
    for text, parts in (("", (CONTEXT_PART, "unet")), (",context=inline", ("unet",))):
        backend = parse_backend(f"trt:precision=fp8{text}")
        for part in parts:
            artifact = backend.compile(tiny_bundle, part, shapes(tiny_bundle))
            assert artifact.path is not None
            ops = [node.op_type for node in plan_graph(artifact.path).graph.node]
            counts[text, part] = ops.count("QuantizeLinear")
            assert (backend.remark(artifact) == "") == (part == CONTEXT_PART)
    assert counts["", CONTEXT_PART] > 2
    assert counts["", CONTEXT_PART] + counts["", "unet"] == counts[",context=inline", "unet"]


def test_an_image_of_a_quantised_plan_passes_its_gate(
    world: gpu_double.World, tiny_bundle: Bundle, inline: list[str]
) -> None:
    references = tiny_bundle.references()
    assert references is not None
    with load_pipeline(str(tiny_bundle.path), "trt:precision=fp8", "taesd") as pipeline:
        out = pipeline([references.prompt], steps=2, seed=references.seed)
    found = image_distance(out.images[0], references.images["taesd", 2])
    assert found.passes(gate_for("fp8", "fp8", "random")), found


def test_an_older_release_reads_an_older_form(
    world: gpu_double.World, tiny_bundle: Bundle, inline: list[str]
) -> None:
    double.set_version("10.3.0.26")
    backend = parse_backend("trt:precision=fp8")
    folder = backend.compile(tiny_bundle, "unet", shapes(tiny_bundle)).path
    assert folder is not None
    model = plan_graph(folder)
    assert model.opset_import[0].version == 20
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["QuantizeLinear"] > 10
    assert not counts["Attention"]


def test_scales_without_a_comparison_say_so(
    world: gpu_double.World, tiny_bundle: Bundle, inline: list[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = calibration_path(tiny_bundle)
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    calibration_path(tiny_bundle).parent.mkdir()
    calibration_path(tiny_bundle).write_bytes(file.read_bytes())
    run = scales.run_child

    def failing(module: str, job: dict[str, Any], folder: Path, **words: Any) -> None:
        if module == "backends.check.scales_parity":
            raise BackendError("the comparison was killed", "no memory", "")
        run(module, job, folder, **words)

    monkeypatch.setattr(scales, "run_child", failing)
    backend = parse_backend("trt:precision=int8")
    artifact = backend.compile(tiny_bundle, "unet", shapes(tiny_bundle))
    assert "not compared" in backend.remark(artifact)
    assert "the comparison was killed: no memory" in capsys.readouterr().err

    monkeypatch.setattr(scales, "run_child", run)  # memory is there: neither scales nor plan anew
    inline.clear()
    with monkeypatch.context() as patch:
        patch.setattr(scales, "comparison_need", lambda _: 1 << 60)
        assert backend.compile(tiny_bundle, "unet", shapes(tiny_bundle)).cached
        assert inline == []
        assert "needs about" in capsys.readouterr().err
    again = backend.compile(tiny_bundle, "unet", shapes(tiny_bundle))
    assert (again.cached, inline) == (True, ["backends.check.scales_parity"])
    assert "on the CPU, against FP32" in backend.remark(again)
    backend.compile(tiny_bundle, "unet", shapes(tiny_bundle))
    assert inline == ["backends.check.scales_parity"], "once"


# ---- refusals


@pytest.mark.parametrize(
    ("capability", "precision", "words"),
    [
        ((8, 6), "fp8", "FP8 needs 8.9"),
        ((9, 0), "fp8", ""),
        ((8, 9), "fp8", ""),
        ((7, 5), "int8", ""),
        ((7, 0), "int8", "TensorRT needs 7.5"),
    ],
)
def test_an_old_gpu_is_refused_by_the_probe(
    capability: tuple[int, int], precision: str, words: str, world: gpu_double.World
) -> None:
    world.gpu = gpu_double.Gpu("A10", capability, (13, 0), 2**33)
    found = parse_backend(f"trt:precision={precision}").probe()
    assert found.usable == (not words)
    assert words in found.what
    if words and precision == "fp8":
        assert "trt:precision=int8" in found.next
        assert parse_backend("trt").probe().usable


def test_a_missing_modelopt_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    double.install(monkeypatch)
    find = importlib.util.find_spec
    gone = ("modelopt", "onnx_graphsurgeon")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest)
    )

    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("export.quantize.modelopt.version", nothing)
    found = parse_backend("trt:precision=fp8").probe()
    assert not found.usable
    assert "nvidia-modelopt" in found.what
    assert "'.[cpu,modelopt]'" in found.next
    assert parse_backend("trt").probe().usable
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "precision=fp8 and int8: nvidia-modelopt and" in listed
    assert "not run on hardware" in listed
    extras = (ROOT / "pyproject.toml").read_text()
    assert "\nmodelopt = [" in extras


@pytest.mark.parametrize(
    ("text", "what", "next"),
    [
        ("refit=1,precision=int8", "refit=1 does not go with", "drop refit"),
        ("hardware=ampere+,precision=fp8", "ampere", "precision=int8"),
        ("precision=bf16", "not a value", "precision=auto; or use ort:precision=bf16"),
    ],
)
def test_what_does_not_go_together_is_refused_early(text: str, what: str, next: str) -> None:
    with pytest.raises(PreconditionError) as caught:
        parse_backend(f"trt:{text}")
    assert what in caught.value.what
    assert next in caught.value.next


def test_a_backend_without_fp8_names_the_one_that_has_it() -> None:
    with pytest.raises(PreconditionError, match="has no option 'precision'") as caught:
        parse_backend("cuda:precision=fp8")
    assert "trt:precision=fp8" in caught.value.next
    with pytest.raises(PreconditionError) as caught:
        parse_backend("openvino:precision=fp8")
    assert "trt:precision=fp8" in caught.value.next


def test_an_fp32_bundle_is_refused(world: gpu_double.World, tiny_bundle: Bundle) -> None:
    wide = Bundle(tiny_bundle.path, {**tiny_bundle.manifest, "dtype": "fp32"})
    for precision in ("fp16", "fp8"):
        backend = parse_backend(f"trt:precision={precision}")
        with pytest.raises(UnsupportedError) as caught:
            backend.compile(wide, "text_encoder", shapes(wide))
        assert "--dtype fp16" in caught.value.next
    assert world.builds == 0


@pytest.mark.parametrize("state", ["missing", "cut", "another"])
def test_a_calibration_file_that_is_not_right_is_refused_before_any_build(
    state: str, world: gpu_double.World, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    content = calibration_path(tiny_bundle).read_bytes()
    file = tmp_path / "file.safetensors"
    if state == "cut":
        file.write_bytes(content[:-5])
    elif state == "another":
        file.write_bytes(content.replace(tiny_bundle.parts["unet"].hash.encode(), b"0" * 64))
    words = {
        "missing": "whose weights are random",
        "cut": "cannot be read",
        "another": f"is not of {tiny_bundle.path.name}",
    }
    with pytest.raises(PreconditionError, match=words[state]) as caught:
        load_pipeline(str(tiny_bundle.path), f"trt:precision=fp8,calibration={file}", "taesd")
    assert f"addbench calibrate --model {tiny_bundle.path} --random-weights" in caught.value.next
    trained = Bundle(tiny_bundle.path, {**tiny_bundle.manifest, "weights": "folder"})
    if state == "missing":
        backend = parse_backend(f"trt:precision=fp8,calibration={file}")
        with pytest.raises(PreconditionError, match="there is no calibration file"):
            backend.compile(trained, "vae_decoder", shapes(trained))
    assert world.builds == 0


# ---- commands


def test_a_dry_run_prints_what_a_compile_does(
    world: gpu_double.World, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = calibration_path(tiny_bundle)
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    argv = ["compile", "--backend", f"trt:precision=fp8,calibration={file}", "--model"]
    assert main([*argv, str(tiny_bundle.path), "--decoder", "taesd", "--dry-run"]) == 0
    lines = [shlex.split(x, comments=True) for x in capsys.readouterr().out.splitlines()]
    commands = [words for words in lines if words]
    assert len(commands) == 3 * 5 + 2  # the UNet's halves share their scales
    (at,) = (i for i, words in enumerate(commands) if "calibrate" in words)
    calibrate, scale, lower, trtexec, clear = commands[at : at + 5]
    assert calibrate[-2:] == ["--out", str(file)]
    assert trtexec[0] == "trtexec"
    other = commands[at + 5]  # of the UNet's other half
    assert other[:2] == lower[:2]
    assert other[2].count("scales.safetensors") == lower[2].count("scales.safetensors") == 1
    assert "--stronglyTyped" in trtexec  # the pairs say what is FP8; no --fp8 flag
    assert not {"--fp8", "--int8", "--fp16", "--best"} & set(trtexec)
    exec(scale[2], {})
    exec(lower[2], {})
    options = dict(word.partition("=")[::2] for word in trtexec[1:])
    written = onnx.load(options["--onnx"], load_external_data=False)
    assert any(node.op_type == "QuantizeLinear" for node in written.graph.node)
    assert clear[:2] == ["rm", "-rf"]
    folder = Path(options["--onnx"]).parent
    assert {f.name for f in folder.iterdir()} == {Path(name).name for name in clear[2:]}
    (made,) = tmp_path.glob("trtexec/*/scales.safetensors")
    assert str(made) in other[2]
    for name in clear[2:]:  # the links to the bundle's weights
        for path in [*Path(name).glob("*"), Path(name)]:
            path.unlink() if path.is_file() else path.rmdir()


def test_random_weights_end_a_command_with_what_to_do(
    world: gpu_double.World, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    argv = ["compile", "--backend", "trt:precision=int8", "--model", str(tiny_bundle.path)]
    assert shell(main, argv) == 2
    said = capsys.readouterr().err
    assert "good for timing and say nothing of an image" in said
    assert "--random-weights" in said
    assert json.dumps(probe.OLDEST_FOR["fp8"]) == "[8, 9]"
