"""Scales and Q/DQ pairs. modelopt is its test double here (tests/doubles/modelopt_standin), but
for one slow test, which runs the real one where it is installed."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from core.errors import AddbenchError, PreconditionError
from core.files import ROOT, sha256_file
from export.bundle import Bundle
from export.lower import CPU, Profile, lower
from export.quantize.calibration import CalibrationOrigin, save
from export.quantize.modelopt import calibration_graph, make_scales, modelopt_version
from export.quantize.qdq import (
    SCALES,
    SCHEMES,
    LayerScales,
    insert,
    read_scales,
    scheme_of,
    write_scales,
)

STANDIN = ROOT / "tests" / "doubles" / "modelopt_standin"
ORIGIN = CalibrationOrigin(
    "m", "folder", "fp16", "0" * 64, ("p",), (0,), 1, "Euler", 0.0, 1, "ort", {}
)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for nvidia-modelopt in this process, whether that is installed or not."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(STANDIN)


def small_graph(folder: Path) -> Path:
    """Canonical, FP16: a convolution and two linear layers that share an input, and a Gemm."""
    rng = np.random.default_rng(3)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((0.2 * rng.standard_normal(shape)).astype(np.float16), name)

    nodes = [
        helper.make_node("Conv", ["sample", "conv"], ["mixed"], "node_1", kernel_shape=[1, 1]),
        helper.make_node("Reshape", ["mixed", "shape"], ["tokens"], "node_2"),
        helper.make_node("MatMul", ["tokens", "query"], ["q"], "node_1_1"),
        helper.make_node("MatMul", ["tokens", "key"], ["k"], "node_1_2"),
        helper.make_node("Gemm", ["embedding", "time"], ["e"], "node_3"),
        helper.make_node("Add", ["q", "k"], ["sum"], "node_4"),
        helper.make_node("Add", ["sum", "e"], ["out_sample"], "node_5"),
    ]

    def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)

    graph = helper.make_graph(
        nodes,
        "small",
        [value("sample", "batch", 16, 2, 2), value("embedding", "batch", 16)],
        [value("out_sample", "batch", 4, 16)],
        [
            weight("conv", 16, 16, 1, 1),
            weight("query", 16, 16),
            weight("key", 16, 16),
            weight("time", 16, 16),
            numpy_helper.from_array(np.array([-1, 4, 16], np.int64), "shape"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path = folder / "canonical" / "model.onnx"
    path.parent.mkdir()
    onnx.save(
        model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=64
    )
    return path


def samples(folder: Path, count: int = 3, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "sample": torch.randn(count, 16, 2, 2, generator=generator).half(),
        "embedding": torch.randn(count, 16, generator=generator).half(),
    }
    save(folder / "samples.safetensors", ORIGIN, tensors)
    return folder / "samples.safetensors"


def run(graph: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = 1
    made.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(graph), made, ["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


def rounded(x: np.ndarray, scale: np.ndarray, dtype: str) -> np.ndarray:
    """What a Q/DQ pair makes of `x`, by numpy and ml_dtypes: independent of onnxruntime."""
    ratio = x.astype(np.float32) / scale
    if dtype == "int8":
        return np.clip(np.rint(ratio), -128, 127) * scale
    low = np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return low.astype(np.float32) * scale


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@settings(max_examples=20)
@given(seed=st.integers(0, 99), spread=st.floats(0.1, 100))
def test_a_layer_computes_with_rounded_numbers(scheme: object, seed: int, spread: float) -> None:
    """The inserted graph in onnxruntime against the same arithmetic written in numpy."""
    import tempfile

    dtype = scheme.dtype  # type: ignore[attr-defined]
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        graph = small_graph(folder)
        stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(graph).graph.initializer}
        feed = {
            "sample": (spread * rng.standard_normal((1, 16, 2, 2))).astype(np.float32),
            "embedding": np.zeros((1, 16), np.float32),
        }
        most = 127 if dtype == "int8" else 448
        activation = np.float16(abs(feed["sample"]).max() / most)
        weight = (abs(stored["conv"]).max((1, 2, 3)) / most).astype(np.float16)
        layers = {"node_1": LayerScales(float(activation), weight, 0)}
        facts = {"scheme": scheme.name, "graph": sha256_file(graph)}  # type: ignore[attr-defined]
        write_scales(folder / SCALES, layers, facts)
        insert(graph, folder / SCALES, folder / "pairs" / "model.onnx")
        lower(folder / "pairs" / "model.onnx", CPU, folder / "model.onnx")
        got = run(folder / "model.onnx", feed)
    x = rounded(feed["sample"], np.float32(activation), dtype)
    w = rounded(stored["conv"], weight.astype(np.float32)[:, None, None, None], dtype)
    mixed = np.einsum("bchw,oc->bohw", x, w[:, :, 0, 0]).reshape(1, 4, 16)
    expected = mixed @ stored["query"].astype(np.float32) + mixed @ stored["key"].astype(np.float32)
    assert np.allclose(got, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_are_those_of_the_samples_and_the_weights(
    scheme: str, double: None, tmp_path: Path
) -> None:
    graph, recorded = small_graph(tmp_path), samples(tmp_path)
    make_scales(graph, scheme, recorded, tmp_path)
    layers, facts = read_scales(tmp_path / SCALES)
    assert set(layers) == {"node_1", "node_1_1", "node_1_2"}  # not the Gemm; by canonical names
    assert {name: layer.axis for name, layer in layers.items()} == {
        "node_1": 0, "node_1_1": 1, "node_1_2": 1,
    }  # fmt: skip
    assert facts["samples"] == 3
    assert facts["modelopt"] == modelopt_version() == "0.0"
    factor = {"qdq-int8": 1 / 127, "qdq-fp8": 448 / 127**2}[scheme]
    generator = torch.Generator().manual_seed(0)
    most = float(torch.randn(3, 16, 2, 2, generator=generator).half().float().abs().max())
    assert layers["node_1"].activation == pytest.approx(most * factor, rel=1e-5)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(graph).graph.initializer}
    assert np.allclose(layers["node_1_2"].weight, abs(stored["key"]).max(0) * factor, rtol=1e-3)
    assert not list(tmp_path.glob(".modelopt-*"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_graph_stays_canonical_and_its_weights_where_they_are(
    scheme: str, double: None, tmp_path: Path
) -> None:
    graph = small_graph(tmp_path)
    make_scales(graph, scheme, samples(tmp_path), tmp_path)
    out = tmp_path / "pairs" / "model.onnx"
    insert(graph, tmp_path / SCALES, out)
    assert (out.parent / "model.onnx.data").samefile(graph.with_name("model.onnx.data"))
    model = onnx.load(out, load_external_data=False)
    assert model.opset_import[0].version == 23
    counts = Counter(node.op_type for node in model.graph.node)
    # Three weights; the convolution's input; the tokens once for the two layers that share them.
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 5
    stored = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = (stored[name] for name in node.input[1:])
            assert scale.data_type == TensorProto.FLOAT16  # as what it scales: strongly typed
            expected = {"qdq-int8": TensorProto.INT8, "qdq-fp8": TensorProto.FLOAT8E4M3FN}
            assert zero.data_type == expected[scheme]
            assert not any(zero.raw_data)
            assert numpy_helper.to_array(scale).min() > 0


@pytest.mark.parametrize("opset", [19, 20, 21, 23])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_older_forms_of_the_graph_compute_the_same(
    opset: int, scheme: str, double: None, tmp_path: Path
) -> None:
    """TensorRT 10.1 reads opset 20. FP16 throughout: onnxruntime computes it in FP32."""
    graph = small_graph(tmp_path)
    make_scales(graph, scheme, samples(tmp_path), tmp_path)
    insert(graph, tmp_path / SCALES, tmp_path / "pairs" / "model.onnx")
    lower(
        tmp_path / "pairs" / "model.onnx",
        Profile("old", opset=opset, attention="matmul", norms="decomposed", batch=1),
        tmp_path / "model.onnx",
    )
    rng = np.random.default_rng(1)
    feed = {
        "sample": rng.standard_normal((1, 16, 2, 2)).astype(np.float16),
        "embedding": rng.standard_normal((1, 16)).astype(np.float16),
    }
    lower(graph, Profile("as it is", batch=1), tmp_path / "plain.onnx")
    got, plain = run(tmp_path / "model.onnx", feed), run(tmp_path / "plain.onnx", feed)
    error = np.linalg.norm(got - plain) / np.linalg.norm(plain)
    assert 1e-3 < error < 0.1  # rounded to 8 bits, and no more than that


def test_names_of_the_calibration_graph_are_no_prefix_of_another(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """modelopt takes names as patterns of a name's start: `node_1` would take `node_1_1` too."""
    names = calibration_graph(tiny_bundle.parts["unet"].graph, tmp_path / "fp32.onnx")
    assert len({len(name) for name in names}) == 1
    model = onnx.load(tmp_path / "fp32.onnx", load_external_data=False)
    assert {node.name for node in model.graph.node} == set(names)
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert TensorProto.FLOAT16 not in types
    assert {path.name for path in tmp_path.iterdir()} == {"fp32.onnx", "fp32.onnx.data"}
    large = [name for name, wanted in names.values() if wanted]
    canonical = {node.name: node for node in ir.load(tiny_bundle.parts["unet"].graph).graph}
    weights = [canonical[name].inputs[1].name or "" for name in large]
    assert {canonical[name].op_type for name in large} == {"Conv", "MatMul"}
    assert not any("conv_in" in name or "conv_shortcut" in name for name in weights)
    everything = sum(node.op_type in ("Conv", "MatMul") for node in canonical.values())
    assert 0.7 * everything < len(large) < everything


def test_scales_of_another_graph_are_refused(double: None, tmp_path: Path) -> None:
    graph = small_graph(tmp_path)
    make_scales(graph, "qdq-int8", samples(tmp_path), tmp_path)
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[0].doc_string = "changed"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(PreconditionError, match="are not of"):
        insert(graph, tmp_path / SCALES, tmp_path / "pairs" / "model.onnx")


@pytest.mark.parametrize(
    ("failure", "words"),
    [("raise", "RuntimeError: the double was told to fail"), ("nothing", "quantised no layer")],
)
def test_what_modelopt_does_wrong_is_said(
    failure: str, words: str, double: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELOPT_DOUBLE_FAILS", failure)
    graph, recorded = small_graph(tmp_path), samples(tmp_path)
    with pytest.raises(AddbenchError) as caught:
        make_scales(graph, "qdq-fp8", recorded, tmp_path)
    assert words in str(caught.value)
    assert caught.value.next
    assert not (tmp_path / SCALES).exists()
    assert not list(tmp_path.glob(".modelopt-*"))


def test_what_is_missing_for_modelopt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("export.quantize.modelopt.version", nothing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lief" else 1)
    with pytest.raises(PreconditionError) as caught:
        modelopt_version()
    assert caught.value.what == "nvidia-modelopt and lief are missing"
    assert "[cpu,modelopt]" in caught.value.next


def test_a_scheme_for_each_precision() -> None:
    assert {p: scheme_of(p).name for p in ("fp8", "int8")} == {"fp8": "qdq-fp8", "int8": "qdq-int8"}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_double_gives_what_modelopt_gives(
    scheme: str, tmp_path: Path, tiny_bundle: Bundle
) -> None:
    """Both on the tiny UNet, each in a process of its own; skipped without nvidia-modelopt."""
    import subprocess

    try:
        found = modelopt_version()
    except PreconditionError as error:
        pytest.skip(f"{error.what}; {error.next}")
    info = tiny_bundle.parts["unet"]
    generator = torch.Generator().manual_seed(0)
    shapes = {s.name: [2, *(d for d in s.shape[1:] if isinstance(d, int))] for s in info.inputs}
    save(tmp_path / "samples.safetensors", ORIGIN, {
        spec.name: torch.rand(shapes[spec.name], generator=generator).to(
            getattr(torch, spec.dtype)
        )
        for spec in info.inputs
    })  # fmt: skip
    layers = {}
    for name, paths in (("real", []), ("double", [str(STANDIN)])):
        (tmp_path / name).mkdir()
        code = (
            f"import sys; sys.path[:0] = {[*paths, str(ROOT)]}; from pathlib import Path;"
            f" from export.quantize.modelopt import make_scales;"
            f" make_scales(Path({str(info.graph)!r}),"
            f" {scheme!r}, Path({str(tmp_path / 'samples.safetensors')!r}),"
            f" Path({str(tmp_path / name)!r}))"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
        layers[name], facts = read_scales(tmp_path / name / SCALES)
        assert facts["modelopt"] == ("0.0" if paths else found)
    for name, layer in layers["real"].items():
        other = layers["double"][name]
        assert layer.activation == pytest.approx(other.activation, rel=1e-5)
        assert np.allclose(layer.weight, other.weight, rtol=1e-5)
        assert layer.axis == other.axis
    # It leaves out what is narrower than a tensor core's tile: the double does not.
    assert set(layers["real"]) <= set(layers["double"])
    assert len(layers["real"]) > 0.5 * len(layers["double"])
    shutil.rmtree(tmp_path / "real")
