"""Calibrated schemes: the UNet with QuantizeLinear/DequantizeLinear around its large layers.

Scales come from modelopt.py; `insert` gives the canonical graph a Q/DQ pair for each, and it
is canonical still. The weights stay where they are: a pair on them is folded by the compiler, which
is what TensorRT does with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import PreconditionError
from core.files import sha256_file, write_atomic

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

SCALES = "scales.safetensors"
META = "addbench-scales"


@dataclass(frozen=True)
class QdqScheme:
    """How numbers are stored between Q and DQ.

    Attributes:
        mode: modelopt's word for it.
        precision: of the arithmetic, as rows name it.
        dtype: of the stored numbers, as numpy and ml_dtypes name it.
    """

    name: str
    mode: str
    precision: str
    dtype: str


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        QdqScheme("qdq-fp8", "fp8", "fp8", "float8_e4m3fn"),
        QdqScheme("qdq-int8", "int8", "int8", "int8"),
    )
}


@dataclass(frozen=True)
class LayerScales:
    """Scales of one layer: a number for its input, a number per channel (`axis`) of its weight."""

    activation: float
    weight: np.ndarray[Any, Any]
    axis: int


def scheme_of(precision: str) -> QdqScheme:
    """`fp8` -> qdq-fp8."""
    return next(scheme for scheme in SCHEMES.values() if scheme.precision == precision)


def write_scales(path: Path, layers: dict[str, LayerScales], facts: dict[str, Any]) -> None:
    """One file: `<node>.activation` and `<node>.weight`, float32; the axes with the facts."""
    import numpy as np
    from safetensors.numpy import save

    arrays = {}
    for name, layer in layers.items():
        arrays[f"{name}.activation"] = np.array(layer.activation, np.float32)
        arrays[f"{name}.weight"] = np.ascontiguousarray(layer.weight, np.float32)
    axes = {name: layer.axis for name, layer in layers.items()}
    write_atomic(path, save(arrays, {META: json.dumps(facts | {"axes": axes})}))


def read_scales(path: Path) -> tuple[dict[str, LayerScales], dict[str, Any]]:
    """Layers by canonical node name, and what made them."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        facts = json.loads(file.metadata()[META])
        axes = facts.pop("axes")
        layers = {
            name: LayerScales(
                float(file.get_tensor(f"{name}.activation")),
                file.get_tensor(f"{name}.weight"),
                axis,
            )
            for name, axis in axes.items()
        }
    return layers, facts


def insert(graph: Path, scales: Path, out: Path) -> None:
    """Write the canonical graph at `graph` to `out` with a Q/DQ pair on both inputs of each layer
    that `scales` has; its weights are linked beside it, as `lower` does.

    Scales are in the dtype of what they scale, as TensorRT's strongly typed networks want them.

    Raises:
        PreconditionError: the scales are of another graph.
    """
    from export.lower import CANONICAL, storage

    layers, facts = read_scales(scales)
    if facts["graph"] != sha256_file(graph):
        raise PreconditionError(
            f"the scales {scales} are not of {graph}",
            "they were made for another graph: its content differs",
            "compile it again",
        )
    model = storage.load(graph, CANONICAL)
    nodes = {node.name: node for node in model.graph}
    dtype = SCHEMES[facts["scheme"]].dtype
    known: dict[tuple[str, bytes], ir.Value] = {}
    for name, layer in layers.items():
        node = nodes[name]
        for index, scale, axis in ((0, layer.activation, 0), (1, layer.weight, layer.axis)):
            value = node.inputs[index]
            if value is not None:
                made = quantised(model.graph, node, value, scale, axis, dtype, known)
                node.replace_input_with(index, made)
    storage.save(model, out)


def quantised(
    graph: ir.Graph,
    node: ir.Node,
    value: ir.Value,
    scale: float | np.ndarray[Any, Any],
    axis: int,
    dtype: str,
    known: dict[tuple[str, bytes], ir.Value],
) -> ir.Value:
    """`value` through a pair, put before `node`; layers with one input and scale share a pair."""
    import ml_dtypes
    import numpy as np
    import onnx_ir as ir

    number = value.dtype.numpy() if value.dtype is not None else np.dtype("float32")
    # FP16 would make a zero of the scale of a channel that is all but zero.
    array = np.maximum(scale, np.finfo(number).tiny).astype(number)
    key = (value.name or "", array.tobytes())
    if key in known:
        return known[key]
    stored = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    name = f"{value.name}/q{len(known)}"
    constants = []
    for kind, content in (("scale", array), ("zero", np.zeros(array.shape, stored))):
        tensor = ir.tensor(content, name=f"{name}/{kind}")
        constant = ir.Value(
            name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )  # fmt: skip
        graph.register_initializer(constant)
        constants.append(constant)
    attributes = {"axis": axis} if array.ndim else {}
    low = ir.Value(name=f"{name}/low", shape=value.shape, type=ir.TensorType(tensor.dtype))
    high = ir.Value(name=f"{name}/high", shape=value.shape, type=value.type)
    pair = [
        ir.node(op, [source, *constants], attributes, outputs=[made], name=f"{made.name}/{op}")
        for op, source, made in (
            ("QuantizeLinear", value, low),
            ("DequantizeLinear", low, high),
        )
    ]
    graph.insert_before(node, pair)
    known[key] = high
    return high
