"""Each layer's error on recorded activations.

`add_probes` makes a graph give, beside its outputs, what the layers read: the range of every tensor
(a scale is for a whole tensor) and a sample of its rows. `relative_errors` holds each layer's
output on those rows, as the kernels would compute it, against FP32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.lower.edit import Edit, attribute
from export.quantize import Scheme
from export.quantize.integers import Floats, approximation, round_activations
from export.quantize.layers import Layer

ROWS = 32
"""Rows of a tensor (tokens) that are looked at for each image: with the hundreds of columns of a
layer, thousands of numbers behind each error."""
WINDOW = 10
"""Pixels along a side of what is looked at before a convolution, padded, from the middle."""


@dataclass(frozen=True)
class LayerSample:
    """What one evaluation fed a layer: rows [rows, channels], or of a convolution a window
    [batch, channels, height, width]; the range of the whole tensor."""

    values: Floats
    low: float
    high: float


def add_probes(model: ir.Model, layers: Sequence[Layer]) -> None:
    """Give `model` two outputs more for each tensor that layers read, see `samples`."""
    graph = model.graph
    for source in {layer.source.name: layer for layer in layers}.values():
        value = source.source
        tape = Edit(model, source.node)
        low, high = (tape(op, value, keepdims=0) for op in ("ReduceMin", "ReduceMax"))
        extent = tape("Concat", *(tape("Reshape", each, [1]) for each in (low, high)), axis=0)
        known = list(value.shape) if value.shape is not None else []
        if source.node.op_type == "Conv":
            top, left, bottom, right = attribute(source.node, "pads", [0, 0, 0, 0])
            padded = tape("Pad", value, [0, 0, top, left, 0, 0, bottom, right])
            sides = [size if isinstance(size, int) else 0 for size in known[2:]]
            begin = [max(0, (size - WINDOW) // 2) for size in sides]
            kept = tape("Slice", padded, begin, [first + WINDOW for first in begin], [2, 3])
        else:
            rows = math.prod(size for size in known[:-1] if isinstance(size, int))
            # An odd stride meets every column of an image whose sides are even.
            stride = max(1, rows // ROWS) | 1
            flat = tape("Reshape", value, [-1, source.depth])
            kept = tape("Slice", flat, [0], [np.iinfo(np.int64).max], [0], [stride])
        tape.append()
        for output, kind in ((extent, "extent"), (kept, "values")):
            output.name = f"{value.name}/{kind}"
            output.type = ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(output)


def samples(outputs: Mapping[str, np.ndarray], layers: Sequence[Layer]) -> dict[str, LayerSample]:
    """What one evaluation of a graph with probes gave: name of a tensor -> its sample."""
    found = {}
    for name in {layer.source.name or "" for layer in layers}:
        low, high = outputs[f"{name}/extent"]
        found[name] = LayerSample(outputs[f"{name}/values"], float(low), float(high))
    return found


def relative_errors(
    layers: Sequence[Layer], evaluations: Sequence[Mapping[str, LayerSample]], scheme: Scheme
) -> dict[str, float]:
    """Name of a layer -> its relative error: L2 norm of its output's error over that of its output.

    Of all rows together, or the median row's own where that is more: one token with a huge value
    takes the whole range, and hides in its own norm that all others round to nothing. And the worst
    of the evaluations: an error at one timestep is in the image.
    """
    found = {}
    for layer in layers:
        weight = layer.matrix()
        rounded = approximation(weight, scheme.bits, scheme.block)
        found[layer.name] = max(
            _error(layer, each[layer.source.name or ""], weight, rounded, scheme.dynamic)
            for each in evaluations
        )
    return found


def _error(
    layer: Layer, sample: LayerSample, weight: Floats, rounded: Floats, dynamic: bool
) -> float:
    rows = windows(layer, sample.values) if layer.node.op_type == "Conv" else sample.values
    exact = rows @ weight
    fed = round_activations(rows, sample.low, sample.high) if dynamic else rows
    errors, norms = (np.linalg.norm(each, axis=1) for each in (fed @ rounded - exact, exact))
    tiny = np.finfo(np.float32).tiny
    together = np.linalg.norm(errors) / max(np.linalg.norm(norms), tiny)
    return max(float(together), float(np.median(errors / np.maximum(norms, tiny))))


def windows(layer: Layer, values: Floats) -> Floats:
    """[batch, channels, height, width], padded -> [windows, kernel * channels]."""
    height, width = layer.kernel
    views = np.lib.stride_tricks.sliding_window_view(values, (height, width), axis=(2, 3))
    rows = views.transpose(0, 2, 3, 4, 5, 1)  # batch, y, x, kernel height, kernel width, channels
    return np.ascontiguousarray(rows.reshape(-1, height * width * values.shape[1]))
