"""Integer weights: against exact arithmetic, shared inputs, layers left out by their error."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import Arrays, model_of, needs_compiler, normal, session
from onnx import helper

from backends.quantised.recording import open_recording
from bench.run.measure import PeakMemory
from core.isa import isa
from export.lower import CPU, lower, storage
from export.quantize import Scheme, weight_bits
from export.quantize.integers import (
    approximation,
    quantise_blocks,
    quantise_columns,
    restore_blocks,
    round_activations,
)
from export.quantize.layers import Layer, find_layers, sizes
from export.quantize.measure import add_probes, relative_errors, samples
from export.quantize.rewrite import rewrite

DYNAMIC = Scheme("dynamic-int8", 8, bound=0.05)
CONVOLUTIONS = Scheme("dynamic-int8", 8, bound=0.05, convolutions=True)
INT4 = Scheme("weight-int4", 4, bound=0.15, block=32)
VNNI, AVX2 = "x86_64 avx2 fma avx512f avx512_vnni", "x86_64 avx2 fma"


class Place:
    """Where a test's graphs lie, canonical, lowered and with integers."""

    def __init__(self, folder: Path) -> None:
        self.canonical, self.lowered, self.probes, self.small = (
            folder / name / "model.onnx" for name in ("canonical", "lowered", "probes", "small")
        )

    def lower(self, model: onnx.ModelProto) -> Path:
        self.canonical.parent.mkdir()
        for node in model.graph.node:
            node.name = f"node_{node.output[0]}"  # as the exporter does
        onnx.save(
            model, self.canonical, save_as_external_data=True, location="w", size_threshold=128
        )
        lower(self.canonical, CPU, self.lowered)
        return self.lowered

    def rewrite(
        self, model: onnx.ModelProto, scheme: Scheme, own: bool = False
    ) -> onnxruntime.InferenceSession:
        """A session of `model` with every layer quantised."""
        names = [layer.name for layer in find_layers(storage.reopen(self.lower(model)), scheme)]
        rewrite(self.lowered, scheme, names, self.small, own=own)
        return session(self.small, own)

    def operators(self) -> Counter[str]:
        return operators(self.small)

    def record(self, inputs: Arrays, scheme: Scheme) -> tuple[list[Layer], Arrays]:
        """The layers of the lowered graph, and what its probes give: as a compile records."""
        model = storage.reopen(self.lowered)
        layers = find_layers(model, scheme)
        add_probes(model, layers)
        storage.save(model, self.probes)
        recording = open_recording(self.probes, {"threads": 1, "spin": "in-call"})
        names = [output.name for output in recording.get_outputs()]
        return layers, dict(zip(names, recording.run(None, inputs), strict=True))

    def errors(self, model: onnx.ModelProto, inputs: Arrays, scheme: Scheme) -> dict[str, float]:
        self.lower(model)
        layers, outputs = self.record(inputs, scheme)
        return relative_errors(layers, [samples(outputs, layers)], scheme)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def operators(file: Path) -> Counter[str]:
    graph = onnx.load(file, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def linear(
    depth: int, columns: int, bias: bool = False, seed: int = 1, dtype: type = np.float16
) -> tuple[list[onnx.NodeProto], Arrays]:
    """`x` times `w`, plus `b`, as torch's exporter writes a linear layer over tokens."""
    constants = {"w": normal(depth, columns, seed=seed, dtype=dtype)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["product" if bias else "y"])]
    if bias:
        constants["b"] = normal(columns, seed=seed + 1, dtype=dtype)
        nodes.append(helper.make_node("Add", ["product", "b"], ["y"]))
    return nodes, constants


def integers_of(values: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """`values` less its zero point in whole steps, and the step: DynamicQuantizeLinear's."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    step = np.float32((high - low) / 255 or 1.0)
    return np.rint(round_activations(values, low, high) / step).astype(np.int64), step


def exact(x: np.ndarray, weight: np.ndarray, bits: int) -> np.ndarray:
    """x @ weight [K, N] in integers, scaled at the end."""
    numbers, step = integers_of(x)
    columns, scale = quantise_columns(weight.astype(np.float32), bits)
    return (numbers @ columns.astype(np.int64)) * (step * scale)


@given(
    rows=st.integers(1, 9),
    depth=st.sampled_from([16, 31, 64, 200]),
    columns=st.sampled_from([16, 33]),
    bits=st.sampled_from([7, 8]),
    bias=st.booleans(),
    offset=st.sampled_from([0.0, 3.0, -5.0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25)
def test_a_product_is_that_of_its_integers(
    rows: int,
    depth: int,
    columns: int,
    bits: int,
    bias: bool,
    offset: float,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    x = normal(2, rows, depth, seed=seed, dtype=np.float16) + np.float16(offset)
    nodes, constants = linear(depth, columns, bias, seed)
    place = Place(tmp_path_factory.mktemp("product"))
    scheme = Scheme("dynamic-int8", bits, bound=1.0)
    run = place.rewrite(model_of(nodes, {"x": x}, constants=constants), scheme)
    (found,) = run.run(None, {"x": x.astype(np.float32)})
    wanted = exact(x.astype(np.float32), constants["w"], bits)
    if bias:
        wanted = wanted + constants["b"].astype(np.float32)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert place.operators() == {
        "DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 1, **({"Cast": 1} if bias else {})
    }  # fmt: skip


SATURATING = (np.ones((1, 64, 1280), np.float16), np.full((1280, 64), 1.27, np.float32))
"""All activations 255, all weights at the end of their range: each pair of products is at its
largest."""


def run_saturating(place: Place, bits: int) -> tuple[np.ndarray, np.ndarray]:
    x, weight = SATURATING
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = model_of(nodes, {"x": x.astype(np.float32)}, constants={"w": weight})
    run = place.rewrite(model, Scheme("dynamic-int8", bits, bound=1.0))
    return run.run(None, {"x": x.astype(np.float32)})[0], exact(x.astype(np.float32), weight, bits)


def test_the_kernel_is_exact_where_it_could_saturate(place: Place) -> None:
    """With the bits that this CPU's instruction sets ask for."""
    found, wanted = run_saturating(place, weight_bits(isa()))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert wanted.flat[0] == pytest.approx(1625.6)


def test_the_kernel_is_exact_with_seven_bits_anywhere(place: Place) -> None:
    found, wanted = run_saturating(place, 7)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_full_range_weights_saturate_without_dot_products(place: Place) -> None:
    found, wanted = run_saturating(place, 8)
    if weight_bits(isa()) == 8:
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        pytest.skip(f"{isa()} is exact with all 8 bits: that others saturate cannot be shown here")
    assert found.flat[0] == pytest.approx(822, rel=0.01)


def pairwise(numbers: np.ndarray, weights: np.ndarray) -> int:
    """Double of x86's kernel without dot-product instructions: one row times one column, pairs of
    products added with 16 bits (vpmaddubsw)."""
    products = (numbers.astype(np.int64) * weights).reshape(-1, 2).sum(axis=1)
    return int(np.clip(products, -(2**15), 2**15 - 1).sum())


@pytest.mark.parametrize(("bits", "result"), [(8, 822.4), (7, 1625.6)])
def test_why_weights_have_seven_bits(bits: int, result: float) -> None:
    x, weight = SATURATING
    numbers, step = integers_of(x[0, 0].astype(np.float32))
    columns, scale = quantise_columns(weight, bits)
    found = pairwise(numbers, columns[:, 0]) * step * scale[0]
    assert found == pytest.approx(result, rel=1e-3)


@pytest.mark.parametrize(
    ("isa", "bits"),
    [
        (AVX2, 7),
        (VNNI, 8),
        ("x86_64 avx2 fma avx_vnni", 8),
        ("x86_64 avx2 fma avx512f", 7),
        ("x86_64 avx2 fma avx512f avx_vnni", 7),  # its AVX-512 kernels go first
        ("x86_64 avx2 fma avx512f amx_tile amx_int8", 8),
        ("x86_64 avx2 fma avx512f amx_tile", 7),
        ("x86_64", 7),
        ("aarch64", 8),
    ],
)
def test_the_bits_follow_from_the_instruction_sets(isa: str, bits: int) -> None:
    assert weight_bits(isa) == bits


@given(depth=st.integers(1, 80), bits=st.sampled_from([7, 8]), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_columns_have_a_scale_each(depth: int, bits: int, seed: int) -> None:
    weight = normal(depth, 5, seed=seed) * np.float32([1e-4, 1.0, 30.0, 0.0, 1e4])
    numbers, scale = quantise_columns(weight, bits)
    largest = 2 ** (bits - 1) - 1
    assert np.abs(numbers).max(axis=0).tolist() == [largest, largest, largest, 0, largest]
    assert np.all(np.abs(numbers * scale - weight) <= scale * 0.501)


@given(
    depth=st.sampled_from([16, 40, 64, 100]),
    block=st.sampled_from([16, 32, 64]),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_blocks_have_a_scale_each(depth: int, block: int, bits: int, seed: int) -> None:
    weight = normal(depth, 6, seed=seed)
    numbers, scales = quantise_blocks(weight, bits, block)
    assert numbers.shape == (6, -(-depth // block), block * bits // 8)
    restored = restore_blocks(numbers, scales, bits, depth)
    steps = np.repeat(np.abs(scales), block, axis=1)[:, :depth].T
    # Half a step, but a whole one at the end of the range that has a step less.
    assert np.all(np.abs(restored - weight) <= steps * 1.001)


@pytest.mark.parametrize(
    ("bits", "own"), [(4, False), (8, False), pytest.param(8, True, marks=needs_compiler)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_are_what_the_kernel_reads(bits: int, own: bool, bias: bool, place: Place) -> None:
    x = normal(1, 7, 100, seed=3, dtype=np.float16)
    nodes, constants = linear(100, 24, bias)
    scheme = Scheme("weight-int4" if bits == 4 else "weight-int8", bits, bound=1.0, block=32)
    run = place.rewrite(model_of(nodes, {"x": x}, constants=constants), scheme, own)
    (found,) = run.run(None, {"x": x.astype(np.float32)})
    wanted = x.astype(np.float32) @ approximation(constants["w"].astype(np.float32), bits, 32)
    wanted = wanted + constants["b"].astype(np.float32) if bias else wanted
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert place.operators()["LinearBytes" if own else "MatMulNBits"] == 1
    assert not place.operators()["MatMul"]


def test_gemm_with_a_transposed_weight(place: Place) -> None:
    x = normal(3, 40, seed=3, dtype=np.float16)
    constants = {
        "w": normal(24, 40, seed=1, dtype=np.float16), "b": normal(24, dtype=np.float16)
    }  # fmt: skip
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    run = place.rewrite(model_of([node], {"x": x}, constants=constants), DYNAMIC)
    (found,) = run.run(None, {"x": x.astype(np.float32)})
    wanted = exact(x.astype(np.float32), constants["w"].T, 8) + constants["b"].astype(np.float32)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "stride", "pads"),
    [(3, 1, [1, 1, 1, 1]), (3, 2, [0, 0, 1, 1]), (3, 2, [1, 1, 1, 1]), (1, 1, [0] * 4)],
)
def test_a_convolution_is_a_product_over_its_windows(
    kernel: int, stride: int, pads: list[int], place: Place
) -> None:
    """Against the operator ConvInteger on the same integers, scaled by channel."""
    x = normal(2, 6, 9, 8, seed=3, dtype=np.float16) + np.float16(0.5)
    constants = {"w": normal(10, 6, kernel, kernel, seed=1, dtype=np.float16)}
    attributes = {"pads": pads, "strides": [stride, stride]}
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    scheme = Scheme("dynamic-int8", 8, bound=1.0, convolutions=True, smallest=0)
    run = place.rewrite(model_of([node], {"x": x}, constants=constants), scheme)
    (found,) = run.run(None, {"x": x.astype(np.float32)})
    rows = constants["w"].astype(np.float32).reshape(10, -1).T
    columns, scale = quantise_columns(rows, 8)
    wide = x.astype(np.float32)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["n", "s", "z"]),
        helper.make_node("ConvInteger", ["n", "w", "z"], ["i"], **attributes),
        helper.make_node("Cast", ["i"], ["f"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["g"]),
        helper.make_node("Mul", ["g", "scale"], ["y"]),
    ]
    weights = {
        "w": np.ascontiguousarray(columns.T).reshape(10, 6, kernel, kernel),
        "scale": scale.reshape(10, 1, 1),
    }
    plain = session(model_of(nodes, {"x": wide}, constants=weights))
    np.testing.assert_allclose(found, plain.run(None, {"x": wide})[0], rtol=1e-4, atol=1e-4)
    assert not place.operators()["Conv"]


def chain() -> tuple[list[onnx.NodeProto], Arrays, Arrays]:
    """Q, K and V of `x`, a product of Q, one of V's: two layers in a row, one input for three."""
    constants = {name: normal(32, 32, seed=n, dtype=np.float16) for n, name in enumerate("qkvop")}
    nodes = [helper.make_node("MatMul", ["x", name], [f"{name}_out"]) for name in "qkv"]
    nodes.append(helper.make_node("MatMul", ["q_out", "o"], ["o_out"]))
    nodes.append(helper.make_node("MatMul", ["v_out", "p"], ["p_out"]))
    nodes.append(helper.make_node("Sum", ["o_out", "p_out", "k_out"], ["y"]))
    return nodes, {"x": normal(1, 20, 32, seed=8, dtype=np.float16)}, constants


def optimised(source: Path, target: Path) -> Counter[str]:
    """Operators after onnxruntime's own passes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.intra_op_num_threads = 1
    onnxruntime.InferenceSession(str(source), options, ["CPUExecutionProvider"])
    return operators(target)


def test_a_shared_input_is_quantised_once(place: Place, tmp_path: Path) -> None:
    nodes, inputs, constants = chain()
    place.rewrite(model_of(nodes, inputs, constants=constants), DYNAMIC)
    found = place.operators()
    assert (found["DynamicQuantizeLinear"], found["MatMulIntegerToFloat"]) == (3, 5)
    # onnxruntime makes one operator of a product and a quantisation that nothing else reads.
    after = optimised(place.small, tmp_path / "optimised.onnx")
    assert (after["DynamicQuantizeLinear"], after["MatMulIntegerToFloat"]) == (1, 3)
    assert after["DynamicQuantizeMatMul"] == 2


def test_layers_in_a_row_follow_each_other(place: Place) -> None:
    nodes, inputs, constants = chain()
    run = place.rewrite(model_of(nodes, inputs, constants=constants), DYNAMIC)
    wide = {name: array.astype(np.float32) for name, array in (inputs | constants).items()}
    (found,) = run.run(None, {"x": wide["x"]})
    x = wide["x"]
    wanted = x @ wide["q"] @ wide["o"] + x @ wide["v"] @ wide["p"] + x @ wide["k"]
    assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


def test_what_is_no_large_constant_product_stays(place: Place) -> None:
    """Small weights, products of activations, a bias that two nodes read, a scaled Gemm."""
    x = normal(20, 32, seed=1, dtype=np.float16)
    constants = {
        "small": normal(32, 4, dtype=np.float16),
        "w": normal(32, 32, seed=2, dtype=np.float16),
        "grouped": normal(8, 1, 3, 3, seed=2, dtype=np.float16),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "small"], ["a"]),
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["b"]),
        helper.make_node("Gemm", ["x", "w"], ["c"], alpha=0.5),
        helper.make_node("Gemm", ["t", "w"], ["d"], transA=1),
        helper.make_node("Reshape", ["x", "as_image"], ["image"]),
        helper.make_node("Conv", ["image", "grouped"], ["e"], group=8),
    ]
    constants["as_image"] = np.array([1, 8, 8, 10])
    model = model_of(nodes, {"x": x}, list("abcde"), constants)
    assert not find_layers(storage.reopen(place.lower(model)), CONVOLUTIONS)


def test_a_layer_that_an_outlier_spoils_is_left_out(place: Place) -> None:
    """One value of 3000 among normal ones takes the whole range: the others round to nothing."""
    calm, wild = (normal(1, 64, 32, seed=n, dtype=np.float16) for n in (1, 2))
    wild[0, 0, 0] = 3000
    constants = {"u": normal(32, 32, seed=3, dtype=np.float16), "v": normal(32, 32, seed=4)}
    constants["v"] = constants["v"].astype(np.float16)
    nodes = [
        helper.make_node("MatMul", ["calm", "u"], ["good"]),
        helper.make_node("MatMul", ["wild", "v"], ["bad"]),
    ]
    model = model_of(nodes, {"calm": calm, "wild": wild}, ["good", "bad"], constants)
    inputs = {"calm": calm.astype(np.float32), "wild": wild.astype(np.float32)}
    errors = place.errors(model, inputs, DYNAMIC)
    assert errors["good"] < 0.02
    taken = {name for name, error in errors.items() if error <= DYNAMIC.bound}
    assert taken == {"good"}
    rewrite(place.lowered, DYNAMIC, taken, place.small)
    found = place.operators()
    assert (found["MatMulIntegerToFloat"], found["MatMul"]) == (1, 1)
    good, bad = session(place.small).run(None, inputs)
    np.testing.assert_allclose(
        bad, inputs["wild"] @ constants["v"].astype(np.float32), rtol=1e-3, atol=0.05
    )
    wanted = inputs["calm"] @ constants["u"].astype(np.float32)
    measured = float(np.linalg.norm(good - wanted) / np.linalg.norm(wanted))
    assert measured == pytest.approx(errors["good"], rel=0.2), "the error is that of the kernels"


@pytest.mark.parametrize("scheme", [CONVOLUTIONS, INT4], ids=lambda scheme: scheme.name)
def test_measured_errors_are_those_of_the_kernels(scheme: Scheme, place: Place) -> None:
    x = normal(1, 16, 10, 10, seed=3, dtype=np.float16)
    constants = {
        "c": normal(16, 16, 3, 3, seed=1, dtype=np.float16),
        "flat": np.array([0, 16, 100]),
        "w": normal(100, 48, seed=2, dtype=np.float16),
    }
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["x", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["product"]),
    ]
    model = model_of(nodes, {"x": x}, ["conv", "product"], constants)
    wide = {"x": x.astype(np.float32)}
    errors = place.errors(model, wide, scheme)
    rewrite(place.lowered, scheme, errors, place.small)
    expected = dict(zip(("conv", "product"), session(place.lowered).run(None, wide), strict=True))
    found = dict(zip(("conv", "product"), session(place.small).run(None, wide), strict=True))
    assert set(errors) == ({"conv", "product"} if scheme.convolutions else {"product"})
    for name, error in errors.items():
        difference = np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name])
        assert difference == pytest.approx(error, rel=0.25), name


def test_sizes_are_those_of_the_weights(place: Place) -> None:
    nodes, inputs, constants = chain()
    place.lower(model_of(nodes, inputs, constants=constants))
    found = sizes(place.canonical, DYNAMIC)
    assert (found.quantised, found.rest) == (5 * 32 * 32, 0)
    assert sizes(place.canonical, INT4).quantised == 5 * 32 * 32 * 5 // 8
    assert found.activations == 4 * 20 * 32 * 4, "the sum reads three and writes one"


def test_one_weight_at_a_time_is_in_memory(place: Place) -> None:
    """24 weights, 50 MB in FP16: neither rewriting nor recording holds them in FP32 (100 MB)."""
    count, side = 24, 1024
    one = normal(side, side, dtype=np.float16) / np.float16(32)
    names = [f"w{number}" for number in range(count)]
    reads = ["x", *(f"y{number}" for number in range(count - 1))]
    nodes = [
        helper.make_node("MatMul", [source, weight], [f"y{number}"])
        for number, (source, weight) in enumerate(zip(reads, names, strict=True))
    ]
    x = normal(1, 40, side, seed=2, dtype=np.float16)
    place.lower(model_of(nodes, {"x": x}, [f"y{count - 1}"], dict.fromkeys(names, one)))
    inputs = {"x": x.astype(np.float32)}
    layers, outputs = place.record(inputs, DYNAMIC)  # imports and libraries' own memory
    memory = PeakMemory()
    if not memory.per_cell:
        pytest.skip("the kernel does not reset a process's peak")
    before = resident_mb()
    layers, outputs = place.record(inputs, DYNAMIC)
    recorded = memory.megabytes() - before
    errors = relative_errors(layers, [samples(outputs, layers)], DYNAMIC)
    memory, before = PeakMemory(), resident_mb()
    rewrite(place.lowered, DYNAMIC, errors, place.small)
    rewritten = memory.megabytes() - before
    assert max(errors.values()) < 0.03
    assert recorded < 50 + 30, "the mapped file, and one weight in FP32"
    assert rewritten < 30


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))
