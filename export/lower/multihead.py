"""The Attention operator as onnxruntime's MultiHeadAttention (domain com.microsoft), or our own.

onnxruntime has fused kernels behind both, on a GPU too; but Attention is of opset 23, where other
operators of a graph may lack kernels that they have had for years at older opsets.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from export.lower.edit import Edit, attribute, dtype_and_rank, operand, refuse, required, static_dim

DOMAIN = "com.microsoft"
_HEADS_FIRST = [0, 2, 1, 3]


OWN_DOMAIN = "addbench"
OPERATOR = "FusedAttention"
HEADS = range(32, 257)
"""Sizes of a head that it takes (backends/onnxrt), values' too: smaller ones would be filled up."""


def fuse(model: ir.Model, *, own: bool = False, bf16: bool = False) -> None:
    """Replace every Attention node.

    With `own` by our own operator, where that takes it; with `bf16` it rounds what it multiplies.

    Raises:
        PreconditionError: a mask, a key/value cache, a softcap, a second output, or fewer key heads
            than query heads.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "Attention":
            _check(node)
            _multihead(model, node, own, bf16)


def _check(node: ir.Node) -> None:
    other = "keep attention='op', or attention='matmul'"
    for index, what in ((3, "a mask"), (4, "a key cache"), (5, "a value cache")):
        if operand(node, index) is not None:
            raise refuse(node, f"it reads {what}", other)
    if attribute(node, "softcap", 0.0):
        raise refuse(node, "it has a softcap", other)
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise refuse(node, "more than its first output is used", other)


def _multihead(model: ir.Model, node: ir.Node, own: bool, bf16: bool) -> None:
    edit = Edit(model, node)
    q, k, v = (required(node, index) for index in range(3))
    _, rank = dtype_and_rank(node, q)
    if rank == 4:  # [B, H, L, D] -> [B, L, H*D]
        heads, kv_heads, size = static_dim(q, 1), static_dim(k, 1), static_dim(q, 3)
        alike = static_dim(v, 3) == size
        q, k, v = (
            edit("Reshape", edit("Transpose", each, perm=_HEADS_FIRST), [0, 0, -1])
            for each in (q, k, v)
        )
    else:
        heads, kv_heads = (attribute(node, f"{of}_num_heads", 0) for of in ("q", "kv"))
        width = static_dim(q, 2)
        size = width // heads if width and heads else None
        alike = static_dim(v, 2) == width
    if not heads or heads != kv_heads or not size:
        raise refuse(
            node,
            f"it has {heads} query heads of size {size}, and {kv_heads} key heads",
            "keep attention='op' for this graph",
        )
    scale = float(attribute(node, "scale", None) or 1 / math.sqrt(size))
    causal = int(attribute(node, "is_causal", 0))
    if own and alike and size in HEADS:
        result = edit(
            OPERATOR, q, k, v, domain=OWN_DOMAIN, heads=heads, scale=scale, causal=causal,
            bf16=int(bf16),
        )  # fmt: skip
        model.graph.opset_imports[OWN_DOMAIN] = 1
    else:
        result = edit(
            "MultiHeadAttention", q, k, v, domain=DOMAIN, num_heads=heads, scale=scale,
            unidirectional=causal,
        )  # fmt: skip
        model.graph.opset_imports[DOMAIN] = 1
    if rank == 4:
        result = edit("Transpose", edit("Reshape", result, [0, 0, heads, -1]), perm=_HEADS_FIRST)
    edit.replace(result)
