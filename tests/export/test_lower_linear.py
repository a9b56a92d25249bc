"""Products with FP16 weights as the project's own operator: what it computes, takes and leaves."""

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
    session_of,
)
from onnx import ModelProto, helper

from export.lower import Profile, linear

PROFILE = Profile("linear", products="linear", dtype="float32", gates="halves")
Arrays = dict[str, np.ndarray]


def product(
    rows: tuple[int, ...] = (3,), depth: int = 64, columns: int = 64, *, bias: bool = True,
    residual: bool = True, gemm: bool = False, dtype: type = np.float16,
) -> tuple[ModelProto, Arrays, Arrays]:  # fmt: skip
    """x @ w (+ b) (+ z) -> Neg, so that the product is not what the graph gives."""
    inputs = {"x": normal(*rows, depth, seed=1).astype(dtype)}
    constants = {"w": (depth**-0.5 * normal(depth, columns, seed=2)).astype(dtype)}
    if bias:
        constants["b"] = normal(columns, seed=3).astype(dtype)
    if gemm:
        constants["w"] = np.ascontiguousarray(constants["w"].T)
        nodes = [helper.make_node("Gemm", ["x", *constants], ["p"], transB=1)]
        last = "p"
    else:
        nodes, last = [helper.make_node("MatMul", ["x", "w"], ["p"])], "p"
        if bias:
            nodes.append(helper.make_node("Add", ["b", last], ["biased"]))
            last = "biased"
    if residual:
        inputs["z"] = normal(*rows, columns, seed=4).astype(dtype)
        nodes.append(helper.make_node("Add", ["z", last], ["sum"]))
        last = "sum"
    nodes.append(helper.make_node("Neg", [last], ["y"]))
    return model_of(nodes, inputs, ["y"], constants), inputs, constants


def run(model: ModelProto, inputs: Arrays, threads: int = 2) -> np.ndarray:
    wide = {name: array.astype(np.float32) for name, array in inputs.items()}
    result: np.ndarray = session_of(model, threads).run(None, wide)[0]
    return result


def exact(inputs: Arrays, constants: Arrays, transposed: bool = False) -> np.ndarray:
    wide = {name: array.astype(np.float64) for name, array in (inputs | constants).items()}
    weights = wide["w"].T if transposed else wide["w"]
    return -(wide["x"] @ weights + wide.get("b", 0) + wide.get("z", 0))


@needs_compiler
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    depth=st.integers(64, 700), columns=st.integers(64, 200), threads=st.integers(1, 3),
    bias=st.booleans(), residual=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_it_gives_what_a_product_gives(
    rows: tuple[int, ...], depth: int, columns: int, threads: int, bias: bool, residual: bool
) -> None:
    model, inputs, constants = product(rows, depth, columns, bias=bias, residual=residual)
    low = lowered(model, PROFILE)
    assert not {"MatMul", "Add"} & set(ops(low))
    result, wanted = run(low, inputs, threads), exact(inputs, constants)
    assert result.shape == wanted.shape
    np.testing.assert_allclose(result, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@needs_compiler
@pytest.mark.parametrize("rows", [(1,), (8,), (9,), (300,)], ids=str)
@pytest.mark.parametrize("flags", INSTRUCTION_SETS)
def test_every_instruction_set_gives_it(
    flags: str, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depths beyond one block of weights, columns that fill no panel; tiny and large numbers."""
    build_for(flags, monkeypatch)
    model, inputs, constants = product(rows, 2100, 72)
    constants["w"][:300] *= np.float16(2**-12)  # below FP16's normal numbers
    inputs["x"][..., 300:600] *= np.float16(1000)
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in constants.items()
    )
    wanted, result = exact(inputs, constants), run(lowered(model, PROFILE), inputs)
    np.testing.assert_allclose(result, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@needs_compiler
def test_it_is_nearer_to_the_exact_product_than_onnxruntime_is() -> None:
    """In the mean: rounding once every 32 products against once for each."""
    model, inputs, constants = product((256,), 1280, 320)
    wanted = exact(inputs, constants)
    plain = lowered(model, Profile("plain", dtype="float32"))
    error, other = (np.abs(run(each, inputs) - wanted).mean() for each in (
        lowered(model, PROFILE), plain))  # fmt: skip
    assert error < 1.5 * other  # AVX2: as FP32 is; with tiles it is a third


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
def test_a_gemm_with_transposed_weights(bias: bool) -> None:
    model, inputs, constants = product((5,), 70, 90, bias=bias, gemm=True)
    low = lowered(model, PROFILE)
    assert "Gemm" not in ops(low)
    wanted = exact(inputs, constants, transposed=True)
    np.testing.assert_allclose(run(low, inputs), wanted, rtol=0, atol=1e-5)


@needs_compiler
def test_halves_of_a_gated_product_have_their_own_columns() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["s"]),
        helper.make_node("Split", ["s"], ["value", "gate"], axis=-1, num_outputs=2),
        helper.make_node("Mul", ["value", "gate"], ["y"]),
    ]
    inputs = {"x": normal(2, 9, 96, seed=1).astype(np.float16)}
    constants = {"w": (normal(96, 160, seed=2) / 10).astype(np.float16),
                 "b": normal(160, seed=3).astype(np.float16)}  # fmt: skip
    low = lowered(model_of(nodes, inputs, ["y"], constants), PROFILE)
    assert [node.op_type for node in low.graph.node].count(linear.OPERATOR) == 2
    assert not {"MatMul", "Split", "Add"} & set(ops(low))
    wide = {name: array.astype(np.float64) for name, array in (inputs | constants).items()}
    both = wide["x"] @ wide["w"] + wide["b"]
    np.testing.assert_allclose(run(low, inputs), both[..., :80] * both[..., 80:], atol=1e-5)


@pytest.mark.parametrize("other", [{"dtype": np.float32}, {"depth": 32, "columns": 64}], ids=str)
def test_other_products_stay(other: dict[str, object]) -> None:
    """FP32 weights are not FP16's to keep, and small ones are not worth it."""
    model, _, _ = product(**other)  # type: ignore[arg-type]
    low = lowered(model, PROFILE)
    assert "MatMul" in ops(low)
    assert linear.OPERATOR not in ops(low)


@needs_compiler
def test_a_sum_that_is_no_bias_or_that_others_read_stays() -> None:
    """b is an input here, and the product alone is a result too."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    inputs = {"x": normal(4, 64, seed=1), "b": normal(64, seed=2)}
    weights = {"w": (normal(64, 64, seed=3) / 8).astype(np.float16)}
    inputs = {name: array.astype(np.float16) for name, array in inputs.items()}
    low = lowered(model_of(nodes, inputs, ["y", "p"], weights), PROFILE)
    assert {"Add", linear.OPERATOR} <= set(ops(low))
    wide = {name: array.astype(np.float64) for name, array in (inputs | weights).items()}
    wanted = wide["x"] @ wide["w"]
    sums, products = session_of(low, 1).run(
        None, {name: array.astype(np.float32) for name, array in inputs.items()}
    )
    np.testing.assert_allclose(products, wanted, atol=1e-5)
    np.testing.assert_allclose(sums, wanted + wide["b"], atol=1e-5)


@needs_compiler
def test_a_wrong_shape_is_refused_by_the_operator() -> None:
    model, inputs, _ = product((4,), 96, 64, residual=False)
    low = lowered(model, PROFILE)
    low.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 160
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="Linear"):
        session_of(low, 1).run(None, {"x": normal(*inputs["x"].shape[:-1], 160)})


def test_the_weights_shrink_as_said(tmp_path: Path) -> None:
    model, _, _ = product(depth=96, columns=80)
    onnx.save(model, tmp_path / "model.onnx")
    assert linear.saved(tmp_path / "model.onnx") == 2 * 96 * 80


@needs_bf16
@pytest.mark.parametrize("rows", [(1,), (8,), (40,), (300,)], ids=str)
@pytest.mark.parametrize("flags", [BF16, "own"])
def test_bf16_rounds_both_sides_and_sums_in_fp32(
    flags: str, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depths that are odd, and beyond one block of weights; in vectors, and on tiles."""
    build_for(flags, monkeypatch)
    model, inputs, constants = product(rows, 1301, 96)
    result = run(lowered(model, replace(PROFILE, arithmetic="bf16")), inputs)
    rounded = {
        name: torch.from_numpy(array.astype(np.float32)).bfloat16().double().numpy()
        for name, array in (inputs | constants).items()
        if name in "xw"
    }
    wanted = exact(inputs | {"x": rounded["x"]}, constants | {"w": rounded["w"]})
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5)
    assert np.abs(wanted - exact(inputs, constants)).max() > 1e-3
