"""Attention and norms spelled out: the numbers stay what the operators say.

Held against ONNX's reference evaluator or torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import Arrays, lowered, model_of, normal, ops, reference, run
from onnx import TensorProto, helper, numpy_helper

from core.errors import PreconditionError
from export.lower import Profile

MATMUL = Profile("matmul", attention="matmul")
DECOMPOSED = Profile("decomposed", norms="decomposed")
BY_LAYER = Profile("by-layer", norms="layer")
FEW = settings(max_examples=25, deadline=None)


# --- attention


@st.composite
def attention_cases(draw: st.DrawFn) -> tuple[onnx.ModelProto, Arrays]:
    batch, heads, queries, keys, size, width = (
        draw(st.integers(1, high)) for high in (2, 3, 5, 6, 8, 8)
    )
    flat = draw(st.booleans())
    shapes = {"q": (queries, size), "k": (keys, size), "v": (keys, width)}
    inputs = {
        name: normal(batch, length, heads * each, seed=index)
        if flat
        else normal(batch, heads, length, each, seed=index)
        for index, (name, (length, each)) in enumerate(shapes.items())
    }
    attributes: dict[str, Any] = {"is_causal": draw(st.integers(0, 1))}
    if flat:
        attributes |= {"q_num_heads": heads, "kv_num_heads": heads}
    if draw(st.booleans()):
        attributes["scale"] = draw(st.sampled_from([0.125, 1.0, 0.7]))
    if draw(st.booleans()):
        attributes["softcap"] = 2.0
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind != "none":
        shapes_of_masks = [(queries, keys), (heads, queries, keys), (batch, 1, queries, keys)]
        if not attributes["is_causal"]:  # there the reference evaluator has one row for all queries
            shapes_of_masks.append((1, keys))
        shape = draw(st.sampled_from(shapes_of_masks))
        seeing = normal(*shape, seed=9) > draw(st.sampled_from([-0.5, 0.5]))
        inputs["mask"] = seeing if kind == "bool" else np.where(seeing, 0, -3.0).astype(np.float32)
    node = helper.make_node("Attention", list(inputs), ["y"], name="attend", **attributes)
    constants = {}
    if kind == "bool" and draw(st.booleans()):
        constants["mask"] = inputs.pop("mask")
    return model_of([node], inputs, constants=constants), inputs


@given(attention_cases())
@settings(max_examples=60, deadline=None)
def test_attention_as_matmul_is_the_operator(case: tuple[onnx.ModelProto, Arrays]) -> None:
    model, inputs = case
    result = lowered(model, MATMUL)
    assert "Attention" not in ops(result)
    np.testing.assert_allclose(run(result, inputs)[0], reference(model, inputs)[0], atol=2e-6)


@pytest.mark.parametrize("constant", [False, True])
def test_a_query_that_may_see_no_key_gives_zeros(constant: bool) -> None:
    mask = np.array([[True, False, True], [False, False, False]])
    inputs = {name: normal(1, 1, 3 if name != "q" else 2, 4) for name in "qkv"}
    constants = {"mask": mask} if constant else {}
    node = helper.make_node("Attention", [*"qkv", "mask"], ["y"])
    model = model_of([node], inputs | ({} if constant else {"mask": mask}), constants=constants)
    feeds = inputs | ({} if constant else {"mask": mask})
    (result,) = run(lowered(model, MATMUL), feeds)
    assert np.all(result[0, 0, 1] == 0)
    assert np.all(result[0, 0, 0] != 0)


def test_attention_in_fp16_computes_its_softmax_in_the_precision_it_asks_for() -> None:
    inputs = {name: normal(1, 2, 4, 8, dtype=np.float16) for name in "qkv"}
    node = helper.make_node("Attention", list("qkv"), ["y"], softmax_precision=1)
    model = model_of([node], inputs)
    result = lowered(model, MATMUL)
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*result.graph.value_info, *result.graph.output)
    }
    softmax = next(node for node in result.graph.node if node.op_type == "Softmax")
    assert kinds[softmax.output[0]] == TensorProto.FLOAT
    assert kinds["y"] == TensorProto.FLOAT16
    np.testing.assert_allclose(run(result, inputs)[0], run(model, inputs)[0], atol=4e-3)


def test_attention_adds_only_finite_numbers_in_fp16() -> None:
    inputs = {name: normal(1, 2, 5, 8, dtype=np.float16) for name in "qkv"}
    node = helper.make_node("Attention", list("qkv"), ["y"], is_causal=1)
    result = lowered(model_of([node], inputs), MATMUL)
    for tensor in result.graph.initializer:
        assert np.isfinite(numpy_helper.to_array(tensor)).all()


@pytest.mark.parametrize(
    ("inputs", "attributes", "axes", "words"),
    [
        ({"k": (1, 1, 3, 4), "v": (1, 1, 3, 4)}, {}, {}, "grouped queries"),
        ({}, {"is_causal": 1}, {"q": [1, 2, "length", 4]}, "causal"),
        ({"past_k": (1, 2, 3, 4), "past_v": (1, 2, 3, 4)}, {}, {}, "cache"),
    ],
)
def test_attention_that_cannot_be_spelled_out_is_refused_by_name(
    inputs: dict[str, tuple[int, ...]], attributes: Any, axes: Any, words: str
) -> None:
    shapes = {"q": (1, 2, 3, 4), "k": (1, 2, 3, 4), "v": (1, 2, 3, 4)} | inputs
    names = [*"qkv", "", "past_k", "past_v"] if "past_k" in shapes else list("qkv")
    outputs = ["y", "k2", "v2"] if "past_k" in shapes else ["y"]
    node = helper.make_node("Attention", names, outputs, name="mid/attend", **attributes)
    arrays = {name: normal(*shape) for name, shape in shapes.items()}
    with pytest.raises(PreconditionError, match="Attention mid/attend") as raised:
        lowered(model_of([node], arrays, axes=axes), MATMUL)
    assert words in str(raised.value)


# --- norms


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    inner=st.lists(st.integers(1, 5), max_size=2),
    offset=st.sampled_from([0.0, 100.0]),
    named=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16]),
)
@FEW
def test_group_norm_decomposed(
    batch: int,
    groups: int,
    per_group: int,
    inner: list[int],
    offset: float,
    named: bool,
    dtype: Any,
) -> None:
    channels = groups * per_group
    x = (normal(batch, channels, *inner) + offset).astype(dtype)
    scale, bias = normal(channels, seed=1, dtype=dtype), normal(channels, seed=2, dtype=dtype)
    node = helper.make_node(
        "GroupNormalization", ["x", "s", "b"], ["y"], num_groups=groups, epsilon=1e-5
    )
    axes = {"x": ["batch", channels, *(f"size_{axis}" for axis in range(len(inner)))]}
    model = model_of(
        [node], {"x": x}, constants={"s": scale, "b": bias}, axes=axes if named else None
    )
    result = lowered(model, DECOMPOSED)
    assert "GroupNormalization" not in ops(result)
    expected = torch.group_norm(
        *(torch.from_numpy(x).double().reshape(batch, channels, -1),),
        groups,
        torch.from_numpy(scale).double(),
        torch.from_numpy(bias).double(),
        1e-5,
    ).reshape(x.shape)
    (found,) = run(result, {"x": x})
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, atol=2e-2 if dtype == np.float16 else 1e-3)


def test_group_norm_by_layer_norm() -> None:
    x, scale, bias = normal(2, 6, 3, 5) + 7, normal(6, seed=1), normal(6, seed=2)
    node = helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=3, epsilon=0.1)
    constants = {"s": scale, "b": bias}
    result = lowered(model_of([node], {"x": x}, constants=constants), BY_LAYER)
    assert ops(result) == {"Reshape", "LayerNormalization", "Unsqueeze", "Mul", "Add"}
    values, weight, offset = (torch.from_numpy(array) for array in (x, scale, bias))
    expected = torch.group_norm(values, 3, weight, offset, 0.1)
    np.testing.assert_allclose(run(result, {"x": x})[0], expected, atol=1e-5)
    named = model_of([node], {"x": x}, constants=constants, axes={"x": ["n", 6, "h", 5]})
    with pytest.raises(PreconditionError, match="its sizes are not numbers"):
        lowered(named, BY_LAYER)


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
    bias=st.booleans(),
    names=st.sampled_from([["y"], ["y", "mean"], ["y", "mean", "inverse"], ["y", "", "inverse"]]),
)
@FEW
def test_layer_norm_decomposed(
    shape: list[int], data: st.DataObject, bias: bool, names: list[str]
) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x, inner = normal(*shape), shape[axis:]
    constants = {"s": normal(*inner, seed=1)} | ({"b": normal(*inner, seed=2)} if bias else {})
    node = helper.make_node("LayerNormalization", ["x", *constants], names, axis=axis)
    model = model_of([node], {"x": x}, [name for name in names if name], constants)
    result = lowered(model, DECOMPOSED)
    assert "LayerNormalization" not in ops(result)
    expected = reference(model, {"x": x})
    for found, wanted in zip(run(result, {"x": x}), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_norm_statistics_are_fp32_unless_asked_otherwise() -> None:
    """The sum of squares of these values is beyond FP16: 400 * 400 = 160000."""
    x = np.array([[400, -400, 400, -400]], np.float16)
    constants = {"s": np.ones(4, np.float16), "b": np.zeros(4, np.float16)}
    model = model_of(
        [helper.make_node("LayerNormalization", ["x", "s", "b"], ["y"])],
        {"x": x},
        (*"y",),
        constants,
    )
    wide = lowered(model, DECOMPOSED)
    pure = lowered(model, replace(DECOMPOSED, norm_statistics="as-is"))
    assert "Cast" in ops(wide)
    assert "Cast" not in ops(pure)
    # The reference evaluator computes FP16 in FP16; onnxruntime's CPU kernels do not.
    np.testing.assert_allclose(reference(wide, {"x": x})[0], [[1, -1, 1, -1]])
    with np.errstate(over="ignore"):
        assert not np.allclose(reference(pure, {"x": x})[0], [[1, -1, 1, -1]], atol=0.1)
