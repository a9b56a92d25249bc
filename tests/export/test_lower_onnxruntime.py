"""The forms that onnxruntime's CUDA provider wants: ArgMax of floats, its own attention."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import lowered, model_of, normal, ops, reference, run
from onnx import TensorProto, helper

from core.errors import PreconditionError
from export.lower import Profile

FLOATS = Profile("floats", argmax="float32")
MULTIHEAD = Profile("multihead", opset=17, attention="multihead")


@given(
    ids=st.lists(st.integers(0, 49407), min_size=1, max_size=77),
    kind=st.sampled_from([TensorProto.INT32, TensorProto.INT64]),
)
@settings(max_examples=25)
def test_argmax_of_integers_compares_floats(ids: list[int], kind: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    inputs = {"x": np.array([[49406, 49407, *ids]], dtype)}
    node = helper.make_node("ArgMax", ["x"], ["y"], axis=-1, keepdims=0)
    model = model_of([node], inputs, ["y"])
    low = lowered(model, FLOATS)
    assert [(n.op_type) for n in low.graph.node] == ["Cast", "ArgMax"]
    assert np.array_equal(reference(low, inputs)[0], reference(model, inputs)[0])
    assert reference(low, inputs)[0][0] == 1


def test_argmax_of_floats_stays() -> None:
    inputs = {"x": normal(2, 5, seed=1)}
    model = model_of([helper.make_node("ArgMax", ["x"], ["y"], axis=-1)], inputs, ["y"])
    assert ops(lowered(model, FLOATS)) == {"ArgMax"}


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    causal=st.booleans(),
    flat=st.booleans(),
    scale=st.sampled_from([None, 0.25]),
)
@settings(max_examples=25)
def test_attention_as_onnxruntime_has_it(
    batch: int, heads: int, queries: int, keys: int, causal: bool, flat: bool, scale: float | None
) -> None:
    size, keys = 8, queries if causal else keys
    lengths = {"q": queries, "k": keys, "v": keys}
    inputs = {
        name: normal(batch, length, heads * size, seed=n)
        if flat
        else normal(batch, heads, length, size, seed=n)
        for n, (name, length) in enumerate(lengths.items())
    }
    attributes = {"is_causal": int(causal)} | ({"scale": scale} if scale else {})
    if flat:
        attributes |= {"q_num_heads": heads, "kv_num_heads": heads}
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], **attributes)
    model = model_of([node], inputs, ["y"])
    low = lowered(model, MULTIHEAD)
    assert "MultiHeadAttention" in ops(low)
    assert "Attention" not in ops(low)
    expected = reference(model, inputs)[0]
    np.testing.assert_allclose(run(low, inputs)[0], expected, rtol=1e-4, atol=1e-5)


def test_attention_with_a_mask_is_refused() -> None:
    inputs = {name: normal(1, 2, 4, 8, seed=1) for name in "qkv"}
    inputs["mask"] = np.ones((4, 4), bool)
    node = helper.make_node("Attention", list(inputs), ["y"], name="attend")
    with pytest.raises(PreconditionError, match="Attention attend cannot be lowered") as caught:
        lowered(model_of([node], inputs, ["y"]), MULTIHEAD)
    assert "a mask" in caught.value.why
