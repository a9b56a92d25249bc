"""A product that is split in two, as two products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import lowered, model_of, normal, ops, reference, run
from onnx import ModelProto, TensorProto, helper

from export.lower import Profile

HALVES = Profile("halves", gates="halves", dtype="float32")


def geglu(
    half: int = 4,
    bias: str | None = "right",
    sizes: tuple[int, int] | None = None,
    dtype: type = np.float32,
) -> tuple[ModelProto, dict[str, np.ndarray]]:
    """x [2, 3, 5] @ weight [5, 2 half] (+ bias), its first half times the Gelu of its second."""
    inputs = {"x": normal(2, 3, 5, seed=1).astype(dtype)}
    weights = {"w": normal(5, 2 * half, seed=2), "b": normal(2 * half, seed=3)}
    terms = {"right": ["xw", "b"], "left": ["b", "xw"], None: ["xw", "b"]}[bias]
    split = ["s" if bias else "xw", *(["sizes"] if sizes else [])]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        *([helper.make_node("Add", terms, ["s"])] if bias else []),
        helper.make_node(
            "Split", split, ["v", "g"], axis=2, **({} if sizes else {"num_outputs": 2})
        ),
        helper.make_node("Gelu", ["g"], ["gelu"]),
        *([helper.make_node("ReduceMax", ["v"], ["top"], keepdims=1)] if sizes else []),
        helper.make_node("Mul", ["top" if sizes else "v", "gelu"], ["y"]),
    ]
    constants = {name: array.astype(dtype) for name, array in weights.items()}
    if sizes:
        constants["sizes"] = np.array(sizes)
    model = model_of(nodes, inputs, ["y"], constants)
    return model, inputs


@given(
    half=st.integers(1, 6),
    bias=st.sampled_from(["right", "left", None]),
    dtype=st.sampled_from([np.float32, np.float16]),
)
@settings(max_examples=20)
def test_two_products_give_what_the_split_gave(half: int, bias: str | None, dtype: type) -> None:
    model, inputs = geglu(half, bias, dtype=dtype)
    low = lowered(model, HALVES)
    assert "Split" not in ops(low)
    assert sum(node.op_type == "MatMul" for node in low.graph.node) == 2
    wide = {name: array.astype(np.float32) for name, array in inputs.items()}
    np.testing.assert_allclose(
        run(low, wide)[0], reference(model, inputs)[0], rtol=1e-2 if dtype == np.float16 else 1e-5,
        atol=1e-2 if dtype == np.float16 else 1e-5,
    )  # fmt: skip


def test_unequal_parts_stay() -> None:
    model, _ = geglu(sizes=(3, 5))
    assert "Split" in ops(lowered(model, HALVES))


@pytest.mark.parametrize("value", ["s", "xw"])
def test_what_is_read_elsewhere_too_stays(value: str) -> None:
    model, inputs = geglu()
    model.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, [2, 3, 8]))
    low = lowered(model, HALVES)
    assert "Split" in ops(low)
    np.testing.assert_allclose(run(low, inputs)[0], reference(model, inputs)[0], rtol=1e-5)
