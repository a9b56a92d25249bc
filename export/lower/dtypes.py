"""FP32 arithmetic over weights that stay stored in FP16."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_HALF, _FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")


def to_float32(model: ir.Model) -> None:
    """Make every FP16 value FP32, except the initializers: each gets a Cast behind it.

    The compiler folds these casts, once, at load. The weight file is not touched. Every FP16
    constant, attribute, input and output becomes FP32; what was FP32 stays.
    """
    for graph in model.graphs():
        casts = [
            _cast_behind(value) for value in graph.initializers.values() if value.dtype == _HALF
        ]
        for value in graph.inputs:
            _widen(value)
        for node in graph:
            _widen_attributes(node)
            for value in node.outputs:
                _widen(value)
        if casts:
            graph.insert_before(graph[0], casts)
    _drop_idle_casts(model)


def _cast_behind(initializer: ir.Value) -> ir.Node:
    """A Cast to FP32 that all users of `initializer` now read."""
    wide = ir.Value(
        name=f"{initializer.name}/float32", shape=initializer.shape, type=ir.TensorType(_FULL)
    )
    users = initializer.uses()
    cast = ir.node(
        "Cast", [initializer], {"to": _FULL.value}, outputs=[wide], name=f"{wide.name}/Cast"
    )
    for user, index in tuple(users):
        if user is not cast:
            user.replace_input_with(index, wide)
    return cast


def _widen(value: ir.Value) -> None:
    if value.dtype == _HALF:
        value.dtype = _FULL


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _HALF:
            wide = ir.tensor(attribute.value.numpy().astype(np.float32), name=attribute.value.name)
            node.attributes[name] = ir.AttrTensor(name, wide)
        elif name in _DTYPE_ATTRIBUTES and attribute.value == _HALF:
            node.attributes[name] = ir.AttrInt64(name, _FULL.value)


def _drop_idle_casts(model: ir.Model) -> None:
    """Remove casts that cast nothing any more (FP32 to FP32), except at a graph's output."""
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Cast" or node.inputs[0] is None or node.graph is None:
            continue
        source, result = node.inputs[0], node.outputs[0]
        if source.dtype == result.dtype == _FULL and not result.is_graph_output():
            ir.convenience.replace_all_uses_with(result, source)
            node.graph.remove(node, safe=True)
