"""3x3 convolutions as WinogradConv, the project's own operator for onnxruntime on a CPU.

F(2x2, 3x3) of Lavin and Gray (2015): 16 products where the direct form has 36, or 9 where the image
is enlarged twice just before; `backends/onnxrt/winograd.cc` computes it. The weights are
transformed here, and take 16/9 of the memory (enlarging: as much as before). What follows a
convolution and alone reads it, a sum with another image of its shape and a Relu, goes into the
operator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from export.lower import storage
from export.lower.edit import (
    Edit,
    attribute,
    constant_of,
    initializer_of,
    only_reader,
    operand,
    required,
    same_shape,
    static_dim,
)

DOMAIN = "addbench"
OPERATOR = "WinogradConv"
FILE = "winograd.data"
ROWS = 8
"""Output channels that lie together in the transformed weights."""
SMALLEST = 256
"""Pixels of the image below which panels of tiles stay too empty (SDXL's smallest has 16 x 16)."""
WEIGHTS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
"""G: the weights of a tile are G w Gt."""
ENLARGED = WEIGHTS[[0, 1, 3]]
"""In an enlarged image the rows 1 and 2 of a tile are one: what the third makes of it is zero."""


def convolve(model: ir.Model, folder: Path) -> None:
    """Replace every convolution that the operator can take; the others stay.

    The transformed weights are written into a file in `folder`: a compiler that folds them itself
    holds them several times (SDXL's UNet: 22 GB, not 14).
    """
    taken = [node for node in model.graph.all_nodes() if _fits(node)]
    with (folder / FILE).open("wb") as file:
        for node in taken:
            _replace(model, node, file)
    if taken:
        model.graph.opset_imports[DOMAIN] = 1


@dataclass(frozen=True)
class Sizes:
    """Bytes, in FP32, of the weights that are transformed: as they were, and as they become."""

    plain: int
    transformed: int

    @property
    def added(self) -> int:
        return self.transformed - self.plain


def sizes(graph: Path) -> Sizes:
    """Of a canonical graph; its weights are not read."""
    plain = transformed = 0
    for node in storage.reopen(graph).graph.all_nodes():
        if _fits(node):
            filters = 4 * (static_dim(required(node, 1), 0) or 0)
            filters *= static_dim(required(node, 1), 1) or 0
            plain += 9 * filters
            transformed += len(_form(node)) ** 2 * filters
    return Sizes(plain, transformed)


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


def _form(node: ir.Node) -> np.ndarray:
    return WEIGHTS if _enlarged(node) is None else ENLARGED


def _transformed(node: ir.Node, file: BinaryIO) -> ir.Value:
    """The weights [K, C, 3, 3] as the operator wants them, [K/8, elements, C, 8], in `file`."""
    weight = initializer_of(required(node, 1))
    if weight is None or weight.const_value is None:
        raise ValueError(f"{node.name} has no constant weights")
    tensor, form = weight.const_value, _form(node)
    plain = storage.mapped(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor.numpy()
    filters, channels = plain.shape[:2]
    matrix = np.kron(form, form).T.astype(np.float32)  # [9, elements]
    products = plain.reshape(-1, 9).astype(np.float32) @ matrix
    blocks = products.reshape(filters // ROWS, ROWS, channels, -1).transpose(0, 3, 2, 1)
    return storage.written(file, blocks, f"{weight.name}_winograd{len(form)}")


def _replace(model: ir.Model, node: ir.Node, file: BinaryIO) -> None:
    resize = _enlarged(node)
    weights = _transformed(node, file)
    if weights.name not in model.graph.initializers:  # two convolutions may share theirs
        model.graph.register_initializer(weights)
    weights = model.graph.initializers[weights.name or ""]
    last, residual, gone = node, None, [node]
    if (add := only_reader(last)) is not None and add.op_type == "Add":
        other = next((v for v in add.inputs if v is not last.outputs[0]), None)
        if other is not None and same_shape(other, last.outputs[0]):
            last, residual = add, other
            gone.append(add)
    if relu := (reader := only_reader(last)) is not None and reader.op_type == "Relu":
        last = reader
        gone.append(reader)
    edit = Edit(model, last)
    result = edit(
        OPERATOR,
        required(node if resize is None else resize, 0),
        weights,
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
        and only_reader(resize) is node
    )
    return resize if fits else None
