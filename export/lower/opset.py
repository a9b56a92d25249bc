"""From opset 23 down to one between 16 and 22.

ONNX's own schemas say which operators changed. A node whose operator did is converted where its
signature is another one, checked against the older signature, and refused by name where that
cannot say the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from export.lower.edit import (
    Edit,
    attribute,
    constant_of,
    dtype_and_rank,
    operand,
    refuse,
    required,
    static_dim,
)
from export.lower.profile import CANONICAL_OPSET

_HINTS = {
    "Attention": "give the profile attention='matmul'",
    "GroupNormalization": "give the profile norms='decomposed'",
    "LayerNormalization": "give the profile norms='decomposed'",
}

# Values of an attribute that an operator learned later: (operator, attribute) -> value -> opset.
_NEW_VALUES: dict[tuple[str, str], dict[str, int]] = {
    ("Resize", "coordinate_transformation_mode"): {"half_pixel_symmetric": 19},
    ("Pad", "mode"): {"wrap": 19},
    ("ScatterElements", "reduction"): {"max": 18, "min": 18},
    ("ScatterND", "reduction"): {"max": 18, "min": 18},
    ("GridSample", "mode"): {"linear": 20, "cubic": 20},
}


def convert(model: ir.Model, target: int) -> None:
    """Take every node of the default domain from opset 23 to `target`.

    Raises:
        PreconditionError: an operator, attribute or dtype that opset `target` does not have, by
            the name of the operator and the node.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain != "":
            continue
        since, converter = _CONVERTERS.get(node.op_type, (0, None))
        if converter is not None and target < since:
            converter(model, node)
    model.graph.opset_imports[""] = target
    for node in model.graph.all_nodes():
        if node.domain == "":
            _fit(node, target)


def _fit(node: ir.Node, target: int) -> None:
    """Check `node` against its operator at opset `target`; drop attributes that say the default."""
    new, old = _schema(node, CANONICAL_OPSET), _schema(node, target)
    hint = _HINTS.get(node.op_type, "pick a profile with a newer opset")
    if new is None or old is None:
        raise refuse(node, f"opset {target} has no {node.op_type}", hint)
    if old.since_version == new.since_version:
        return
    for name, known in new.attributes.items():
        default = _default(known)
        value = attribute(node, name, default)
        learned = _NEW_VALUES.get((node.op_type, name), {}).get(value, 0)
        if name not in old.attributes:
            if value != default:
                raise refuse(node, f"opset {target} has no attribute {name}={value}", hint)
            node.attributes.pop(name, None)
        elif target < learned:
            raise refuse(node, f"{name}={value} is of opset {learned}", hint)
    _check_operands(node, old, target, hint)


def _schema(node: ir.Node, version: int) -> Any:
    """The operator's schema as of opset `version`, or None where it has none."""
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    return None if schema.deprecated else schema


def _check_operands(node: ir.Node, old: Any, target: int, hint: str) -> None:
    """Number and dtype of inputs and outputs against the older signature `old`."""
    allowed = {each.type_param_str: each.allowed_type_strs for each in old.type_constraints}
    for values, formals in ((node.inputs, old.inputs), (node.outputs, old.outputs)):
        for index, value in enumerate(values):
            if value is None:
                continue
            variadic = (
                formals and formals[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
            )
            if index >= len(formals) and not variadic:
                raise refuse(node, f"{value.name} is one operand too many at opset {target}", hint)
            formal = formals[min(index, len(formals) - 1)]
            if value.dtype is None:
                continue
            tensor = f"tensor({value.dtype.name.lower()})"
            if tensor not in allowed.get(formal.type_str, [formal.type_str]):
                raise refuse(node, f"opset {target} takes no {tensor} for {formal.name}", hint)


def _default(schema: Any) -> Any:
    """Default of a schema's attribute in the form that the graph's attributes have, or None."""
    value = (
        onnx.helper.get_attribute_value(schema.default_value) if schema.default_value.name else None
    )
    return value.decode() if isinstance(value, bytes) else value


def _split(model: ir.Model, node: ir.Node) -> None:
    """`num_outputs` (18): equal parts need no word; with a shorter last part, sizes are written."""
    parts = attribute(node, "num_outputs", None)
    node.attributes.pop("num_outputs", None)
    if parts is None or operand(node, 1) is not None:
        return
    source = required(node, 0)
    _, rank = dtype_and_rank(node, source)
    size = static_dim(source, attribute(node, "axis", 0) % rank)
    if size is None:
        raise refuse(node, "the axis that it splits is not a number", "set the profile's batch")
    part = math.ceil(size / parts)
    if size % parts:
        sizes = np.array([part] * (parts - 1) + [size - part * (parts - 1)], np.int64)
        node.resize_inputs(2)
        node.replace_input_with(1, Edit(model, node).constant(sizes))


def _reduce(model: ir.Model, node: ir.Node) -> None:
    """`axes` from input to attribute (18)."""
    empty_is_idle = attribute(node, "noop_with_empty_axes", 0)
    node.attributes.pop("noop_with_empty_axes", None)
    given = operand(node, 1)
    axes = constant_of(given)
    if given is not None and axes is None:
        raise refuse(node, "its axes are computed", "export it with constant axes")
    if axes is None or axes.size == 0:
        if empty_is_idle:
            raise refuse(node, "it reduces over no axis", "leave the operator out of the graph")
    else:
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes])
    if len(node.inputs) > 1:
        node.resize_inputs(1)


def _gelu(model: ir.Model, node: ir.Node) -> None:
    """Gelu (20): 0.5 x (1 + erf(x / sqrt 2)), or the tanh approximation of it."""
    edit = Edit(model, node)
    x = required(node, 0)
    number = dtype_and_rank(node, x)[0].numpy()

    def scalar(value: float) -> np.ndarray:
        return np.array(value, number)

    if attribute(node, "approximate", "none") == "tanh":
        cube = edit("Mul", edit("Mul", x, x), x)
        inner = edit("Add", x, edit("Mul", cube, scalar(0.044715)))
        bend = edit("Tanh", edit("Mul", inner, scalar(math.sqrt(2 / math.pi))))
    else:
        bend = edit("Erf", edit("Mul", x, scalar(math.sqrt(0.5))))
    half = edit("Mul", x, scalar(0.5))
    edit.replace(edit("Mul", half, edit("Add", bend, scalar(1))))


def _resize(model: ir.Model, node: ir.Node) -> None:
    """`axes` (18): scales are written for every axis. `antialias` 1 has no older form."""
    axes = attribute(node, "axes", None)
    if axes is None:
        return
    x, scales = required(node, 0), constant_of(operand(node, 2))
    if scales is None or operand(node, 1) is not None:
        raise refuse(node, "it has axes, and no constant scales", "export it without axes")
    _, rank = dtype_and_rank(node, x)
    full = np.ones(rank, np.float32)
    full[list(axes)] = scales
    node.attributes.pop("axes")
    node.replace_input_with(2, Edit(model, node).constant(full))


def _pad(model: ir.Model, node: ir.Node) -> None:
    """`axes` (18): pads are written for every axis."""
    if operand(node, 3) is None:
        return
    x, pads, axes = (
        required(node, 0),
        constant_of(operand(node, 1)),
        constant_of(operand(node, 3)),
    )
    if pads is None or axes is None:
        raise refuse(node, "its pads or axes are computed", "export it with constant pads")
    _, rank = dtype_and_rank(node, x)
    full = np.zeros((2, rank), np.int64)
    full[:, axes] = pads.reshape(2, -1)
    node.replace_input_with(1, Edit(model, node).constant(full.reshape(-1)))
    node.resize_inputs(3)


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_CONVERTERS: dict[str, tuple[int, Callable[[ir.Model, ir.Node], None]]] = {
    "Split": (18, _split),
    "Resize": (18, _resize),
    "Pad": (18, _pad),
    "Gelu": (20, _gelu),
    **{f"Reduce{kind}": (18, _reduce) for kind in _REDUCTIONS},
}
"""Operator -> the opset of its new signature, and what writes a node in the older one."""
