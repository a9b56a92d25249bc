"""INT8 and 4-bit weights of the CPU backend: what is compiled, what is refused, what is drawn."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from filelock import FileLock

from backends import ort
from backends.__main__ import main as backends_main
from backends.artifacts.cache import ArtifactCache
from backends.base import Artifact, BackendError, Shapes, UnsupportedError, artifact_key
from backends.check.gate import GATES, RANDOM_WORDS, gate_for, image_distance
from backends.check.parity import record_name, report
from backends.commands.image import main as generate_main
from backends.commands.parity import main as parity_main
from backends.load import load_pipeline
from backends.onnxrt.operators import may_multiply_bf16
from backends.quantised.schemes import RECORD
from backends.registry import parse_backend, with_precision
from bench.sweep import main as sweep_main
from core.errors import PreconditionError
from core.files import ROOT
from export.__main__ import main as export_main
from export.bundle import Bundle

TEACHER = ROOT / "models" / "shapes-teacher"
AVX2 = "x86_64 avx2 fma"


def compiled(bundle: Bundle, part: str, text: str) -> Artifact:
    return parse_backend(text).compile(bundle, part, Shapes(1, *bundle.size))


def operators(artifact: Artifact) -> Counter[str]:
    assert artifact.path is not None
    graph = onnx.load(artifact.path / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def record(artifact: Artifact) -> dict[str, Any]:
    assert artifact.path is not None
    found: dict[str, Any] = json.loads((artifact.path / RECORD).read_text())
    return found


def has_own_products() -> bool:
    return parse_backend("ort:storage=int8").options["products"] == "linear"


def key(text: str, bundle: Bundle, part: str = "unet") -> str:
    return artifact_key(parse_backend(text), bundle, part, Shapes(1, *bundle.size))


def test_every_large_product_is_int8_and_shared_inputs_are_quantised_once(
    tiny_bundle: Bundle,
) -> None:
    plain, small = (
        operators(compiled(tiny_bundle, "text_encoder", text))
        for text in ("ort", "ort:precision=int8")
    )
    found = record(compiled(tiny_bundle, "text_encoder", "ort:precision=int8"))
    layers = plain["MatMul"] + plain["Gemm"]
    assert len(found["layers"]) == found["quantised"] == layers == 12
    assert small["MatMulIntegerToFloat"] + small["DynamicQuantizeMatMul"] == layers
    assert not small["MatMul"] + small["Gemm"]
    assert small["DynamicQuantizeLinear"] == 2, "one for Q, K and V of each of two blocks"
    assert small["MatMulIntegerToFloat"] == 6


def test_the_record_says_what_was_left_out(tiny_bundle: Bundle) -> None:
    """With a bound among the layers' errors: some on either side of it."""
    all_of = record(compiled(tiny_bundle, "text_encoder", "ort:precision=int8"))
    errors = sorted(layer["error"] for layer in all_of["layers"].values())
    assert errors[0] > 0
    assert errors[-1] < all_of["scheme"]["bound"] == 0.05
    bound = (errors[3] + errors[4]) / 2
    text = f"ort:precision=int8,bound={bound:.6f}"
    artifact = compiled(tiny_bundle, "text_encoder", text)
    found = record(artifact)
    assert found["quantised"] == 4
    assert found["left_out"] == sorted(
        name for name, layer in found["layers"].items() if layer["error"] > bound
    )
    made = operators(artifact)
    assert made["MatMulIntegerToFloat"] + made["DynamicQuantizeMatMul"] == 4
    assert made["MatMul"] + made["Gemm"] == 8
    assert "4 of 12 layers" in parse_backend(text).remark(artifact)
    assert f"8 stay in FP32, beyond {bound:g}" in parse_backend(text).remark(artifact)


def test_weights_in_blocks(tiny_bundle: Bundle) -> None:
    artifact = compiled(tiny_bundle, "text_encoder", "ort:storage=int4,block=16")
    assert record(artifact)["scheme"]["bits"] == 4
    assert operators(artifact)["MatMulNBits"] == 12
    own = operators(compiled(tiny_bundle, "text_encoder", "ort:storage=int8"))
    plain = operators(compiled(tiny_bundle, "text_encoder", "ort:storage=int8,products=op"))
    assert own["LinearBytes"] + own["MatMulNBits"] == plain["MatMulNBits"] == 12
    assert bool(own["LinearBytes"]) == has_own_products()
    for text, storage in (("ort:storage=int4", "int4"), ("ort:storage=int8", "int8")):
        backend = parse_backend(text)
        assert (backend.precision(tiny_bundle), backend.storage(tiny_bundle)) == ("fp32", storage)


REST = "precision=int8,rest=bf16"
SLOW = [
    pytest.param(options, marks=pytest.mark.slow)
    for options in (
        "precision=int8,conv=int8", "storage=int4", "storage=int8,block=128", REST,
    )
]  # fmt: skip


@pytest.mark.parametrize("options", ["precision=int8", *SLOW])
def test_images_pass_the_gate(options: str, tiny_bundle: Bundle) -> None:
    """Beside others too, with which an image shares the scales of its activations."""
    if options == REST and not may_multiply_bf16():
        pytest.skip("this CPU has no products of BF16")
    references = tiny_bundle.references()
    assert references is not None
    with load_pipeline(str(tiny_bundle.path), f"ort:{options}", "taesd") as pipeline:
        backend = pipeline.backend
        gate = gate_for(
            backend.storage(tiny_bundle), backend.precision(tiny_bundle), tiny_bundle.weights
        )
        prompts = [references.prompt, "a large blue star", ""]
        alone = pipeline(prompts[:1], steps=2, seed=references.seed).images[0]
        beside = pipeline(prompts, steps=2, seed=references.seed).images[0]
    reference = references.images["taesd", 2]
    assert image_distance(alone, reference).passes(gate)
    assert image_distance(beside, reference).passes(gate)
    assert image_distance(alone, reference).psnr_db < 100, "it is not the FP32 graph that ran"


def test_the_key_holds_what_the_integers_depend_on(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        "ort",
        "ort:precision=int8",
        "ort:precision=int8,bound=0.01",
        "ort:precision=int8,conv=int8",
        "ort:storage=int8",
        *(["ort:storage=int8,products=op"] if has_own_products() else []),
        "ort:storage=int4",
        "ort:storage=int4,block=64",
    ]
    keys = [key(text, tiny_bundle) for text in texts]
    assert len(set(keys)) == len(keys)
    assert key("ort:precision=int8,threads=1", tiny_bundle) == keys[1]
    # Layers are measured on an image of the whole bundle: another tokenizer, other errors.
    other = Bundle(tiny_bundle.path, json.loads(json.dumps(tiny_bundle.manifest)))
    other.manifest["files"]["tokenizer/tokenizer.json"]["sha256"] = "0" * 64
    assert key("ort", other) == keys[0]
    assert key("ort:precision=int8", other) != keys[1]
    monkeypatch.setattr(ort, "isa", lambda: AVX2)
    assert key("ort:precision=int8", tiny_bundle) not in keys
    scheme = parse_backend("ort:precision=int8").scheme  # type: ignore[attr-defined]
    assert scheme.bits == 7


def test_a_cpu_without_avx2_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "isa", lambda: "x86_64 sse4_2")
    found = parse_backend("ort:precision=int8").probe()
    assert not found.usable
    assert "avx2" in found.why
    assert parse_backend("ort").probe().usable


def test_estimates_follow_the_weights(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, small = (parse_backend(text) for text in ("ort", "ort:precision=int8"))
    assert isinstance(plain, ort.OrtBackend)
    assert isinstance(small, ort.OrtBackend)
    part = "text_encoder"
    artifact = compiled(tiny_bundle, part, "ort:precision=int8")
    assert artifact.path is not None
    # The smallest weights, and operators and names, are in the graph.
    written = sum(file.stat().st_size for file in artifact.path.glob("model.onnx*"))
    assert written == pytest.approx(small._weight_bytes(tiny_bundle, part), rel=0.15)
    assert small._weight_bytes(tiny_bundle, part) < 0.8 * plain._weight_bytes(tiny_bundle, part)
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    for what in ("disk", "memory"):
        with monkeypatch.context() as patch:
            patch.setattr(ort.OrtBackend, f"{what}_need", lambda *_: 10**18)
            with pytest.raises(PreconditionError, match=rf"1000000000.0 GB of {what}"):
                small.compile(tiny_bundle, part, Shapes(1, *tiny_bundle.size))


def test_a_compile_that_fails_while_it_records_leaves_nothing(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The UNet itself is sound; the image that its layers are measured on cannot be drawn."""
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    bundle = Bundle.open(Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy")))
    data = bundle.parts["text_encoder"].data
    assert data is not None
    data.write_bytes(bytes(data.stat().st_size - 64))
    with pytest.raises(BackendError, match="compiling unet for onnxruntime failed"):
        compiled(bundle, "unet", "ort:precision=int8")
    cache = ArtifactCache()
    assert cache.entries() == []
    assert not [path for path in cache.root.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ort:precision=int4", "not a value"),
        ("ort:precision=int8,storage=int4", "does not go with storage=int4"),
        ("ort:block=64", "block=64 has nothing to act on"),
        ("ort:precision=int8,block=64", "block=64 has nothing to act on"),
        ("ort:conv=int8", "conv=int8 has nothing to act on"),
        ("ort:storage=int8,conv=int8", "conv=int8 has nothing to act on"),
        ("ort:bound=0.1", "bound=0.1 has nothing to act on"),
        ("ort:precision=int8,bound=many", "bound=many is no bound"),
        ("ort:precision=int8,bound=-1", "bound=-1 is no bound"),
        ("ort:precision=int8,bound=nan", "bound=nan is no bound"),
        ("ort:graph=canonical,precision=int8", "takes no option precision"),
    ],
)
def test_options_that_do_not_go_together_are_refused(text: str, words: str) -> None:
    with pytest.raises(PreconditionError, match=words):
        parse_backend(text)


@pytest.mark.parametrize(
    ("text", "precision", "result"),
    [
        ("ort", "int8", "ort:precision=int8"),
        ("ort:threads=1", "int8", "ort:threads=1,precision=int8"),
        ("ort:precision=int8", "int8", "ort:precision=int8"),
        ("ort", "fp32", "ort"),
        ("ort", None, "ort"),
        ("torch", None, "torch"),
        ("openvino:threads=2", "bf16", "openvino:threads=2,precision=bf16"),
        ("trt", "fp8", "trt:precision=fp8"),
    ],
)
def test_a_precision_becomes_an_option(text: str, precision: str | None, result: str) -> None:
    assert with_precision(text, precision) == result


@pytest.mark.parametrize(
    ("text", "precision", "what", "nearest"),
    [
        ("torch", "int8", "backend torch has no precision int8", "--backend ort:precision=int8"),
        ("openvino", "int8", "openvino has no precision int8", "--backend ort:precision=int8"),
        ("torch", "bf16", "backend torch has no precision bf16", "--backend ort:precision=bf16"),
        ("ort", "fp8", "ort has no precision fp8", "--backend trt:precision=fp8"),
        ("ort:precision=int8", "fp32", "contradicts", "drop one"),
    ],
)
def test_a_precision_that_a_backend_lacks_is_refused(
    text: str, precision: str, what: str, nearest: str
) -> None:
    with pytest.raises(UnsupportedError, match=what) as caught:
        with_precision(text, precision)
    assert nearest in caught.value.next
    assert caught.value.exit_code == 2


def test_every_command_takes_a_precision(
    tiny_bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.run.runner.survey", lambda _: None)  # seconds, of no matter here
    model = ["--model", str(tiny_bundle.path)]
    sweep = [*model, "--precision", "int8", "--steps", "1", "--decoder", "taesd", "--dry-run"]
    assert sweep_main([*sweep, "--out", str(tmp_path), "--quick"]) == 0
    assert "ort:precision=int8 taesd batch 1 steps 1, storage int8, precision int8" in (
        capsys.readouterr().out
    )
    for main, argv in (
        (sweep_main, [*sweep, "--backend", "ort", "--backend", "null"]),
        (backends_main, ["compile", *model, "--precision", "int8", "--backend", "null"]),
        (parity_main, [*model, "--precision", "int8", "--backend", "null"]),
        (generate_main, ["a star", *model, "--precision", "int8", "--backend", "null"]),
    ):
        with pytest.raises(UnsupportedError, match="backend null has no precision int8"):
            main(argv)  # type: ignore[operator]


def test_parity_of_integers_is_kept_apart_and_says_what_random_weights_show(
    tiny_bundle: Bundle,
) -> None:
    assert record_name(tiny_bundle, "ort") == "parity.json"
    assert record_name(tiny_bundle, "ort:precision=int8") == "parity-int8.json"
    found = json.loads((tiny_bundle.path / "parity.json").read_text())
    assert RANDOM_WORDS not in report(found)
    assert RANDOM_WORDS in report(found | {"storage": "int8", "precision": "int8"})
    assert RANDOM_WORDS not in report(found | {"storage": "int8", "weights": "folder"})


@pytest.fixture(scope="session")
def teacher() -> Bundle:
    """shapes-teacher, exported once and kept below build/test."""
    target = Path(os.environ.get("ADDBENCH_TEST_BUNDLES") or ROOT / "build" / "test") / "teacher"
    target.parent.mkdir(parents=True, exist_ok=True)
    argv = ["--model", str(TEACHER), "--out", str(target), "--no-parity"]
    with FileLock(target.with_suffix(".lock")):
        assert export_main(argv) == 0
    return Bundle.open(target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "isa", "bits"),
    [
        ("precision=int8", None, None),
        ("precision=int8", AVX2, 7),
        ("precision=int8,conv=int8", None, None),
        ("storage=int4", None, 4),
    ],
)
def test_a_trained_model_draws_the_same_images(
    options: str,
    isa: str | None,
    bits: int | None,
    teacher: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trained weights: what random ones cannot show. 25 steps with guidance, against FP32."""
    prompts = ["a large red circle on the left of a black background",
               "a small blue star above a large white square on a gray background"]  # fmt: skip
    images = {}
    for text in ("ort", f"ort:{options}"):
        if isa and options in text:
            monkeypatch.setattr(ort, "isa", lambda: isa)
        with load_pipeline(str(teacher.path), text, "vae", guidance=3.0) as pipeline:
            images[text] = [
                pipeline([prompt], steps=25, seed=seed).images[0]
                for seed, prompt in enumerate(prompts)
            ]
            backend, found = pipeline.backend, pipeline.artifacts["unet"]
    assert bits in (None, record(found)["scheme"]["bits"])
    assert not record(found)["left_out"]
    gate = gate_for(backend.storage(teacher), backend.precision(teacher), teacher.weights)
    for small, plain in zip(images[f"ort:{options}"], images["ort"], strict=True):
        assert image_distance(small, plain).passes(gate), (options, image_distance(small, plain))


@pytest.mark.parametrize("weights", ["hub", "folder", "random"])
def test_the_gate_is_that_of_the_integers(weights: str) -> None:
    assert gate_for("int8", "int8", weights) == GATES["int8"]
    assert gate_for("int4", "fp32", weights) == GATES["int4"]
