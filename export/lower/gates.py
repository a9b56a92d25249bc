"""A product that is cut into halves as two products of half the weights.

GEGLU projects to values and gates in one product and splits the result. A CPU copies both halves
then (in SDXL's UNet step 70 ms of 4.9 s); the weights are cut once instead, when the compiler folds
constants.
"""

from __future__ import annotations

import onnx_ir as ir

from export.lower.edit import Edit, attribute, constant_of, initializer_of, operand, static_dim


def halve(model: ir.Model) -> None:
    """Rewrite every Split into two equal parts, along the last axis, of `x @ weight + bias`.

    The bias is optional; a product or sum that something else reads too stays as it is.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "Split" and len(node.outputs) == 2:
            _halve(model, node)


def _halve(model: ir.Model, node: ir.Node) -> None:
    whole = node.inputs[0]
    if whole is None or whole.shape is None or not _read_once(whole):
        return
    rank, width = whole.shape.rank(), static_dim(whole, -1)
    sizes = constant_of(operand(node, 1))
    if (
        width is None
        or width % 2
        or attribute(node, "axis", 0) % rank != rank - 1
        or (sizes is not None and sizes[0] != sizes[1])
    ):
        return
    matmul, bias = whole.producer(), None
    if matmul is not None and matmul.op_type == "Add":
        left, right = matmul.inputs
        product, bias = (right, left) if _is_vector(left) else (left, right)
        if product is None or not _is_vector(bias) or not _read_once(product):
            return
        matmul = product.producer()
    if matmul is None or matmul.op_type != "MatMul":
        return
    x, weight = matmul.inputs
    if weight is None or weight.shape is None or weight.shape.rank() != 2:
        return
    if initializer_of(weight) is None:  # not a weight: nothing folds its halves
        return
    edit, half, halves = Edit(model, node), width // 2, []
    for start in (0, half):
        columns = edit("Slice", weight, [start], [start + half], [1])
        result = edit("MatMul", x, columns)
        if bias is not None:
            result = edit("Add", result, edit("Slice", bias, [start], [start + half], [0]))
        halves.append(result)
    edit.replace(*halves)


def _read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _is_vector(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and value.shape.rank() == 1
