"""What a part costs: FLOPs, and the bytes of its weights and activations.

Two ways to the same figures:

- `part_cost` counts an ONNX graph, canonical or lowered, at the size that it was exported for and
  at any batch. It cannot change the size: reshapes carry height x width as constants.
- `part_cost_at` counts at any size. It traces the module on torch's meta device, without weights,
  which takes seconds for the full UNet.

What is counted is the heavy operators, of three kinds: `linear` (a product with a weight), `conv`,
and `attention` (products of two activations). A multiply-add is 2 FLOPs. Everything else (norms,
activations, softmax, copies) is left out: a few hundredths of the FLOPs, and fused by compilers.

`activation_bytes` is a lower bound of the traffic: each heavy operator reads its activations once
and writes its result once, in the dtype of the graph, and everything between two of them is fused
away. The Attention operator moves Q, K, V and its result; in the MatMul form the scores, written
and read, come on top. Weights are apart, in `weight_bytes`: every initializer, once, as stored.

`budget.csv`, beside this file, holds the known figures of SDXL-Turbo's parts: `budget_cost` gives
them without a bundle, and at once.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import AddbenchError, PreconditionError
from export.models import CONTEXT_PART

if TYPE_CHECKING:
    import onnx

    from export.source.checkpoint import Checkpoint

KINDS = ("linear", "conv", "attention")
BUDGET = Path(__file__).with_name("budget.csv")
_TOLERANCE = 1e-6
"""Relative difference to torch's own count that is rounding."""


@dataclass(frozen=True)
class Cost:
    """One evaluation of a part.

    Attributes:
        flops: 2 per multiply-add of the heavy operators.
        weight_bytes: all weights, as stored.
        activation_bytes: what the heavy operators read and write at least (see the module).
        by_kind: FLOPs of `linear`, `conv`, `attention`; their sum is `flops`.
        operators: how many heavy operators of each kind there are, whatever the batch. In the
            MatMul form an attention is two.
        scores: of attention: one for each query, key and head, whatever the form.
        conv_bytes: of `activation_bytes`, what convolutions read and write.
    """

    part: str
    flops: float
    weight_bytes: int
    activation_bytes: int
    by_kind: Mapping[str, float]
    operators: Mapping[str, int] = field(default_factory=dict)
    scores: int = 0
    conv_bytes: int = 0


def part_cost(graph: Path, batch: int = 1, form: str = "inline") -> Cost:
    """Count the graph of a part, `<part>/model.onnx`, at `batch`; its weights are not read.

    Args:
        form: what of a UNet is counted, as `Profile.context` says it: all of it, `input` (what is
            left for every step where the prompt's part is split off) or `output` (that part).

    Raises:
        PreconditionError: there is no such graph, it is fixed to another batch, or has no such
            form.
        AddbenchError: shape inference cannot tell the shape of a heavy operator.
    """
    import onnx
    import onnx_ir as ir

    from export.lower import context, shapes, storage

    if not graph.is_file():
        raise PreconditionError(f"there is no graph at {graph}", "it is not a file", "export it")
    model = ir.from_proto(onnx.load(str(graph), load_external_data=False))
    if form != "inline":
        context.split(model, form)
    fixed = model.graph.inputs[0].shape
    if fixed is None or fixed[0] != batch:
        shapes.evaluate(model, {"batch": batch})
    proto = storage.infer_shapes(ir.to_proto(model), graph)
    tally = _GraphTally(proto)
    for node in proto.graph.node:
        tally.add(node)
    weights = sum(_bytes(tensor.dims, tensor.data_type) for tensor in proto.graph.initializer)
    return Cost(
        part=CONTEXT_PART if form == "output" else graph.parent.name,
        flops=sum(tally.flops.values()),
        weight_bytes=weights,
        activation_bytes=sum(tally.moved.values()),
        by_kind=tally.flops,
        operators=tally.operators,
        scores=tally.scores,
        conv_bytes=tally.moved["conv"],
    )


class _GraphTally:
    """Adds up the heavy nodes of an ONNX graph with known shapes."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.flops: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self.operators = dict.fromkeys(KINDS, 0)
        self.moved = dict.fromkeys(KINDS, 0)
        self.scores = 0
        self._types: dict[str, tuple[tuple[int, ...] | None, int]] = {}
        self._constants = {tensor.name for tensor in proto.graph.initializer}
        for tensor in proto.graph.initializer:
            self._types[tensor.name] = (tuple(tensor.dims), tensor.data_type)
        for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
            kind = value.type.tensor_type
            known = all(dim.HasField("dim_value") for dim in kind.shape.dim)
            shape = tuple(dim.dim_value for dim in kind.shape.dim) if known else None
            self._types[value.name] = (shape, kind.elem_type)

    def add(self, node: onnx.NodeProto) -> None:
        """Count one node, in the graph's order."""
        inputs = [name for name in node.input if name]
        if all(name in self._constants for name in inputs):
            # What hangs on weights alone (a cast, a transpose, a dequantisation) is a weight.
            self._constants.update(node.output)
            return
        if node.op_type in ("MatMul", "Gemm"):
            self._product(node)
        elif node.op_type in ("Conv", "ConvTranspose"):
            result = node.output[0] if node.op_type == "Conv" else node.input[0]
            weight = self._shape(node, node.input[1])
            flops = 2.0 * math.prod(self._shape(node, result)) * math.prod(weight[1:])
            self._count("conv", flops, node, node.input[0], node.output[0])
        elif node.op_type == "Attention":
            self._attention(node)
        elif node.op_type == "Softmax":  # of attention in the MatMul form: there is no other
            self.scores += math.prod(self._shape(node, node.input[0]))

    def _product(self, node: onnx.NodeProto) -> None:
        left, right = node.input[:2]
        transposed = any(each.name == "transA" and each.i for each in node.attribute)
        depth = self._shape(node, left)[-2 if transposed else -1]
        flops = 2.0 * depth * math.prod(self._shape(node, node.output[0]))
        moving = [name for name in (left, right) if name not in self._constants]
        kind = "attention" if len(moving) == 2 else "linear"
        self._count(kind, flops, node, *moving, node.output[0])

    def _attention(self, node: onnx.NodeProto) -> None:
        """Q [B, H, L, D], K [B, H, S, D], V [B, H, S, E], or each as [B, length, H*width].

        Scores take 2 B H L S D, the sum over V 2 B H L S E. Q has B H L D numbers and the result
        B H L E in either form.
        """
        query, key, value = node.input[:3]
        source = self._shape(node, key)[-2]
        width = math.prod(self._shape(node, query)) + math.prod(self._shape(node, node.output[0]))
        self._count("attention", 2.0 * source * width, node, query, key, value, node.output[0])
        given = self._shape(node, query)
        heads = next((each.i for each in node.attribute if each.name == "q_num_heads"), 0)
        rows = math.prod(given[:-1]) * (heads if len(given) == 3 else 1)
        self.scores += rows * source

    def _count(self, kind: str, flops: float, node: onnx.NodeProto, *moving: str) -> None:
        self.flops[kind] += flops
        self.operators[kind] += 1
        for name in moving:
            self.moved[kind] += _bytes(self._shape(node, name), self._types[name][1])

    def _shape(self, node: onnx.NodeProto, name: str) -> tuple[int, ...]:
        shape = self._types.get(name, (None, 0))[0]
        if shape is None:
            raise AddbenchError(
                f"{node.op_type} {node.name} cannot be counted",
                f"shape inference cannot tell the shape of {name}",
                "count the graph of a bundle, or one that lower wrote",
            )
        return shape


def _bytes(shape: Any, data_type: int) -> int:
    """Size of a tensor of an ONNX data type."""
    import onnx_ir as ir

    return int(math.prod(shape) * ir.DataType(data_type).itemsize)


def part_cost_at(
    checkpoint: Checkpoint, part: str, batch: int, width: int, height: int, dtype: str = "fp16"
) -> Cost:
    """Count a part at any size, by tracing its module on the meta device.

    Args:
        checkpoint: only its configs are read, no weights.
        width, height: of the image, in pixels; multiples of what the model can divide (8 x 4 for
            the SDXL UNet).
        dtype: `fp16` or `fp32`, of weights and activations.

    Raises:
        AddbenchError: torch's flop counter sees operators that are not among the three kinds.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from export.parts import example_inputs, wrap
    from export.trace import FunctionTally

    number = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    module = checkpoint.skeleton(part)
    inputs = example_inputs(part, module, batch, width, height, number)
    wrapped = wrap(part, module, checkpoint.model).to("meta", dtype=number)
    tally, counter = FunctionTally(), FlopCounterMode(display=False)
    with torch.no_grad(), counter, tally:
        wrapped(*(tensor.to("meta") for tensor in inputs.values()))
    flops, expected = sum(tally.flops.values()), counter.get_total_flops()
    if abs(flops - expected) > _TOLERANCE * expected:
        raise AddbenchError(
            f"{part} has heavy operators that are not counted",
            f"{flops:.6g} FLOPs in linear, conv and attention, {expected:.6g} by torch's counter",
            "report it with the model's name",
        )
    return Cost(
        part=part,
        flops=flops,
        weight_bytes=sum(each.numel() * each.element_size() for each in wrapped.parameters()),
        activation_bytes=sum(tally.moved.values()),
        by_kind=tally.flops,
        operators=tally.operators,
        scores=tally.scores,
        conv_bytes=tally.moved["conv"],
    )


@cache
def budget() -> Mapping[str, Mapping[str, float]]:
    """GFLOP, megabytes and operators of every SDXL-Turbo part, by part and column of budget.csv."""
    with BUDGET.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {
            row["part"]: {key: float(text) for key, text in row.items() if key != "part" and text}
            for row in rows
        }


def budget_cost(part: str, size: int) -> Cost | None:
    """The known cost of an SDXL-Turbo part at batch 1 and `size` x `size` pixels, if it is known.

    FP16. Rounded to the digits of the table: within 1% of what is counted.
    """
    known = budget()[part]
    if f"gflop_{size}px" not in known:
        return None
    flops = {kind: 1e9 * known[f"{kind}_{size}px"] for kind in KINDS}
    return Cost(
        part=part,
        flops=sum(flops.values()),
        weight_bytes=round(1e6 * known["weights_mb"]),
        activation_bytes=round(1e6 * known[f"activation_mb_{size}px"]),
        by_kind=flops,
        operators={kind: int(known[f"{kind}_operators"]) for kind in KINDS},
        scores=round(1e6 * known[f"scores_m_{size}px"]),
        conv_bytes=round(1e6 * known[f"conv_mb_{size}px"]),
    )
