"""ArgMax of integers over their values in FP32."""

from __future__ import annotations

import onnx_ir as ir

from export.lower.edit import Edit, dtype_and_rank, required

_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


def to_float32(model: ir.Model) -> None:
    """Cast what every ArgMax of integers reads to FP32.

    The pooled embedding is taken where the token id is highest, or is that of the end of text: FP32
    is exact up to 2**24, far beyond any vocabulary. FP16 would not do: it takes 49406 and 49407,
    start and end of text, for the same number.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "ArgMax":
            compared = required(node, 0)
            dtype, _ = dtype_and_rank(node, compared)
            if dtype in _INTEGERS:
                edit = Edit(model, node)
                wide = edit("Cast", compared, to=ir.DataType.FLOAT.value)
                found = edit("ArgMax", wide, **{k: a.value for k, a in node.attributes.items()})
                edit.replace(found)
