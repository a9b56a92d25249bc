"""Constants within FP16's range, for compilers that convert an FP32 graph to FP16 by themselves.

There a constant beyond 65504 becomes infinity: the lowest FP32 number, with which masks hide keys,
turns scores to minus infinity, and minus infinity less itself is NaN in a softmax. Clipped to the
lowest FP16 number it hides a key as well.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.lower.storage import mapped

LARGEST = float(np.finfo(np.float16).max)
_WIDER = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


def clip(model: ir.Model) -> None:
    """Clip every constant of a wider float type to FP16's range; the type stays.

    Weights on disk are looked at through a memory map; one that is beyond the range moves into the
    graph, all others stay where they are.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and (fitting := _fitting(tensor)) is not None:
                value.const_value = ir.tensor(fitting, tensor.dtype, name=value.name)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR:
                    fitting = _fitting(attribute.value)
                    if fitting is not None:
                        kept = ir.tensor(fitting, attribute.value.dtype, name=attribute.value.name)
                        node.attributes[name] = ir.AttrTensor(name, kept)
                elif node.op_type == "Constant" and attribute.type == ir.AttributeType.FLOAT:
                    node.attributes[name] = ir.AttrFloat32(
                        name, float(np.clip(attribute.value, -LARGEST, LARGEST))
                    )


def _fitting(tensor: ir.TensorProtocol) -> np.ndarray | None:
    """The clipped array, or None for a tensor that fits (not-a-number is left for others)."""
    if tensor.dtype not in _WIDER or not tensor.size:
        return None
    array = mapped(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor.numpy()
    if array.min() >= -LARGEST and array.max() <= LARGEST:
        return None
    return np.clip(array, -LARGEST, LARGEST).astype(array.dtype)
