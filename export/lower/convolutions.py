"""Convolutions as the project's own operators for onnxruntime (backends/onnxrt).

TiledConv, for CPUs with AMX, takes FP16 weights as they are stored. WinogradConv takes them
transformed, in FP32 or BF16: 16 products for the 36 of a tile of 2x2 pixels, and 9 where the image
is enlarged just before (nearest neighbour), which in FP32 beats tiles.

The weights are laid out here, and written into a file: a compiler that folds them itself holds them
several times (SDXL's UNet: 22 GB, not 14).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from export.lower import storage
from export.lower.edit import (
    Edit,
    added,
    attribute,
    constant_of,
    initializer_of,
    only_reader,
    operand,
    required,
    same_shape,
    static_dim,
)

DOMAIN = "addbench"
FILE = "convolutions.data"
WINOGRAD, TILED = "WinogradConv", "TiledConv"
Kind = Literal["winograd", "tiles"]
ROWS = 8
"""Output channels that lie together in the transformed weights."""
PANEL = 32
"""Filters, and channels, that lie together in the weights of tiles."""
SMALLEST = 256
"""Pixels of the image below which panels of tiles stay too empty (SDXL's smallest has 16 x 16)."""
NARROWEST = 16
"""Columns below which tiles would be filled up."""
WEIGHTS = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
"""G: the weights of a tile are G w Gt."""
ENLARGED = WEIGHTS[[0, 1, 3]]
"""The rows that count in an enlarged image: 1 and 2 of a tile are one, the third makes zero."""


@dataclass(frozen=True)
class _Form:
    """An operator that a convolution becomes."""

    operator: str
    name: str  # of the layout
    layout: Callable[[np.ndarray], np.ndarray]
    nbytes: int  # of the weights in it
    attributes: Mapping[str, int]
    resize: ir.Node | None = field(default=None)  # which the operator does too


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weights that are laid out anew: in FP32 as they were, and as they become."""

    plain: int
    laid_out: int

    @property
    def added(self) -> int:
        return self.laid_out - self.plain


def convolve(model: ir.Model, folder: Path, kind: Kind, *, bf16: bool = False) -> None:
    """Replace every convolution that the operators can take; the others stay.

    The weights, in their layout, are written into a file in `folder`. With `bf16`, both
    sides of their products are rounded to it.
    """
    forms = [(node, form) for node in model.graph.all_nodes() if (form := _form(node, kind, bf16))]
    with (folder / FILE).open("wb") as file:
        for node, form in forms:
            _replace(model, node, form, file)
    if forms:
        model.graph.opset_imports[DOMAIN] = 1


def sizes(graph: Path, kind: Kind, *, bf16: bool = False) -> Sizes:
    """Return the sizes for a canonical graph, whose weights are not read."""
    plain = laid_out = 0
    for node in storage.reopen(graph).graph.all_nodes():
        if form := _form(node, kind, bf16):
            shape = required(node, 1).shape
            plain += 4 * math.prod(shape.numpy()) if shape is not None else 0
            laid_out += form.nbytes
    return Sizes(plain, laid_out)


def _form(node: ir.Node, kind: Kind, bf16: bool) -> _Form | None:
    """What a convolution becomes, which keeps the image's size: the better of what there is."""
    if node.domain or node.op_type != "Conv":
        return None
    x, weight = operand(node, 0), operand(node, 1)
    if x is None or x.shape is None or weight is None or weight.shape is None:
        return None
    found = initializer_of(weight)
    shape = tuple(static_dim(weight, axis) or 0 for axis in range(weight.shape.rank()))
    sides = (static_dim(x, -2) or 0, static_dim(x, -1) or 0)
    if (
        found is None
        or len(shape) != 4
        or shape[2:] not in ((3, 3), (1, 1))
        or min(shape[:2]) < ROWS
        or math.prod(sides) < SMALLEST
        or attribute(node, "group", 1) != 1
        or attribute(node, "auto_pad", "NOTSET") != "NOTSET"
        or list(attribute(node, "pads", [0] * 4)) != [shape[2] // 2] * 4
        or set(attribute(node, "strides", [1])) != {1}
        or set(attribute(node, "dilations", [1])) != {1}
    ):
        return None
    filters, channels = shape[:2]
    direct = kind == "tiles" and bf16  # 36 products on tiles are faster than 9 elsewhere
    resize = _enlarged(node) if shape[2] == 3 and not direct else None
    halves = found.dtype == ir.DataType.FLOAT16
    if kind == "tiles" and halves and resize is None and sides[1] >= NARROWEST:
        padded = math.prod(-(-side // PANEL) * PANEL for side in (filters, channels))
        nbytes = 2 * padded * shape[2] ** 2
        return _Form(TILED, "tiled", _tiled, nbytes, {"filters": filters, "bf16": int(bf16)})
    if shape[2] == 3 and filters % ROWS == 0:
        matrix = WEIGHTS if resize is None else ENLARGED
        number = 2 * (channels + channels % 2) if bf16 else 4 * channels
        upsample = {"upsample": int(resize is not None)}
        name, operator, layout = f"winograd{len(matrix)}", WINOGRAD, _transformed
        if bf16:
            name, operator, layout = f"{name}_bf16", f"{WINOGRAD}BF16", _rounded
        nbytes = number * len(matrix) ** 2 * filters
        return _Form(operator, name, partial(layout, matrix), nbytes, upsample, resize)
    return None


def _rounded(matrix: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Weights [K, C, 3, 3] as WinogradConvBF16 wants them, [K/8, elements, C/2, 8, 2]."""
    single = _transformed(matrix, plain).astype(ml_dtypes.bfloat16)
    if single.shape[2] % 2:
        single = np.pad(single, ((0, 0), (0, 0), (0, 1), (0, 0)))
    pairs = single.reshape(*single.shape[:2], -1, 2, ROWS).swapaxes(3, 4)
    return np.ascontiguousarray(pairs)


def _transformed(matrix: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Weights [K, C, 3, 3] as WinogradConv wants them, [K/8, elements, C, 8]."""
    filters, channels = plain.shape[:2]
    both = np.kron(matrix, matrix).T.astype(np.float32)  # [9, elements]
    products = plain.reshape(-1, 9).astype(np.float32) @ both
    blocks = products.reshape(filters // ROWS, ROWS, channels, -1).transpose(0, 3, 2, 1)
    return np.ascontiguousarray(blocks)


def _tiled(plain: np.ndarray) -> np.ndarray:
    """Weights [K, C, 3, 3] as TiledConv wants them, [K/32, C/32, taps, 32, 32]."""
    filters, channels = (-(-side // PANEL) for side in plain.shape[:2])
    whole = np.zeros((filters * PANEL, channels * PANEL, *plain.shape[2:]), np.float16)
    whole[: plain.shape[0], : plain.shape[1]] = plain
    blocks = whole.reshape(filters, PANEL, channels, PANEL, -1)
    return np.ascontiguousarray(blocks.transpose(0, 2, 4, 1, 3))


def _weights(model: ir.Model, node: ir.Node, form: _Form, file: BinaryIO) -> ir.Value:
    """The initializer in the form's layout; convolutions that share theirs go on doing so."""
    weight = initializer_of(required(node, 1))
    if weight is None or weight.const_value is None:
        raise ValueError(f"{node.name} has no constant weights")
    name = f"{weight.name}_{form.name}"
    if name not in model.graph.initializers:
        tensor = weight.const_value
        plain = storage.mapped(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor.numpy()
        model.graph.register_initializer(storage.written(file, form.layout(plain), name))
    return model.graph.initializers[name]


def _replace(model: ir.Model, node: ir.Node, form: _Form, file: BinaryIO) -> None:
    weights = _weights(model, node, form, file)
    last, residual, gone = node, None, [node]
    if (found := added(last)) is not None and same_shape(found[1], last.outputs[0]):
        last, residual = found
        gone.append(last)
    if relu := (reader := only_reader(last)) is not None and reader.op_type == "Relu":
        last = reader
        gone.append(reader)
    edit = Edit(model, last)
    result = edit(
        form.operator,
        required(form.resize or node, 0),
        weights,
        operand(node, 2),
        residual,
        domain=DOMAIN,
        relu=int(relu),
        **form.attributes,
    )
    edit.replace(result)
    for each in reversed(gone[:-1]):  # `last` is gone already
        if each.graph is not None:
            each.graph.remove(each, safe=True)


def _enlarged(node: ir.Node) -> ir.Node | None:
    """The Resize before a convolution, where all it does is to enlarge twice, nearest neighbour."""
    resize = required(node, 0).producer()
    if resize is None or resize.domain or resize.op_type != "Resize":
        return None
    scales = constant_of(operand(resize, 2))
    plain = {
        "mode": "nearest",
        "nearest_mode": "floor",
        "coordinate_transformation_mode": "asymmetric",
    }
    fits = (
        scales is not None
        and scales.tolist() == [1, 1, 2, 2]
        and all(attribute(resize, name, None) == value for name, value in plain.items())
        and attribute(resize, "axes", None) is None
        and only_reader(resize) is node
    )
    return resize if fits else None
