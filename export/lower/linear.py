"""Products with FP16 weights as the project's own operator for onnxruntime (backends/onnxrt).

onnxruntime computes in FP32 on a CPU and widens such weights once, when the graph is optimised:
twice the memory, and twice what a product reads of it. The operator reads them as they are stored.
The weights are laid out for it here, and written into a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from export.lower import storage
from export.lower.edit import (
    Edit,
    added,
    attribute,
    constant_of,
    initializer_of,
    operand,
    required,
    same_shape,
    static_dim,
)

DOMAIN = "addbench"
OPERATOR = "Linear"
FILE = "linear.data"
PANEL = 32
"""Columns that lie together in the weights; the depth is filled up to a multiple of it too."""
SMALLEST = 64 * 64
"""Numbers in a matrix of weights below which a product is too short for the operator to pay."""


def replace(model: ir.Model, folder: Path, *, bf16: bool = False) -> None:
    """Replace every product with FP16 weights, and what is added to it; the others stay.

    The weights, in the operator's layout, are written into a file in `folder`. With `bf16`, both
    sides of a product are rounded to it.
    """
    common_passes.RemoveUnusedNodesPass()(model)  # what an earlier pass left behind
    taken = [node for node in model.graph.all_nodes() if _weights(node) is not None]
    with (folder / FILE).open("wb") as file:
        for node in taken:
            _replace(model, node, file, bf16)
    if taken:
        model.graph.opset_imports[DOMAIN] = 1


def saved(graph: Path) -> int:
    """Bytes that a canonical graph's FP32 weights would take beyond those of the operator."""
    whole = 0
    for node in storage.reopen(graph).graph.all_nodes():
        if (weights := _weights(node)) is not None:
            whole += (4 - 2) * weights.depth * weights.columns
    return whole


@dataclass(frozen=True)
class _Weights:
    """Columns [first, first + columns) of an initializer [depth, ...], or of its transpose."""

    initializer: ir.Value
    depth: int
    first: int
    columns: int
    transposed: bool = False

    @property
    def name(self) -> str:
        end = self.first + self.columns
        return f"{self.initializer.name}_linear{'T' * self.transposed}_{self.first}_{end}"

    def array(self) -> np.ndarray:
        tensor = self.initializer.const_value
        assert tensor is not None  # it was asked for in _weights
        plain = storage.mapped(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor.numpy()
        whole = plain.T if self.transposed else plain
        return whole[:, self.first : self.first + self.columns]


def _weights(node: ir.Node) -> _Weights | None:
    """The FP16 weights of a product that the operator can take."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    value, transposed, columns = operand(node, 1), False, None
    if node.op_type == "Gemm":
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        if any(attribute(node, name, default) != default for name, default in plain.items()):
            return None
        transposed = bool(attribute(node, "transB", 0))
    if value is not None and (cut := _columns(value)) is not None:
        value, columns = cut
    found = initializer_of(value)
    if found is None or found.const_value is None or found.dtype != ir.DataType.FLOAT16:
        return None
    shape = tuple(found.const_value.shape.numpy())
    if len(shape) != 2 or shape[0] * shape[1] < SMALLEST:
        return None
    depth, width = shape[::-1] if transposed else shape
    first, stop = columns or (0, width)
    return _Weights(found, depth, first, min(stop, width) - first, transposed)


def _columns(value: ir.Value) -> tuple[ir.Value, tuple[int, int]] | None:
    """What `value` is a slice of, along its last axis, and from where to where."""
    node = value.producer()
    whole = None if node is None else operand(node, 0)
    if node is None or node.op_type != "Slice" or whole is None or whole.shape is None:
        return None
    start, stop, axes = (constant_of(operand(node, index)) for index in (1, 2, 3))
    if start is None or stop is None or axes is None or operand(node, 4) is not None:
        return None
    if axes.tolist() not in ([whole.shape.rank() - 1], [-1]) or start[0] < 0 or stop[0] < 0:
        return None
    return whole, (int(start[0]), int(stop[0]))


def pack(weights: np.ndarray) -> np.ndarray:
    """[K, N] as the operator wants it: [N/32, K/2, 32, 2], filled up with zeros."""
    depth, columns = (-(-side // PANEL) * PANEL for side in weights.shape)
    whole = np.zeros((depth, columns), np.float16)
    whole[: weights.shape[0], : weights.shape[1]] = weights
    pairs = whole.reshape(depth // 2, 2, columns // PANEL, PANEL)
    return np.ascontiguousarray(pairs.transpose(2, 0, 3, 1))


def _replace(model: ir.Model, node: ir.Node, file: BinaryIO, bf16: bool) -> None:
    weights = _weights(node)
    if weights is None:
        return
    name = weights.name
    if name not in model.graph.initializers:  # two products may share theirs
        packed = storage.written(file, pack(weights.array()), name)
        model.graph.register_initializer(packed)
    last, bias, residual, gone = node, None, None, [node]
    if node.op_type == "Gemm":
        bias = operand(node, 2)
        if bias is not None and not _is_bias(bias, weights):
            return
    elif (found := added(last)) is not None and _is_bias(found[1], weights):
        last, bias = found
        gone.append(last)
    if (found := added(last)) is not None and same_shape(found[1], last.outputs[0]):
        last, residual = found
        gone.append(last)
    edit = Edit(model, last)
    result = edit(
        OPERATOR,
        required(node, 0),
        model.graph.initializers[name],
        bias,
        residual,
        domain=DOMAIN,
        features=weights.columns,
        bf16=int(bf16),
    )
    edit.replace(result)
    for each in reversed(gone[:-1]):  # `last` is gone already
        if each.graph is not None:
            each.graph.remove(each, safe=True)


def _is_bias(value: ir.Value, weights: _Weights) -> bool:
    """Whether it is a vector of weights, as many as there are columns."""
    whole, (first, stop) = _columns(value) or (value, (0, weights.columns))
    return (
        initializer_of(whole) is not None
        and whole.dtype == ir.DataType.FLOAT
        and whole.shape is not None
        and whole.shape.rank() == 1
        and min(stop, static_dim(whole, 0) or 0) - first == weights.columns
    )
