"""Attention as the project's own operator: what it computes, what it leaves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import (
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

from backends.onnxrt import operators
from export.lower import Profile

PROFILE = Profile("own", attention="operator")
ROUNDED = Profile("rounded", attention="operator", arithmetic="bf16")
Arrays = dict[str, np.ndarray]


def attention(
    n: int, queries: int, keys: int, heads: int, size: int, *, causal: bool = False,
    scale: float | None = None, heads_first: bool = False,
) -> tuple[ModelProto, Arrays]:  # fmt: skip
    width = heads * size
    inputs = {"q": normal(n, queries, width, seed=1), "k": normal(n, keys, width, seed=2),
              "v": normal(n, keys, width, seed=3)}  # fmt: skip
    given = {"is_causal": int(causal)} | ({"scale": scale} if scale else {})
    if heads_first:
        inputs = {name: np.ascontiguousarray(heads_of(array, heads))
                  for name, array in inputs.items()}  # fmt: skip
    else:
        given |= {"q_num_heads": heads, "kv_num_heads": heads}
    return model_of(
        [helper.make_node("Attention", ["q", "k", "v"], ["y"], **given)], inputs
    ), inputs


def heads_of(array: np.ndarray, heads: int) -> np.ndarray:
    n, length, width = array.shape
    return array.reshape(n, length, heads, width // heads).transpose(0, 2, 1, 3)


def exact(inputs: Arrays, heads: int, *, causal: bool = False, scale: float | None = None
          ) -> np.ndarray:  # fmt: skip
    q, k, v = (heads_of(inputs[name].astype(np.float64), heads) for name in "qkv")
    scores = q @ k.swapaxes(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result = weights / weights.sum(-1, keepdims=True) @ v
    n, _, length, size = result.shape
    return result.transpose(0, 2, 1, 3).reshape(n, length, heads * size)


@needs_compiler
@given(
    n=st.integers(1, 2), queries=st.integers(1, 300), keys=st.integers(1, 300),
    heads=st.integers(1, 4), size=st.integers(32, 256), threads=st.integers(1, 3),
    causal=st.booleans(), scale=st.sampled_from([None, 0.5, 3.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_it_gives_what_attention_gives(
    n: int, queries: int, keys: int, heads: int, size: int, threads: int, causal: bool,
    scale: float | None,
) -> None:  # fmt: skip
    keys = queries if causal else keys
    model, inputs = attention(n, queries, keys, heads, size, causal=causal, scale=scale)
    low = lowered(model, PROFILE)
    assert "FusedAttention" in ops(low)
    result = session_of(low, threads).run(None, inputs)[0]
    wanted = exact(inputs, heads, causal=causal, scale=scale)
    # What is off in the last place of a score is off so many times more in its weight.
    far = 1e-5 * max(1, (scale or 0) * size**0.5)
    np.testing.assert_allclose(result, wanted, rtol=0, atol=far * np.abs(wanted).max())


@needs_compiler
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("flags", INSTRUCTION_SETS)
def test_every_instruction_set_gives_it(
    flags: str, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and heads that fill no block; what is rounded is off by so much."""
    build_for(flags, monkeypatch)
    if rounded and not operators.may_multiply_bf16():
        pytest.skip("no BF16")
    for size, causal in ((32, False), (45, True), (100, True), (255, False), (256, True)):
        model, inputs = attention(1, 119, 119, 2, size, causal=causal)
        ready = session_of(lowered(model, ROUNDED if rounded else PROFILE), 2)
        wanted = exact(inputs, 2, causal=causal)
        error = np.abs(ready.run(None, inputs)[0] - wanted).max()
        assert 1e-4 < error < 2e-2 if rounded else error < 5e-6


@needs_compiler
def test_other_values_than_keys_stay_onnxruntimes() -> None:
    """Its operator takes values of another size than the keys'; ours does not."""
    model, inputs = attention(1, 9, 9, 2, 64, heads_first=True)
    inputs["v"] = normal(1, 2, 9, 80, seed=3)
    model = model_of(list(model.graph.node), inputs)
    low = lowered(model, PROFILE)
    assert "MultiHeadAttention" in ops(low)
    assert session_of(low, 1).run(None, inputs)[0].shape == (1, 2, 9, 80)


@needs_compiler
def test_heads_that_come_first_are_taken_too() -> None:
    model, inputs = attention(2, 70, 33, 3, 64, heads_first=True)
    low = lowered(model, PROFILE)
    flat = {name: array.transpose(0, 2, 1, 3).reshape(array.shape[0], array.shape[2], -1)
            for name, array in inputs.items()}  # fmt: skip
    result = session_of(low, 2).run(None, inputs)[0]
    np.testing.assert_allclose(result, heads_of(exact(flat, 3), 3), rtol=0, atol=1e-5)


@needs_compiler
def test_far_scores_and_what_is_no_number() -> None:
    """One key far ahead of all others is the result; NaN is not hidden."""
    model, inputs = attention(1, 40, 50, 2, 64, scale=1.0)
    inputs["k"][:, 17] = 40 * inputs["q"].mean()
    inputs["k"] *= 30
    ready = session_of(lowered(model, PROFILE), 2)
    wanted = exact(inputs, 2, scale=1.0)
    np.testing.assert_allclose(ready.run(None, inputs)[0], wanted, rtol=0, atol=1e-3)
    inputs["q"][0, 3] = np.nan
    result = ready.run(None, inputs)[0]
    assert np.isnan(result[0, 3]).all()
    assert not np.isnan(result[0, 4]).any()


@needs_bf16
def test_bf16_is_as_far_off_as_bf16_is() -> None:
    model, inputs = attention(1, 300, 200, 2, 64)
    wanted = exact(inputs, 2)
    errors = [np.abs(session_of(lowered(model, profile), 2).run(None, inputs)[0] - wanted).max()
              for profile in (PROFILE, ROUNDED)]  # fmt: skip
    assert errors[0] < 2e-6 < 1e-4 < errors[1] < 2e-2


def test_small_heads_stay_onnxruntimes() -> None:
    model, _ = attention(1, 9, 9, 2, 16)
    assert "MultiHeadAttention" in ops(lowered(model, PROFILE))
