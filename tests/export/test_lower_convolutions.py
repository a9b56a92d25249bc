"""Convolutions as the project's own operators: what they compute, what they take and leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import (
    BF16,
    INSTRUCTION_SETS,
    build_for,
    lowered,
    model_of,
    needs_bf16,
    needs_compiler,
    normal,
    ops,
    reference,
    session,
    session_of,
)
from onnx import ModelProto, TensorProto, helper

from backends.onnxrt import operators
from core.isa import isa
from export.lower import Profile, convolutions

PROFILE = Profile("winograd", convolutions="winograd", dtype="float32")
TILES = Profile("tiles", convolutions="tiles", dtype="float32")
ROUNDED = replace(PROFILE, arithmetic="bf16")
needs_tiles = pytest.mark.skipif(not operators.may_use_tiles(), reason="no AMX, or no C++ compiler")
NEAREST = {"mode": "nearest", "nearest_mode": "floor",
           "coordinate_transformation_mode": "asymmetric"}  # fmt: skip


def convolution(
    n: int = 1, channels: int = 8, filters: int = 8, size: tuple[int, int] = (16, 16),
    *, bias: bool = True, enlarged: bool = False, residual: bool = False, relu: bool = False,
    dtype: type = np.float32, kernel: int = 3,
    **attributes: object,
) -> tuple[ModelProto, dict[str, np.ndarray]]:  # fmt: skip
    """(Resize) -> Conv -> (+ z) -> (Relu) -> Neg, so that Conv is not what the graph gives."""
    inputs = {"x": normal(n, channels, *size, seed=1).astype(dtype)}
    spread = (kernel**2 * channels) ** -0.5
    constants = {"w": (spread * normal(filters, channels, kernel, kernel, seed=2)).astype(dtype)}
    if bias:
        constants["b"] = normal(filters, seed=3).astype(dtype)
    nodes, last = [], "x"
    if enlarged:
        constants["scales"] = np.array([1, 1, 2, 2], np.float32)
        nodes.append(helper.make_node("Resize", [last, "", "scales"], ["large"], **NEAREST))
        last = "large"
    given = {"pads": [kernel // 2] * 4} | attributes
    nodes.append(helper.make_node("Conv", [last, "w", *(["b"] if bias else [])], ["c"], **given))
    last = "c"
    if residual:
        scale = 2 if enlarged else 1
        inputs["z"] = normal(n, filters, *(scale * side for side in size), seed=4).astype(dtype)
        nodes.append(helper.make_node("Add", ["z", last], ["sum"]))
        last = "sum"
    if relu:
        nodes.append(helper.make_node("Relu", [last], ["positive"]))
        last = "positive"
    nodes.append(helper.make_node("Neg", [last], ["y"]))
    return model_of(nodes, inputs, ["y"], constants), inputs


def run(model: ModelProto, inputs: dict[str, np.ndarray], threads: int = 2) -> np.ndarray:
    result: np.ndarray = session_of(model, threads).run(None, inputs)[0]
    return result


@needs_compiler
@given(
    n=st.integers(1, 3), channels=st.integers(8, 70), blocks=st.integers(1, 20),
    height=st.integers(1, 40), width=st.integers(7, 70), threads=st.integers(1, 3),
    bias=st.booleans(), enlarged=st.booleans(), residual=st.booleans(), relu=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_it_gives_what_a_convolution_gives(
    n: int, channels: int, blocks: int, height: int, width: int, threads: int, bias: bool,
    enlarged: bool, residual: bool, relu: bool,
) -> None:  # fmt: skip
    height += -(-convolutions.SMALLEST // width)  # large enough to be taken
    model, inputs = convolution(
        n, channels, 8 * blocks, (height, width), bias=bias, enlarged=enlarged, residual=residual,
        relu=relu,
    )  # fmt: skip
    low = lowered(model, PROFILE)
    assert not {"Conv", "Resize", "Add", "Relu"} & set(ops(low))
    wanted = -reference(model, inputs)[0]
    result = -run(low, inputs, threads)
    assert result.shape == wanted.shape
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@needs_compiler
@pytest.mark.parametrize("enlarged", [False, True])
@pytest.mark.parametrize("flags", INSTRUCTION_SETS[:-1])
def test_every_instruction_set_gives_it(
    flags: str, enlarged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_for(flags, monkeypatch)
    model, inputs = convolution(2, 75, 40, (23, 45), enlarged=enlarged, residual=True, relu=True)
    wanted = reference(model, inputs)[0]
    result = run(lowered(model, PROFILE), inputs)
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    if flags != BF16 and "avx512_bf16" in isa():
        with pytest.raises(
            onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException, match="AVX"
        ):
            run(lowered(model, ROUNDED), inputs)


@needs_compiler
@pytest.mark.parametrize("enlarged", [False, True])
@pytest.mark.parametrize("rounded", [False, pytest.param(True, marks=needs_bf16)])
def test_what_is_infinite_or_too_large_stays_in_its_reach(rounded: bool, enlarged: bool) -> None:
    """The transforms of a tile would spread it, and make no number of it."""
    model, inputs = convolution(1, 9, 16, (40, 30), enlarged=enlarged)
    inputs["x"][0, 3, 5, 6] = np.inf
    inputs["x"][0, 0, 15, 20] = -np.inf
    inputs["x"][0, 2, 24, 11] = 3e38
    inputs["x"][0, 1, 31, 29] = np.nan
    (wanted,) = session(model).run(None, inputs)
    result = run(lowered(model, ROUNDED if rounded else PROFILE), inputs)
    tame = np.abs(wanted) < 1e30
    assert 0.9 < tame.mean() < 0.99
    np.testing.assert_allclose(result[tame], wanted[tame], rtol=0, atol=0.1 if rounded else 1e-5)
    if not rounded:
        np.testing.assert_allclose(result[~tame], wanted[~tame], rtol=1e-4)


@needs_compiler
def test_fp16_weights_are_transformed_in_fp32() -> None:
    model, inputs = convolution(dtype=np.float16, residual=True)
    low = lowered(model, PROFILE)
    wide = {name: array.astype(np.float32) for name, array in inputs.items()}
    wanted = reference(model, inputs)[0].astype(np.float32)
    np.testing.assert_allclose(run(low, wide), wanted, rtol=0, atol=1e-2)


@needs_bf16
@given(
    n=st.integers(1, 3), channels=st.integers(8, 150), blocks=st.integers(1, 10),
    height=st.integers(1, 40), width=st.integers(7, 70), threads=st.integers(1, 3),
    enlarged=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_bf16_is_exact_where_nothing_is_to_be_rounded(
    n: int, channels: int, blocks: int, height: int, width: int, threads: int, enlarged: bool
) -> None:
    """Integers so small that both transforms are BF16 numbers, and their sums those of FP32."""
    height += -(-convolutions.SMALLEST // width)
    model, inputs = convolution(
        n, channels, 8 * blocks, (height, width), bias=False, enlarged=enlarged
    )
    random = np.random.default_rng(5)
    inputs["x"] = random.integers(-8, 9, inputs["x"].shape).astype(np.float32)
    weights = 4 * random.integers(-2, 3, (8 * blocks, channels, 3, 3)).astype(np.float32)
    (tensor,) = (each for each in model.graph.initializer if each.name == "w")
    tensor.CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    low = lowered(model, ROUNDED)
    assert f"{convolutions.WINOGRAD}BF16" in ops(low)
    np.testing.assert_array_equal(run(low, inputs, threads), reference(model, inputs)[0])


@needs_bf16
@pytest.mark.parametrize("enlarged", [False, True])
def test_bf16_is_as_far_off_as_bf16_is(enlarged: bool) -> None:
    model, inputs = convolution(
        channels=70, filters=40, size=(20, 33), enlarged=enlarged, residual=True, relu=True
    )
    wanted = reference(model, inputs)[0]
    error = run(lowered(model, ROUNDED), inputs) - wanted
    assert 5e-4 < np.sqrt(np.square(error).mean() / np.square(wanted).mean()) < 5e-3


@needs_compiler
def test_threads_and_calls_do_not_read_each_others_tiles() -> None:
    """Tiles are kept by the thread: another call of the same shape must not find them."""
    model, inputs = convolution(channels=64, filters=256)
    low = lowered(model, PROFILE)
    ready = session_of(low, 2)
    for seed in range(6):
        fresh = {"x": normal(*inputs["x"].shape, seed=10 + seed)}
        wanted = reference(model, fresh)[0]
        np.testing.assert_allclose(ready.run(None, fresh)[0], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        {"strides": [2, 2]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"pads": [0, 0, 0, 0]},
        {"filters": 12},
        {"channels": 4},
        {"size": (15, 16)},
        {"auto_pad": "SAME_UPPER", "pads": None},  # None: the node is without it
    ],
    ids=str,
)
def test_other_convolutions_stay(other: dict[str, object]) -> None:
    model, _ = convolution(**other)  # type: ignore[arg-type]
    low = lowered(model, PROFILE)
    assert "Conv" in ops(low)
    assert not [item for item in low.opset_import if item.domain == convolutions.DOMAIN]


@needs_compiler
def test_what_others_read_stays_too() -> None:
    """An enlarged image, a sum and a Relu that something else reads are not made part of it."""
    model, inputs = convolution(enlarged=True, residual=True, relu=True)
    for name in ("large", "c", "sum"):
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 32, 32])
        model.graph.output.append(info)
    low = lowered(model, PROFILE)
    assert {"Resize", "Add", "Relu", convolutions.WINOGRAD} <= set(ops(low))
    ready = session_of(low, 2)
    for result, wanted in zip(ready.run(None, inputs), reference(model, inputs), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-4)


@needs_compiler
def test_two_convolutions_that_meet_in_a_sum() -> None:
    """The first to be replaced takes the other as what it adds."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["left"], "left", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "v"], ["right"], "right", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["left", "right"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["y"]),
    ]
    inputs = {"x": normal(1, 8, 16, 16, seed=1)}
    weights = {name: normal(8, 8, 3, 3, seed=seed) for seed, name in enumerate("wv", 2)}
    model = model_of(nodes, inputs, ["y"], weights)
    low = lowered(model, PROFILE)
    assert sorted(set(ops(low)) & {convolutions.WINOGRAD, "Conv", "Add", "Relu"}) == [
        convolutions.WINOGRAD
    ]
    np.testing.assert_allclose(
        run(low, inputs), reference(model, inputs)[0], rtol=0, atol=1e-4
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("read_again", [False, True])
def test_what_is_added_is_overwritten_only_if_nothing_else_reads_it(read_again: bool) -> None:
    last = ["sum", "r"] if read_again else ["sum", "x"]
    nodes = [
        helper.make_node("Neg", ["z"], ["r"], "neg"),
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "r"], ["sum"], "add"),
        helper.make_node("Mul", last, ["y"], "mul"),
    ]
    inputs = {name: normal(2, 16, 33, 17, seed=seed) for seed, name in enumerate("xz", 1)}
    model = model_of(nodes, inputs, ["y"], {"w": normal(16, 16, 3, 3, seed=5)})
    low = lowered(model, PROFILE)
    assert "Add" not in ops(low)
    np.testing.assert_allclose(
        run(low, inputs), reference(model, inputs)[0], rtol=0, atol=1e-4
    )  # fmt: skip


def test_the_weights_grow_as_said(tmp_path: Path) -> None:
    for enlarged, elements in ((False, 16), (True, 9)):
        model, _ = convolution(channels=24, filters=16, enlarged=enlarged)
        onnx.save(model, tmp_path / "model.onnx")
        sizes = convolutions.sizes(tmp_path / "model.onnx", "winograd")
        assert sizes == convolutions.Sizes(9 * 4 * 24 * 16, elements * 4 * 24 * 16)
        sizes = convolutions.sizes(tmp_path / "model.onnx", "winograd", bf16=True)
        assert sizes == convolutions.Sizes(9 * 4 * 24 * 16, elements * 2 * 24 * 16)


def test_tiles_keep_their_weights_filled_up(tmp_path: Path) -> None:
    model, _ = convolution(channels=24, filters=40, dtype=np.float16)
    onnx.save(model, tmp_path / "model.onnx")
    sizes = convolutions.sizes(tmp_path / "model.onnx", "tiles")
    assert sizes == convolutions.Sizes(9 * 4 * 24 * 40, 9 * 2 * 32 * 64)


@needs_tiles
@given(
    n=st.integers(1, 3), channels=st.integers(8, 100), filters=st.integers(8, 100),
    height=st.integers(1, 40), width=st.integers(16, 150), threads=st.integers(1, 3),
    kernel=st.sampled_from([1, 3]), bias=st.booleans(), residual=st.booleans(), relu=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_tiles_give_what_a_convolution_gives(
    n: int, channels: int, filters: int, height: int, width: int, threads: int, kernel: int,
    bias: bool, residual: bool, relu: bool,
) -> None:  # fmt: skip
    height += -(-convolutions.SMALLEST // width)  # large enough to be taken
    model, inputs = convolution(
        n, channels, filters, (height, width), bias=bias, residual=residual, relu=relu,
        dtype=np.float16, kernel=kernel,
    )  # fmt: skip
    check_tiles(model, inputs, threads)


@needs_tiles
def test_tiles_sum_channels_that_do_not_fit_a_cache_piece_by_piece() -> None:
    model, inputs = convolution(
        channels=1000, filters=72, size=(18, 40), dtype=np.float16, residual=True, relu=True
    )
    check_tiles(model, inputs, threads=2)


def check_tiles(model: ModelProto, inputs: dict[str, np.ndarray], threads: int) -> None:
    low = lowered(model, TILES)
    assert convolutions.TILED in ops(low)
    assert not {"Conv", "Add", "Relu"} & set(ops(low))
    wide = {name: array.astype(np.float32) for name, array in inputs.items()}
    wanted = session(lowered(model, Profile("plain", dtype="float32"))).run(None, wide)[0]
    result = run(low, wide, threads)
    assert result.shape == wanted.shape
    np.testing.assert_allclose(result, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@needs_tiles
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("enlarged", [False, True])
def test_bf16_rounds_images_and_weights_and_sums_in_fp32(kernel: int, enlarged: bool) -> None:
    model, inputs = convolution(
        channels=70, filters=40, size=(20, 33), dtype=np.float16, kernel=kernel, enlarged=enlarged
    )
    low = lowered(model, replace(TILES, arithmetic="bf16"))
    assert convolutions.TILED in ops(low)
    result = run(low, {name: array.astype(np.float32) for name, array in inputs.items()})
    image, weights, bias = (
        torch.from_numpy(array.astype(np.float32))
        for array in (inputs["x"], *(onnx.numpy_helper.to_array(tensor)
                                     for tensor in model.graph.initializer if tensor.name in "wb"))
    )  # fmt: skip
    scale = 2 if enlarged else 1
    image = image.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    wanted = -torch.nn.functional.conv2d(
        image.bfloat16().double(), weights.bfloat16().double(), bias.double(), padding=kernel // 2
    ).numpy()
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "operator"),
    [
        ({"enlarged": True, "dtype": np.float16}, convolutions.WINOGRAD),
        ({"dtype": np.float32}, convolutions.WINOGRAD),
        ({"size": (40, 15), "dtype": np.float16}, convolutions.WINOGRAD),
        ({"kernel": 1, "dtype": np.float32}, "Conv"),
        ({"channels": 4, "dtype": np.float16}, "Conv"),
    ],
    ids=str,
)
def test_what_tiles_are_worse_at_is_left_to_others(other: dict[str, object], operator: str) -> None:
    model, _ = convolution(**other)  # type: ignore[arg-type]
    assert operator in ops(lowered(model, TILES))
    assert convolutions.TILED not in ops(lowered(model, TILES))
