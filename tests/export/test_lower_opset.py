"""Opset 23 taken down to an older one: what it can say stays the same, the rest is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from lowering import Arrays, lowered, model_of, normal, reference, run
from onnx import TensorProto, helper

from core.errors import PreconditionError
from export.lower import Profile
from export.lower import opset as opset_pass

OLD = Profile("old", opset=17)

IMAGE = normal(2, 3, 6, 4)
CONVERTED: dict[str, tuple[onnx.NodeProto, Arrays]] = {
    "even split": (helper.make_node("Split", ["x"], ["y", "z"], axis=2, num_outputs=2), {}),
    "uneven split": (helper.make_node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2), {}),
    "gelu": (helper.make_node("Gelu", ["x"], ["y"]), {}),
    "tanh gelu": (helper.make_node("Gelu", ["x"], ["y"], approximate="tanh"), {}),
    "resize by axes": (
        helper.make_node("Resize", ["x", "", "s"], ["y"], axes=[3, 2], mode="nearest"),
        {"s": np.array([2, 3], np.float32)},
    ),
    "resize": (
        helper.make_node(
            "Resize", ["x", "", "s"], ["y"],
            mode="linear", antialias=0, keep_aspect_ratio_policy="stretch",
        ),
        {"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "pad by axes": (
        helper.make_node("Pad", ["x", "p", "c", "a"], ["y"]),
        {"p": np.array([1, 2, 3, 4]), "c": np.array(7, np.float32), "a": np.array([2, -1])},
    ),
    "pad": (
        helper.make_node("Pad", ["x", "p"], ["y"], mode="reflect"),
        {"p": np.array([0, 0, 1, 2, 0, 0, 3, 1])},
    ),
    "cast": (helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16, saturate=1), {}),
    "average": (helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2]), {}),
    "reshape": (
        helper.make_node("Reshape", ["x", "p"], ["y"], allowzero=1), {"p": np.array([-1, 8])}
    ),
    **{
        f"{op} {axes}": (
            helper.make_node(op, ["x"] + ["a"] * (axes is not None), ["y"], keepdims=0),
            {} if axes is None else {"a": np.array(axes)},
        )
        for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSum", "ReduceProd")
        for axes in (None, [1, -1])
    },
}  # fmt: skip


@pytest.mark.parametrize("target", [17, 18, 20])
@pytest.mark.parametrize("case", CONVERTED)
def test_an_operator_means_the_same_at_an_older_opset(case: str, target: int) -> None:
    node, constants = CONVERTED[case]
    model = model_of([node], {"x": IMAGE}, list(node.output), constants)
    result = lowered(model, replace(OLD, opset=target))
    assert result.opset_import[0].version == target
    onnx.checker.check_model(result, full_check=True)
    expected = reference(model, {"x": IMAGE})
    for found, wanted in zip(run(result, {"x": IMAGE}), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[onnx.NodeProto, Arrays, str]] = {
    "new operator": (helper.make_node("Mish", ["x"], ["y"], name="n"), {}, "no Mish"),
    "attention": (
        helper.make_node("Attention", ["x"] * 3, ["y"], name="n"), {}, "attention='matmul'"
    ),
    "group norm": (
        helper.make_node("GroupNormalization", ["x", "s", "s"], ["y"], name="n", num_groups=3),
        {"s": np.ones(3, np.float32)},
        "norms='decomposed'",
    ),
    "antialias": (
        helper.make_node("Resize", ["x", "", "s"], ["y"], name="n", mode="linear", antialias=1),
        {"s": np.array([1, 1, 0.5, 0.5], np.float32)},
        "antialias=1",
    ),
    "wrap": (
        helper.make_node("Pad", ["x", "p"], ["y"], name="n", mode="wrap"),
        {"p": np.zeros(8, np.int64)},
        "mode=wrap",
    ),
    "scatter": (
        helper.make_node("ScatterElements", ["x", "i", "x"], ["y"], name="n", reduction="max"),
        {"i": np.zeros(IMAGE.shape, np.int64)},
        "reduction=max",
    ),
    "grid": (
        helper.make_node("GridSample", ["x", "g"], ["y"], name="n"),
        {"g": normal(2, 3, 3, 2)},
        "mode=linear",
    ),
    "dilated average": (
        helper.make_node(
            "AveragePool", ["x"], ["y"], name="n", kernel_shape=[2, 2], dilations=[2, 2]
        ),
        {},
        "dilations",
    ),
    "dtype": (
        helper.make_node("Sin", ["h"], ["y"], name="n"),
        {"h": np.array(0.5, ml_dtypes.bfloat16)},
        "bfloat16",
    ),
    "quantised dtype": (
        helper.make_node(
            "QuantizeLinear", ["h", "h"], ["y"], name="n", output_dtype=TensorProto.INT8
        ),
        {"h": np.array(0.5, np.float16)},
        "output_dtype",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_older_opset_cannot_say_is_refused_by_name(case: str) -> None:
    node, constants, words = REFUSED[case]
    with pytest.raises(PreconditionError, match=f"{node.op_type} n ") as raised:
        lowered(model_of([node], {"x": IMAGE}, constants=constants), OLD)
    assert words in str(raised.value)


def test_a_split_of_a_named_axis_is_refused_until_the_batch_is_set() -> None:
    node = helper.make_node("Split", ["x"], ["y", "z"], name="n", axis=0, num_outputs=2)
    model = model_of([node], {"x": IMAGE}, ["y", "z"], axes={"x": ["batch", 3, 6, 4]})
    with pytest.raises(PreconditionError, match="Split n"):
        lowered(model, OLD)
    first, second = run(lowered(model, replace(OLD, batch=3)), {"x": normal(3, 3, 6, 4)})
    assert (first.shape[0], second.shape[0]) == (2, 1)


def schema_at(name: str, opset: int) -> Any:
    try:
        schema = onnx.defs.get_schema(name, opset, "")
    except onnx.defs.SchemaError:
        return None
    return None if schema.deprecated else schema


OPERATORS = sorted(
    {each.name for each in onnx.defs.get_all_schemas_with_history() if each.domain == ""}
)
NEWER = [name for name in OPERATORS if schema_at(name, 23) and not schema_at(name, 17)]


@pytest.mark.parametrize("name", [name for name in NEWER if name != "Gelu"])
def test_every_operator_newer_than_opset_17_is_refused(name: str) -> None:
    """All that ONNX knows; Gelu, the exception, is spelled out."""
    schema = schema_at(name, 23)
    inputs = [ir.val(f"in_{index}") for index in range(schema.min_input)]
    node = ir.Node("", name, inputs, num_outputs=schema.min_output, name="n")
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 23}, name="g")
    with pytest.raises(PreconditionError, match=f"{name} n "):
        opset_pass.convert(ir.Model(graph, ir_version=10), 17)


def test_operators_whose_defaults_changed_are_known() -> None:
    """`convert` leaves out attributes that a node leaves out: sound while defaults stay."""
    changed = {
        name
        for name in OPERATORS
        if (new := schema_at(name, 23)) and (old := schema_at(name, 17))
        for key in old.attributes
        if key in new.attributes
        and old.attributes[key].default_value != new.attributes[key].default_value
    }
    assert changed == {"GridSample"}  # whose new default, `linear`, is refused
