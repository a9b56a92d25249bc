"""Named axes become numbers."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common as common_passes
from onnxscript import optimizer

from core.errors import PreconditionError

FOLD_LIMIT = 1024
"""Constants of more elements are not folded: shape arithmetic is far below, weights above."""


def bind(model: ir.Model, axes: Mapping[str, int]) -> None:
    """Replace the named axes by numbers on every value, then fold the shape arithmetic."""
    evaluate(model, axes)
    optimizer.fold_constants(
        model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT, should_fold=_foldable
    )
    common_passes.RemoveUnusedNodesPass()(model)


def evaluate(model: ir.Model, axes: Mapping[str, int]) -> None:
    """Replace the named axes by numbers on every value; derived ones (`6*batch`) follow.

    Raises:
        PreconditionError: no input has such an axis, or the number is below 1.
    """
    named = {
        str(dim)
        for value in model.graph.inputs
        for dim in value.shape or ()
        if not isinstance(dim, int)
    }
    for axis, size in axes.items():
        if axis not in named or size < 1:
            raise PreconditionError(
                f"the axis {axis!r} of {model.graph.name} cannot be set to {size}",
                f"named axes of its inputs: {', '.join(sorted(named)) or 'none'}",
                "pass a whole number of at least 1 for one of these",
            )
    for graph in model.graphs():
        for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
            if value.shape is not None:
                value.shape = value.shape.evaluate(axes)


def _foldable(node: ir.Node) -> bool | None:
    """Never fold a weight, whatever its size or operator; else the folder's own rules."""
    weights = (value is not None and value.const_value is not None for value in node.inputs)
    if any(
        is_constant and isinstance(value.const_value, ir.ExternalTensor)
        for is_constant, value in zip(weights, node.inputs, strict=True)
        if value is not None
    ):
        return False
    return None
