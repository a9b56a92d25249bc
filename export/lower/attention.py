"""The Attention operator as MatMul, Softmax, MatMul.

Follows the operator's text in opset 23: Q and K are each scaled by sqrt(scale), then
scores -> softcap -> mask -> softmax (in `softmax_precision`) -> weighted sum of V. Self-attention
may be cut into blocks of queries: every block sees all keys, so nothing changes but the size of
what is in memory at a time.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from core.errors import PreconditionError
from export.lower.edit import (
    Edit,
    attribute,
    constant_of,
    dtype_and_rank,
    operand,
    refuse,
    required,
    static_dim,
)


def decompose(model: ir.Model, block: int = 0) -> None:
    """Spell out every Attention node; self-attention `block` queries at a time (0: all at once).

    Masked scores are lowered by the dtype's lowest finite number, not by infinity, which some
    FP16 compilers do not take. A query whose keys a boolean mask hides all gives zeros, as the
    operator says; one that a float mask of infinities hides has no defined result here.

    Raises:
        PreconditionError: a key/value cache, fewer key heads than query heads, a second output,
            or causal masking over lengths that are not numbers.
    """
    if block < 0:
        raise PreconditionError(
            f"attention_block={block} is negative", "it counts queries", "use 0 for no blocks"
        )
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "Attention":
            _check(node)
            _attention(model, node, block)


def _check(node: ir.Node) -> None:
    if any(operand(node, index) is not None for index in (4, 5)):
        raise refuse(node, "it reads a key/value cache", "keep attention='op' for this graph")
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise refuse(node, "more than its first output is used", "keep attention='op'")


def _attention(model: ir.Model, node: ir.Node, block: int) -> None:
    edit = Edit(model, node)
    q, k, v = (required(node, index) for index in range(3))
    dtype, rank = dtype_and_rank(node, q)
    number = dtype.numpy()
    queries, keys = static_dim(q, -2), static_dim(k, -2)
    if rank == 3:
        heads, kv_heads = (attribute(node, f"{of}_num_heads", 0) for of in ("q", "kv"))
        width = static_dim(q, 2)
        head_size = width // heads if width and heads else None
        # [B, L, H*D] -> [B, H, L, D]; K at once into [B, H, D, S]
        split = [0, 0, heads, -1]
        q = edit("Transpose", edit("Reshape", q, split), perm=[0, 2, 1, 3])
        k = edit("Transpose", edit("Reshape", k, split), perm=[0, 2, 3, 1])
        v = edit("Transpose", edit("Reshape", v, split), perm=[0, 2, 1, 3])
    else:
        heads, kv_heads, head_size = static_dim(q, 1), static_dim(k, 1), static_dim(q, 3)
        k = edit("Transpose", k, perm=[0, 1, 3, 2])
    if not heads or heads != kv_heads:
        raise refuse(
            node,
            f"it has {heads} query heads and {kv_heads} key heads: grouped queries are not lowered",
            "keep attention='op' for this graph",
        )
    scale = attribute(node, "scale", None)
    if scale is None:
        if not head_size:
            raise refuse(node, "its head size is not a number", "export it with a static head size")
        scale = 1 / math.sqrt(head_size)
    root = np.array(math.sqrt(scale), number)
    q, k = edit("Mul", q, root), edit("Mul", k, root)
    spans: list[slice] = [slice(None)]
    if block and queries and queries == keys:
        spans = [slice(at, min(at + block, queries)) for at in range(0, queries, block)]
    results = []
    for span in spans:
        part = q if len(spans) == 1 else edit("Slice", q, [span.start], [span.stop], [-2])
        bias, allowed = _mask(edit, number, queries, keys, slice(None) if part is q else span)
        results.append(_block(edit, dtype, part, k, v, bias, allowed))
    result = results[0] if len(results) == 1 else edit("Concat", *results, axis=-2)
    if rank == 3:
        result = edit("Reshape", edit("Transpose", result, perm=[0, 2, 1, 3]), [0, 0, -1])
    edit.replace(result)


def _block(
    edit: Edit,
    dtype: ir.DataType,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    bias: list[ir.Value],
    allowed: ir.Value | None,
) -> ir.Value:
    """q [B, H, L, D], k [B, H, D, S], v [B, H, S, D] -> [B, H, L, D] for these L queries."""
    node, number = edit.node, dtype.numpy()
    scores = edit("MatMul", q, k)  # [B, H, L, S]
    if softcap := attribute(node, "softcap", 0.0):
        cap = np.array(softcap, number)
        scores = edit("Mul", edit("Tanh", edit("Div", scores, cap)), cap)
    for term in bias:
        scores = edit("Add", scores, term)
    precision = attribute(node, "softmax_precision", dtype.value)
    if precision != dtype.value:
        weights = edit("Softmax", edit("Cast", scores, to=precision), axis=-1)
        weights = edit("Cast", weights, to=dtype.value)
    else:
        weights = edit("Softmax", scores, axis=-1)
    if allowed is not None:
        weights = edit("Where", allowed, weights, np.array(0, number))
    return edit("MatMul", weights, v)


def _mask(
    edit: Edit, number: np.dtype, queries: int | None, keys: int | None, span: slice
) -> tuple[list[ir.Value], ir.Value | None]:
    """What is added to the scores, and, if a query may have no key at all, where keys may be seen.

    Both for the queries in `span`. A boolean mask that is a constant, and the causal one, become
    one constant to add.
    """
    node = edit.node
    mask = _rows(edit, operand(node, 3), span)
    lowest = np.array(np.finfo(number).min, number)
    zero = np.array(0, number)
    causal: np.ndarray | None = None
    if attribute(node, "is_causal", 0):
        if queries is None or keys is None:
            raise refuse(
                node,
                "it is causal and its sequence lengths are not numbers",
                "export it with static lengths",
            )
        causal = np.tri(queries, keys, dtype=bool)[span]
    if mask is None:
        return ([] if causal is None else [edit.constant(np.where(causal, zero, lowest))]), None
    if mask.dtype != ir.DataType.BOOL:
        terms = [mask]
        if causal is not None:
            terms.append(edit.constant(np.where(causal, zero, lowest)))
        return terms, None
    known = constant_of(mask)
    if known is not None:
        fixed = known if causal is None else known & causal
        blind = not fixed.any(axis=-1).all()
        bias = edit.constant(np.where(fixed, zero, lowest))
        return [bias], edit.constant(fixed) if blind else None
    allowed = mask if causal is None else edit("And", mask, causal)
    return [edit("Where", allowed, zero, lowest)], allowed


def _rows(edit: Edit, mask: ir.Value | None, span: slice) -> ir.Value | None:
    """The rows of a mask for the queries in `span`; one row that serves them all stays."""
    if mask is None or span == slice(None):
        return mask
    known = constant_of(mask)
    if known is not None:
        return edit.constant(known[..., span, :]) if known.shape[-2] > 1 else mask
    rows = static_dim(mask, -2)
    if rows is None:
        raise refuse(
            edit.node,
            f"the rows of its mask {mask.name} are not counted by a number",
            "set the profile's attention_block to 0, or export it with static lengths",
        )
    if rows == 1:
        return mask
    part = edit("Slice", mask, [span.start], [span.stop], [-2])
    if mask.dtype is not None:
        part.dtype = mask.dtype  # `_mask` asks for it
    return part
