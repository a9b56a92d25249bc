"""Group norms, and SiLU, as the project's own operator: what it computes, takes and leaves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import (
    Arrays,
    lowered,
    model_of,
    needs_compiler,
    normal,
    ops,
    reference,
    session_of,
)
from onnx import ModelProto, TensorProto, helper

from backends.onnxrt import operators
from core.isa import isa
from export.lower import Profile
from export.lower.norms import OPERATOR

PROFILE = Profile("group-norm", norms="operator", dtype="float32")


def group_norm(
    x: np.ndarray, groups: int, *, silu: bool = True, epsilon: float = 1e-5, plain: bool = False,
    axes: dict[str, Sequence[str | int]] | None = None,
) -> tuple[ModelProto, Arrays]:  # fmt: skip
    """x -> GroupNormalization -> (Sigmoid, Mul); if `plain`, with scale 1 and bias 0."""
    channels = x.shape[1]
    constants = {"s": normal(channels, seed=2), "b": normal(channels, seed=3)}
    if plain:
        constants = {"s": np.ones(channels, np.float32), "b": np.zeros(channels, np.float32)}
    constants = {name: array.astype(x.dtype) for name, array in constants.items()}
    norm = helper.make_node(
        "GroupNormalization", ["x", "s", "b"], ["g" if silu else "y"], num_groups=groups,
        epsilon=epsilon,
    )  # fmt: skip
    after = [
        helper.make_node("Sigmoid", ["g"], ["sigmoid"]),
        helper.make_node("Mul", ["g", "sigmoid"], ["y"]),
    ]
    nodes = [norm, *(after if silu else [])]
    values = {"g": x} if silu else {}
    named = axes and axes | {"g": axes["x"]}
    return model_of(nodes, {"x": x}, ["y"], constants, named, values), constants


def run(model: ModelProto, x: np.ndarray, threads: int = 2) -> np.ndarray:
    result: np.ndarray = session_of(model, threads).run(None, {"x": x.astype(np.float32)})[0]
    return result


def silu_of(y: np.ndarray) -> np.ndarray:
    product: np.ndarray = y / (1 + np.exp(-y))
    return product


def exact(
    x: np.ndarray, constants: Arrays, groups: int, *, silu: bool = True, epsilon: float = 1e-5
) -> np.ndarray:
    grouped = x.astype(np.float64).reshape(len(x), groups, -1)
    grouped = grouped - grouped.mean(2, keepdims=True)
    grouped /= np.sqrt((grouped**2).mean(2, keepdims=True) + np.float32(epsilon))
    each = (-1, *[1] * (x.ndim - 2))
    scale, bias = (constants[name].astype(np.float64).reshape(each) for name in "sb")
    y: np.ndarray = grouped.reshape(x.shape) * scale + bias
    return silu_of(y) if silu else y


@needs_compiler
@given(
    n=st.integers(1, 3), groups=st.integers(1, 5), per_group=st.integers(1, 5),
    inner=st.lists(st.integers(1, 70), max_size=2), offset=st.sampled_from([0.0, 50.0]),
    silu=st.booleans(), threads=st.integers(1, 3), named=st.booleans(),
    dtype=st.sampled_from([np.float16, np.float32]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_it_gives_what_a_group_norm_gives(
    n: int, groups: int, per_group: int, inner: list[int], offset: float, silu: bool, threads: int,
    named: bool, dtype: type,
) -> None:  # fmt: skip
    x = (normal(n, groups * per_group, *inner, seed=1) + offset).astype(dtype)
    named_axes = ["n", x.shape[1], *(f"size_{axis}" for axis in range(len(inner)))]
    axes = {"x": named_axes} if named else None
    model, constants = group_norm(x, groups, silu=silu, axes=axes)
    low = lowered(model, PROFILE)
    assert ops(low) - {"Cast"} == {OPERATOR}
    result, wanted = run(low, x, threads), exact(x, constants, groups, silu=silu)
    assert result.shape == wanted.shape
    # A group whose numbers are near each other has a small deviation, by which all is divided.
    np.testing.assert_allclose(result, wanted, rtol=2e-6, atol=1e-5 if offset else 4e-6)


@needs_compiler
@pytest.mark.parametrize("shape", [(2, 6, 1), (1, 6, 37), (2, 4, 71, 131)], ids=str)
@pytest.mark.parametrize("flags", ["", "avx2 fma f16c", "avx2 fma f16c avx512f", "own"])
def test_every_instruction_set_gives_it(
    flags: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of less than a vector, and of more than one block."""
    if flags != "own":
        if not set(flags.split()) <= set(isa().split()[1:]):
            pytest.skip(f"this CPU has no {flags}")
        monkeypatch.setattr(operators, "isa", lambda: f"x86_64 {flags}")
    x = normal(*shape, seed=1)
    for silu in (False, True):
        model, constants = group_norm(x, 2, silu=silu)
        result, wanted = run(lowered(model, PROFILE), x), exact(x, constants, 2, silu=silu)
        np.testing.assert_allclose(result, wanted, rtol=2e-6, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("drift", [0.0, 40.0])
def test_a_mean_far_from_zero_costs_no_digits(drift: float, silu: bool) -> None:
    """With a drift, blocks of a group differ by more than their deviations."""
    x = normal(1, 4, 90, 110, seed=1) + np.float32(1000)
    x += np.linspace(0, drift, x.size, dtype=np.float32).reshape(x.shape)
    model, constants = group_norm(x, 2, silu=silu, plain=True)
    result, wanted = run(lowered(model, PROFILE), x), exact(x, constants, 2, silu=silu)
    np.testing.assert_allclose(result, wanted, rtol=5e-7, atol=1e-9)


@needs_compiler
@pytest.mark.parametrize("flags", ["", "avx2 fma f16c", "own"])
def test_silu_at_its_ends(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of zero makes the bias what SiLU gets."""
    if flags != "own":
        if not set(flags.split()) <= set(isa().split()[1:]):
            pytest.skip(f"this CPU has no {flags}")
        monkeypatch.setattr(operators, "isa", lambda: f"x86_64 {flags}")
    asked = np.concatenate([
        np.linspace(-110, 110, 4001), [-1e30, -3e4, -200, -88, -87.3, -87, -0.0, 0, 1e-30, 88.1,
        200, 3e4, 1e30]])  # fmt: skip
    nodes = [
        helper.make_node("GroupNormalization", ["x", "s", "b"], ["g"], num_groups=1),
        helper.make_node("Sigmoid", ["g"], ["sigmoid"]),
        helper.make_node("Mul", ["sigmoid", "g"], ["y"]),
    ]
    x = normal(1, len(asked), 3, seed=1)
    inputs = {"x": x, "s": np.zeros(len(asked), np.float32), "b": asked.astype(np.float32)}
    low = lowered(model_of(nodes, inputs, values={"g": x}), PROFILE)
    assert ops(low) == {OPERATOR}
    ready = session_of(low, 1)
    with np.errstate(over="ignore"):
        wanted = silu_of(inputs["b"].astype(np.float64))
    (result,) = ready.run(None, inputs)
    for column in range(3):
        np.testing.assert_allclose(result[0, :, column], wanted, rtol=5e-7, atol=1e-36)
    inputs["b"][:2] = np.nan, 1
    (result,) = ready.run(None, inputs)
    assert np.isnan(result[0, 0]).all()
    assert np.isfinite(result[0, 1]).all()


@needs_compiler
def test_what_is_no_number_stays_none_and_in_its_group() -> None:
    x = normal(1, 4, 5, 7, seed=1)
    x[0, 3, 2, 2] = np.nan
    model, _ = group_norm(x, 2)
    result = run(lowered(model, PROFILE), x)
    assert np.isnan(result[0, 2:]).all()
    assert np.isfinite(result[0, :2]).all()


@needs_compiler
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_epsilon_is_added_to_the_variance(epsilon: float) -> None:
    x = normal(2, 6, 40, seed=1) / 100
    model, constants = group_norm(x, 3, silu=False, epsilon=epsilon)
    wanted = exact(x, constants, 3, silu=False, epsilon=epsilon)
    np.testing.assert_allclose(run(lowered(model, PROFILE), x), wanted, rtol=2e-6, atol=1e-6)
    same = np.full((1, 6, 40), 7.3, np.float32)
    result = run(lowered(group_norm(same, 3, silu=False)[0], PROFILE), same)
    np.testing.assert_allclose(result[0], np.repeat(constants["b"][:, None], 40, 1), atol=1e-6)


@needs_compiler
def test_scale_and_bias_in_fp16_are_widened() -> None:
    x = normal(2, 8, 6, 5, seed=1).astype(np.float16)
    model, constants = group_norm(x, 4)
    low = lowered(model, PROFILE)
    np.testing.assert_allclose(run(low, x), exact(x, constants, 4), rtol=2e-6, atol=1e-6)


def readers(kind: str) -> list[tuple[str, list[str], list[str]]]:
    """What reads g and s beside SiLU, or in its place."""
    silu = [("Sigmoid", ["g"], ["s"]), ("Mul", ["g", "s"], ["p"])]
    return {
        "another node": [*silu, ("Neg", ["g"], ["n"]), ("Add", ["p", "n"], ["y"])],
        "the sigmoid's": [*silu, ("Add", ["p", "s"], ["y"])],
        "another product": [("Sigmoid", ["g"], ["s"]), ("Mul", ["s", "x"], ["y"])],
        "a square": [("Sigmoid", ["g"], ["s"]), ("Mul", ["s", "s"], ["y"])],
        "two sigmoids": [*silu[:1], ("Sigmoid", ["g"], ["t"]), ("Mul", ["s", "t"], ["y"])],
    }[kind]


@needs_compiler
@pytest.mark.parametrize(
    "kind", ["another node", "the sigmoid's", "another product", "a square", "two sigmoids"]
)
def test_what_others_read_stays(kind: str) -> None:
    x = {"x": normal(2, 6, 5, 7, seed=1)}
    constants = {"w": normal(6, seed=2), "b": normal(6, seed=3)}
    nodes = [helper.make_node("GroupNormalization", ["x", "w", "b"], ["g"], num_groups=3)]
    nodes += [helper.make_node(*each) for each in readers(kind)]
    model = model_of(nodes, x, ["y"], constants, values={"g": x["x"]})
    low = lowered(model, PROFILE)
    assert {OPERATOR, "Sigmoid", "Mul"} <= set(ops(low))
    np.testing.assert_allclose(run(low, x["x"]), reference(model, x)[0], rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("name", ["g", "sigmoid"])
def test_what_the_graph_gives_stays(name: str) -> None:
    x = normal(2, 6, 35, seed=1)
    model, _ = group_norm(x, 3)
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape))
    low = lowered(model, PROFILE)
    assert set(ops(low)) == {OPERATOR, "Sigmoid", "Mul"}
    results = session_of(low, 2).run(None, {"x": x})
    for result, wanted in zip(results, reference(model, {"x": x}), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("read_again", [False, True])
def test_the_input_is_overwritten_only_if_nothing_else_reads_it(read_again: bool) -> None:
    x = {"x": normal(2, 6, 33, 17, seed=1)}
    constants = {"w": normal(6, seed=2), "b": normal(6, seed=3)}
    nodes = [
        helper.make_node("Neg", ["x"], ["r"]),
        helper.make_node("GroupNormalization", ["r", "w", "b"], ["g"], num_groups=3),
        helper.make_node("Sigmoid", ["g"], ["s"]),
        helper.make_node("Mul", ["s", "g"], ["p"]),
        helper.make_node("Add", ["p", "r" if read_again else "x"], ["y"]),
    ]
    model = model_of(nodes, x, ["y"], constants, values={"g": x["x"]})
    low = lowered(model, PROFILE)
    assert set(ops(low)) == {"Neg", OPERATOR, "Add"}
    np.testing.assert_allclose(run(low, x["x"]), reference(model, x)[0], rtol=1e-5, atol=1e-5)


def test_norms_in_fp16_are_spelled_out() -> None:
    model, _ = group_norm(normal(1, 4, 6, seed=1).astype(np.float16), 2)
    low = lowered(model, Profile("fp16", norms="operator"))
    assert "LayerNormalization" in ops(low)
    assert OPERATOR not in ops(low)


@needs_compiler
def test_a_wrong_shape_is_refused_by_the_operator() -> None:
    x = normal(1, 4, 6, seed=1)
    low = lowered(group_norm(x, 2)[0], PROFILE)
    low.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 6
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="Group"):
        session_of(low, 1).run(None, {"x": normal(1, 6, 6)})
