"""Products with 8-bit weights as the project's own operator: what it computes and refuses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import INSTRUCTION_SETS, build_for, needs_compiler, normal, session_of
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.lower.linear import DOMAIN
from export.quantize.integers import quantise_blocks, restore_blocks
from export.quantize.rewrite import pack_bytes

Arrays = dict[str, np.ndarray]


def product(
    rows: tuple[int, ...], depth: int, columns: int, block: int, *, bias: bool = True,
    residual: bool = True, other: Mapping[str, int] | None = None,
) -> tuple[ModelProto, Arrays, np.ndarray]:  # fmt: skip
    """The operator, what it reads, and what it is to give; `other`: attributes that differ."""
    numbers, scales = quantise_blocks(depth**-0.5 * normal(depth, columns, seed=2), 8, block)
    packed, spread = pack_bytes(numbers, scales)
    constants = {"numbers": packed, "scales": spread, "bias": normal(columns, seed=3)}
    inputs = {"x": normal(*rows, depth, seed=1), "z": normal(*rows, columns, seed=4)}
    node = helper.make_node(
        "LinearBytes", ["x", "numbers", "scales", "bias" * bias, "z" * residual], ["y"],
        domain=DOMAIN, **{"features": columns, "block": block, **(other or {})},
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (*rows, None))
         for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (*rows, None))],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    restored = restore_blocks(numbers, scales, 8, depth).astype(np.float64)
    return model, inputs, inputs["x"] @ restored + bias * constants["bias"] + residual * inputs["z"]


def holds(model: ModelProto, inputs: Arrays, wanted: np.ndarray, threads: int = 2) -> None:
    result = session_of(model, threads).run(["y"], inputs)[0]
    assert result.shape == wanted.shape
    np.testing.assert_allclose(result, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@needs_compiler
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    depth=st.integers(1, 700), columns=st.integers(1, 200), threads=st.integers(1, 3),
    block=st.sampled_from([16, 32, 64, 128, 256]), bias=st.booleans(), residual=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_it_gives_what_the_restored_weights_give(
    rows: tuple[int, ...], depth: int, columns: int, threads: int, block: int, bias: bool,
    residual: bool,
) -> None:  # fmt: skip
    asked = product(rows, depth, columns, block, bias=bias, residual=residual)
    holds(*asked, threads)


@needs_compiler
@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("rows", [(1,), (13,), (300,)], ids=str)
@pytest.mark.parametrize("flags", INSTRUCTION_SETS)
def test_every_instruction_set_gives_it(
    flags: str, rows: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depths beyond one block of weights, columns that fill no panel."""
    build_for(flags, monkeypatch)
    holds(*product(rows, 2100, 72, block))


@needs_compiler
@pytest.mark.parametrize("block", [0, 3, 24, 512])
def test_a_block_that_scales_cannot_have_is_refused(block: int) -> None:
    model, _, _ = product((3,), 64, 64, 32, other={"block": block})
    with pytest.raises(Exception, match="LinearBytes wants a block"):
        session_of(model, 1)


@needs_compiler
def test_wrong_shapes_are_refused_by_the_operator() -> None:
    model, inputs, _ = product((3,), 100, 64, 32)
    with pytest.raises(Exception, match="LinearBytes wants x"):
        session_of(model, 1).run(None, inputs | {"x": normal(3, 160)})
    model, inputs, _ = product((3,), 100, 64, 32, other={"features": 128})
    with pytest.raises(Exception, match="LinearBytes wants x"):
        session_of(model, 1).run(None, inputs)
