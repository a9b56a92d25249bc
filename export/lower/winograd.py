"""3x3 convolutions as WinogradConv, the project's own operator for onnxruntime on a CPU.

F(2x2, 3x3) of Lavin and Gray (2015): 16 products where the direct form has 36, or 9 where the image
is enlarged twice just before; `backends/ort_ops/winograd.cc` computes it. The weights of every
convolution are transformed when the graph is compiled, and take 16/9 of the memory (enlarging: as
much as before). What follows a convolution and only reads it, a sum with another image of its shape
and a Relu, goes into the operator.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.lower import storage
from export.lower.edit import (
    Edit,
    attribute,
    constant_of,
    initializer_of,
    operand,
    required,
    static_dim,
)

DOMAIN = "addbench"
OPERATOR = "WinogradConv"
ROWS = 8
"""Output channels that lie together in the transformed weights."""
SMALLEST = 256
"""Pixels of the image below which panels of tiles stay too empty (SDXL's smallest has 16 x 16)."""
WEIGHTS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
"""G: the weights of a tile are G w Gt."""
ENLARGED = WEIGHTS[[0, 1, 3]]
"""In an enlarged image the rows 1 and 2 of a tile are one: what the third makes of it is zero."""


def convolve(model: ir.Model) -> None:
    """Replace every convolution that the operator can take; the others stay."""
    for node in list(model.graph.all_nodes()):
        if _fits(node):
            _replace(model, node)
            model.graph.opset_imports[DOMAIN] = 1


def added_bytes(graph: Path) -> int:
    """What the transformed weights of a canonical graph take in FP32 beyond the plain ones."""
    model = storage.reopen(graph)
    return sum(
        4 * math.prod(each for each in weight.shape.numpy()) * 7 // 9
        for node in model.graph.all_nodes()
        if _fits(node) and _enlarged(node) is None
        if (weight := node.inputs[1]) is not None and weight.shape is not None
    )


def _fits(node: ir.Node) -> bool:
    if node.domain or node.op_type != "Conv":
        return False
    x, weight = operand(node, 0), operand(node, 1)
    if x is None or x.shape is None or weight is None or weight.shape is None:
        return False
    shape, sides = weight.shape, (static_dim(x, -2), static_dim(x, -1))
    filters, channels = static_dim(weight, 0), static_dim(weight, 1)
    return (
        shape.rank() == 4
        and (static_dim(weight, 2), static_dim(weight, 3)) == (3, 3)
        and filters is not None
        and filters % ROWS == 0
        and channels is not None
        and channels >= ROWS
        and None not in sides
        and math.prod(side or 0 for side in sides) >= SMALLEST
        and attribute(node, "group", 1) == 1
        and attribute(node, "auto_pad", "NOTSET") == "NOTSET"
        and list(attribute(node, "pads", [0] * 4)) == [1] * 4
        and set(attribute(node, "strides", [1])) == {1}
        and set(attribute(node, "dilations", [1])) == {1}
        and initializer_of(weight) is not None
    )


def _replace(model: ir.Model, node: ir.Node) -> None:
    weight, resize = required(node, 1), _enlarged(node)
    filters, channels = static_dim(weight, 0), static_dim(weight, 1)
    if filters is None or channels is None:
        return
    form = WEIGHTS if resize is None else ENLARGED
    last, residual, gone = node, None, [node]
    if (add := _only_reader(last)) is not None and add.op_type == "Add":
        other = next((v for v in add.inputs if v is not last.outputs[0]), None)
        if other is not None and _same_shape(other, last.outputs[0]):
            last, residual = add, other
            gone.append(add)
    if relu := (reader := _only_reader(last)) is not None and reader.op_type == "Relu":
        last = reader
        gone.append(reader)
    edit = Edit(model, last)
    # As a product, which the compiler folds: [filters * channels, 9] with [9, elements].
    matrix = np.kron(form, form).T.astype(np.float32)
    rows = edit("MatMul", edit("Reshape", weight, [-1, 9]), matrix)
    blocks = edit("Reshape", rows, [filters // ROWS, ROWS, channels, len(form) ** 2])
    result = edit(
        OPERATOR,
        required(node if resize is None else resize, 0),
        edit("Transpose", blocks, perm=[0, 3, 2, 1]),
        operand(node, 2),
        residual,
        domain=DOMAIN,
        upsample=int(resize is not None),
        relu=int(relu),
    )
    edit.replace(result)
    for each in reversed(gone[:-1]):  # `last` is gone already
        if each.graph is not None:
            each.graph.remove(each, safe=True)


def _only_reader(node: ir.Node) -> ir.Node | None:
    """The one node that reads the output of `node`, if nothing else does."""
    value = node.outputs[0]
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader = next(iter(uses)).node
    return None if reader.domain else reader


def _enlarged(node: ir.Node) -> ir.Node | None:
    """The Resize before a convolution, where all it does is to enlarge twice, nearest neighbour."""
    resize = required(node, 0).producer()
    if resize is None or resize.domain or resize.op_type != "Resize":
        return None
    scales = constant_of(operand(resize, 2))
    plain = {
        "mode": "nearest",
        "nearest_mode": "floor",
        "coordinate_transformation_mode": "asymmetric",
    }
    fits = (
        scales is not None
        and scales.tolist() == [1, 1, 2, 2]
        and all(attribute(resize, name, None) == value for name, value in plain.items())
        and attribute(resize, "axes", None) is None
        and _only_reader(resize) is node
    )
    return resize if fits else None


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    return one.shape is not None and other.shape is not None and one.shape == other.shape
