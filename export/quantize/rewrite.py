"""The graph with integer weights, in operators that onnxruntime's CPU provider has kernels for.

`dynamic-int8`: DynamicQuantizeLinear, once for each tensor however many layers read it, then
MatMulIntegerToFloat for each layer (com.microsoft): uint8 times int8, the scale of each column and
the bias in the kernel's last step. A convolution is the same over its windows, which are laid side
by side as bytes; onnxruntime's own ConvInteger takes one scale for all channels and its kernels are
those of uint8 weights, which no dot-product instruction serves on x86.

`weight-*`: MatMulNBits, with activations and sums in FP32 (accuracy level 1), or for 8 bits the
project's own LinearBytes (backends/onnxrt/linear.cc): the same numbers, laid out for it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.lower import linear, storage
from export.lower.edit import Edit, attribute
from export.quantize import Scheme
from export.quantize.integers import Bytes, Floats, quantise_blocks, quantise_columns
from export.quantize.layers import Layer, find_layers

DOMAIN = "com.microsoft"
INTEGERS = "integers.bin"
_ALIGNMENT = 64
_FP32_SUMS = 1
_END = np.iinfo(np.int64).max


def rewrite(
    graph: Path, scheme: Scheme, names: Collection[str], out: Path, *, own: bool = False
) -> None:
    """Write the lowered graph at `graph` to `out`, its layers as `scheme` has them.

    Args:
        graph: FP32 arithmetic (`lower` with the profile CPU), weights as they were stored.
        names: of the layers to quantise, of which the graph may hold a part; others stay.
        out: the `model.onnx` to write; the weights lie beside it, the integers in a file of theirs.
        own: 8-bit weights become LinearBytes, else MatMulNBits.
    """
    model = storage.reopen(graph)
    out.parent.mkdir(parents=True, exist_ok=True)
    integers = graph.parent / INTEGERS
    with integers.open("wb") as file:
        weights = _Weights(model, file, integers)
        shared: dict[str, tuple[ir.Value, ir.Value, ir.Value]] = {}
        for layer in find_layers(model, scheme):
            if layer.name not in names:
                continue
            if not scheme.dynamic:
                kind = _linear_bytes if own and scheme.bits == 8 else _weight_only
                kind(model, layer, scheme, weights)
                continue
            known = shared.get(layer.source.name or "")
            if known is None:
                known = shared[layer.source.name or ""] = _quantised(model, layer.source)
            _dynamic(model, layer, scheme, known, weights)
    model.graph.opset_imports[DOMAIN] = 1
    if own:
        model.graph.opset_imports[linear.DOMAIN] = 1
    storage.save(model, out)


class _Weights:
    """Writes weights to a file as they come, and makes initializers of them."""

    def __init__(self, model: ir.Model, file: BinaryIO, path: Path) -> None:
        self.graph, self.file, self.path = model.graph, file, path

    def add(self, name: str, array: np.ndarray) -> ir.Value:
        self.file.write(bytes(-self.file.tell() % _ALIGNMENT))
        tensor = ir.ExternalTensor(
            self.path.name,
            self.file.tell(),
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=str(self.path.parent),
        )
        self.file.write(array.tobytes())
        value = ir.Value(
            name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value


def _quantised(model: ir.Model, source: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """`source` as uint8, its scale and its zero point: computed right where it comes from."""
    node = ir.node("DynamicQuantizeLinear", [source], num_outputs=3, name=f"{source.name}/quantise")
    number, scale, zero = node.outputs
    number.name, scale.name, zero.name = (
        f"{source.name}/{kind}" for kind in ("uint8", "scale", "zero")
    )
    producer = source.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(producer, node)
    return number, scale, zero


def _dynamic(
    model: ir.Model,
    layer: Layer,
    scheme: Scheme,
    source: tuple[ir.Value, ir.Value, ir.Value],
    weights: _Weights,
) -> None:
    edit = Edit(model, layer.last)
    number, scale, zero = source
    if layer.node.op_type == "Conv":
        number = _side_by_side(edit, layer, number, zero)
    integers, column_scales = quantise_columns(layer.matrix(), scheme.bits)
    product = edit(
        "MatMulIntegerToFloat",
        number,
        weights.add(f"{layer.name}/int8", integers),
        scale,
        edit.constant(column_scales),
        zero,
        None,
        layer.bias,
        domain=DOMAIN,
    )
    if layer.node.op_type == "Conv":
        product = edit("Transpose", product, perm=[0, 3, 1, 2])
    edit.replace(product)


def _side_by_side(edit: Edit, layer: Layer, image: ir.Value, zero: ir.Value) -> ir.Value:
    """Every window of `image`, uint8 [B, C, H, W] -> [B, out H, out W, kernel * C]."""
    node = layer.node
    top, left, bottom, right = attribute(node, "pads", [0, 0, 0, 0])
    strides = list(attribute(node, "strides", [1, 1]))
    result = edit("Transpose", image, perm=[0, 2, 3, 1])
    if any((top, left, bottom, right)):
        pads = [0, top, left, 0, 0, bottom, right, 0]
        result = edit("Pad", result, pads, zero, mode="constant")
    height, width = layer.kernel
    if (height, width, *strides) == (1, 1, 1, 1):
        return result
    shifted = [
        edit("Slice", result, [y, x], [y - height + 1 or _END, x - width + 1 or _END], [1, 2],
             strides)
        for y in range(height)
        for x in range(width)
    ]  # fmt: skip
    return edit("Concat", *shifted, axis=3) if len(shifted) > 1 else shifted[0]


def _weight_only(model: ir.Model, layer: Layer, scheme: Scheme, weights: _Weights) -> None:
    numbers, scales = quantise_blocks(layer.matrix(), scheme.bits, scheme.block)
    edit = Edit(model, layer.last)
    inputs: Sequence[ir.Value | None] = [
        layer.source,
        weights.add(f"{layer.name}/int{scheme.bits}", numbers),
        weights.add(f"{layer.name}/scales", scales.reshape(-1)),
    ]
    if layer.bias is not None:
        inputs = [*inputs, None, None, layer.bias]
    edit.replace(
        edit(
            "MatMulNBits",
            *inputs,
            domain=DOMAIN,
            K=layer.depth,
            N=layer.columns,
            bits=scheme.bits,
            block_size=scheme.block,
            accuracy_level=_FP32_SUMS,
        )
    )


def _linear_bytes(model: ir.Model, layer: Layer, scheme: Scheme, weights: _Weights) -> None:
    numbers, scales = quantise_blocks(layer.matrix(), scheme.bits, scheme.block)
    packed, panel_scales = pack_bytes(numbers, scales)
    edit = Edit(model, layer.last)
    edit.replace(
        edit(
            "LinearBytes",
            layer.source,
            weights.add(f"{layer.name}/int8", packed),
            weights.add(f"{layer.name}/scales", panel_scales),
            layer.bias,
            None,
            domain=linear.DOMAIN,
            features=layer.columns,
            block=scheme.block,
        )
    )


def pack_bytes(numbers: Bytes, scales: Floats) -> tuple[NDArray[np.int8], Floats]:
    """What `quantise_blocks` made, as LinearBytes wants it: int8 [N/32, K, 32], scales
    [N/32, blocks, 32], where K and N are filled up with zeros to multiples of 32."""
    columns, blocks, block = numbers.shape
    panels = -(-columns // linear.PANEL)
    depth = -(-blocks * block // linear.PANEL) * linear.PANEL
    whole = np.zeros((panels * linear.PANEL, depth), np.int8)
    whole[:columns, : blocks * block] = (numbers.reshape(columns, -1) ^ 128).view(np.int8)
    spread = np.zeros((panels * linear.PANEL, depth // block), np.float32)
    spread[:columns, :blocks] = scales
    return tuple(
        np.ascontiguousarray(each.reshape(panels, linear.PANEL, -1).transpose(0, 2, 1))
        for each in (whole, spread)
    )  # type: ignore[return-value]
