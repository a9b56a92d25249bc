"""GroupNormalization by LayerNormalization or by an operator of the project's own, or both norms in
elementary operators."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from export.lower.edit import (
    Edit,
    attribute,
    dtype_and_rank,
    only_reader,
    operand,
    refuse,
    required,
    static_dim,
)

DOMAIN = "addbench"
OPERATOR = "GroupNorm"
MOST_AXES = 6
"""That its input may have."""


def decompose(model: ir.Model, statistics: str) -> None:
    """Spell out every GroupNormalization (opset 21 form) and LayerNormalization.

    Args:
        statistics: `float32` computes mean and variance in the dtype that the operator's
            `stash_type` asks for (FP32), `as-is` in the dtype of its input.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "GroupNormalization":
            _group(model, node, statistics)
        elif node.domain == "" and node.op_type == "LayerNormalization":
            _layer(model, node, statistics)


def by_layer(model: ir.Model) -> None:
    """Spell out every GroupNormalization with a LayerNormalization over each group.

    The same mean and variance, computed as precisely as the compiler does that operator's.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "GroupNormalization":
            _group(model, node, None)


def by_operator(model: ir.Model) -> None:
    """Make every GroupNormalization in FP32 the project's own operator (backends/onnxrt).

    A SiLU that alone reads the result becomes part of it. Other dtypes are spelled out by layer.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain != "" or node.op_type != "GroupNormalization":
            continue
        x = required(node, 0)
        dtype, rank = dtype_and_rank(node, x)
        if dtype != ir.DataType.FLOAT or rank > MOST_AXES:
            _group(model, node, None)
            continue
        silu = _silu(node)
        edit = Edit(model, silu[-1] if silu else node)
        result = edit(
            OPERATOR,
            x,
            required(node, 1),
            required(node, 2),
            domain=DOMAIN,
            groups=attribute(node, "num_groups", None),
            epsilon=attribute(node, "epsilon", 1e-5),
            silu=int(silu is not None),
        )
        result.dtype, result.shape = dtype, x.shape  # ONNX cannot infer them
        edit.replace(result)
        if silu and node.graph is not None:
            node.graph.remove([silu[0], node], safe=True)
        model.graph.opset_imports[DOMAIN] = 1


def _silu(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The Sigmoid and the Mul of a SiLU, if nothing else reads the output of `node`."""
    value = node.outputs[0]
    readers = {use.node for use in value.uses()}
    sigmoid = next((reader for reader in readers if reader.op_type == "Sigmoid"), None)
    if sigmoid is None or sigmoid.domain or len(readers) != 2 or value.is_graph_output():
        return None
    product = only_reader(sigmoid)
    if product is None or product.op_type != "Mul" or product.graph is not node.graph:
        return None
    return (sigmoid, product) if set(product.inputs) == {value, sigmoid.outputs[0]} else None


def instance(model: ir.Model) -> None:
    """Write both norms as torch's TorchScript exporter did at opset 16, in the dtype they have.

    Compilers that grew up with those graphs know the patterns, and compute the statistics inside
    of their own kernels: variances are no values of the graph that could overflow in FP16.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "GroupNormalization":
            edit = Edit(model, node)
            x = required(node, 0)
            number = dtype_and_rank(node, x)[0].numpy()
            groups = attribute(node, "num_groups", None)
            one, zero = np.ones(groups, number), np.zeros(groups, number)
            _ungroup(
                edit,
                x,
                edit(
                    "InstanceNormalization",
                    edit("Reshape", x, [0, groups, -1]),
                    one,
                    zero,
                    epsilon=attribute(node, "epsilon", 1e-5),
                ),
            )
        elif node.domain == "" and node.op_type == "LayerNormalization":
            _layer_by_division(model, node)


def _layer_by_division(model: ir.Model, node: ir.Node) -> None:
    edit = Edit(model, node)
    x, scale, bias = required(node, 0), required(node, 1), operand(node, 2)
    dtype, rank = dtype_and_rank(node, x)
    number = dtype.numpy()
    axes = list(range(attribute(node, "axis", -1) % rank - rank, 0))
    mean = edit("ReduceMean", x, axes, keepdims=1)
    centred = edit("Sub", x, mean)
    variance = edit("ReduceMean", edit("Pow", centred, np.array(2, number)), axes, keepdims=1)
    epsilon = np.array(attribute(node, "epsilon", 1e-5), number)
    deviation = edit("Sqrt", edit("Add", variance, epsilon))
    result = edit("Mul", edit("Div", centred, deviation), scale)
    if bias is not None:
        result = edit("Add", result, bias)
    if len(node.outputs) == 1:
        edit.replace(result)
    else:
        edit.replace(result, mean, edit("Reciprocal", deviation))


def _group(model: ir.Model, node: ir.Node, statistics: str | None) -> None:
    """X [N, C, ...], scale and bias [C]; mean and variance over each group of C/groups channels.

    `statistics` None: by a LayerNormalization of scale one and bias zero.
    """
    edit = Edit(model, node)
    x = required(node, 0)
    dtype, rank = dtype_and_rank(node, x)
    groups = attribute(node, "num_groups", None)
    grouped = edit("Reshape", x, [0, groups, -1])  # [N, groups, C/groups * ...]
    if statistics is None:
        dims = [dim for axis in range(1, rank) if (dim := static_dim(x, axis)) is not None]
        if len(dims) < rank - 1:
            raise refuse(node, "its sizes are not numbers", "keep norms='op' for this graph")
        size, number = math.prod(dims) // groups, dtype.numpy()
        normalized = edit(
            "LayerNormalization",
            grouped,
            np.ones(size, number),
            np.zeros(size, number),
            axis=-1,
            epsilon=attribute(node, "epsilon", 1e-5),
        )
    else:
        normalized, _, _ = _standardize(edit, grouped, dtype, [2], statistics)
    _ungroup(edit, x, normalized)


def _ungroup(edit: Edit, x: ir.Value, normalized: ir.Value) -> None:
    """normalized [N, groups, rest] takes x's shape again and each channel its scale and bias."""
    node = edit.node
    scale, bias = required(node, 1), required(node, 2)
    _, rank = dtype_and_rank(node, x)
    dims = [static_dim(x, axis) for axis in range(1, rank)]
    # 0: N as it comes in. Sizes that are not numbers are read off x when the graph runs.
    shape = edit("Shape", x) if None in dims else np.array([0, *dims], np.int64)
    restored = edit("Reshape", normalized, shape)
    if rank > 2:  # [C] -> [C, 1, 1]
        inner = list(range(1, rank - 1))
        scale, bias = edit("Unsqueeze", scale, inner), edit("Unsqueeze", bias, inner)
    edit.replace(edit("Add", edit("Mul", restored, scale), bias))


def _layer(model: ir.Model, node: ir.Node, statistics: str) -> None:
    """X normalised over its axes from `axis` on; scale and optional bias broadcast."""
    edit = Edit(model, node)
    x, scale = required(node, 0), required(node, 1)
    bias = operand(node, 2)
    dtype, rank = dtype_and_rank(node, x)
    first = attribute(node, "axis", -1) % rank
    normalized, mean, inverse = _standardize(edit, x, dtype, list(range(first, rank)), statistics)
    result = edit("Mul", normalized, scale)
    if bias is not None:
        result = edit("Add", result, bias)
    edit.replace(result, mean, inverse)


def _standardize(
    edit: Edit, x: ir.Value, dtype: ir.DataType, axes: list[int], statistics: str
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(x - mean) * inverse in x's dtype; the mean; inverse = 1 / sqrt(variance + epsilon)."""
    work = ir.DataType(attribute(edit.node, "stash_type", 1)) if statistics == "float32" else dtype
    epsilon = np.array(attribute(edit.node, "epsilon", 1e-5), work.numpy())
    wide = edit("Cast", x, to=work.value) if work != dtype else x
    mean = edit("ReduceMean", wide, axes, keepdims=1)
    centred = edit("Sub", wide, mean)
    variance = edit("ReduceMean", edit("Mul", centred, centred), axes, keepdims=1)
    inverse = edit("Reciprocal", edit("Sqrt", edit("Add", variance, epsilon)))
    normalized = edit("Mul", centred, inverse)
    if work != dtype:
        normalized = edit("Cast", normalized, to=dtype.value)
    return normalized, mean, inverse
