"""Which products of a graph a scheme takes: activations times a large constant weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.lower import storage
from export.lower.edit import attribute, initializer_of, operand, required
from export.quantize import Scheme
from export.quantize.integers import Floats


@dataclass(frozen=True)
class Layer:
    """One product with a constant weight, [rows, depth] x [depth, columns].

    Attributes:
        name: of its output before any bias, which lowering leaves as it is.
        node: MatMul, Gemm or Conv (a product over its windows: depth is kernel x channels).
        weight: the initializer.
        bias: [columns], or None; of a MatMul, that of the Add behind it.
        last: the node whose output the layer gives: the Add, or `node`.
    """

    name: str
    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    last: ir.Node
    depth: int
    columns: int

    @property
    def source(self) -> ir.Value:
        """Its activations; another value once the layer before it was replaced."""
        return required(self.node, 0)

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of a convolution's window."""
        shape = _shape(self.weight)
        return shape[2], shape[3]

    @property
    def elements(self) -> int:
        return self.depth * self.columns

    def matrix(self) -> Floats:
        """The weight, float32 [depth, columns], read from its file now."""
        array = array_of(self.weight).astype(np.float32)
        if self.node.op_type == "Conv":
            return np.ascontiguousarray(array.transpose(2, 3, 1, 0).reshape(-1, self.columns))
        transposed = self.node.op_type == "Gemm" and attribute(self.node, "transB", 0)
        return np.ascontiguousarray(array.T) if transposed else array


def array_of(initializer: ir.Value) -> np.ndarray:
    """An initializer's numbers; of one on disk, a map of its file."""
    tensor = initializer.const_value
    if isinstance(tensor, ir.ExternalTensor):
        return storage.mapped(tensor)
    if tensor is None:
        raise ValueError(f"{initializer.name} is no initializer")
    return tensor.numpy()


def find_layers(model: ir.Model, scheme: Scheme) -> list[Layer]:
    """The layers that `scheme` takes, in the graph's order."""
    wanted = {"MatMul", "Gemm"} | ({"Conv"} if scheme.convolutions else set())
    found = [
        layer
        for node in model.graph
        if node.domain == "" and node.op_type in wanted
        if (layer := _layer(node)) is not None
    ]
    return [layer for layer in found if layer.elements >= scheme.smallest]


def _layer(node: ir.Node) -> Layer | None:
    source, weight = operand(node, 0), initializer_of(operand(node, 1))
    if source is None or weight is None or initializer_of(source) is not None:
        return None
    shape, last = _shape(weight), node
    if node.op_type == "Conv":
        if not _plain_convolution(node) or len(shape) != 4:
            return None
        depth, columns = math.prod(shape[1:]), shape[0]
        bias = operand(node, 2)
    elif len(shape) != 2:
        return None
    elif node.op_type == "Gemm":
        if attribute(node, "transA", 0) or {attribute(node, n, 1.0) for n in ("alpha", "beta")} != {
            1.0
        }:
            return None
        depth, columns = shape[::-1] if attribute(node, "transB", 0) else shape
        bias = operand(node, 2)
    else:
        depth, columns = shape
        bias, last = _added_bias(node, columns)
    if bias is not None:
        constant = initializer_of(bias)
        if constant is None or _shape(constant) != (columns,):
            return None
    name = node.outputs[0].name or ""
    return Layer(name, node, weight, bias, last, depth, columns)


def _plain_convolution(node: ir.Node) -> bool:
    """Whether it has two dimensions, one group, no holes in windows, padding given in numbers."""
    return (
        attribute(node, "group", 1) == 1
        and set(attribute(node, "dilations", [1])) == {1}
        and attribute(node, "auto_pad", "NOTSET") == "NOTSET"
    )


def _added_bias(node: ir.Node, columns: int) -> tuple[ir.Value | None, ir.Node]:
    """The bias that is added to a MatMul and to nothing else, and the Add; or None and `node`."""
    output = node.outputs[0]
    users = output.uses()
    if len(users) == 1 and not output.is_graph_output():
        add = next(iter(users)).node
        others = [value for value in add.inputs if value is not output]
        if add.op_type == "Add" and add.domain == "" and len(others) == 1:
            constant = initializer_of(others[0])
            if constant is not None and _shape(constant) == (columns,):
                return others[0], add
    return None, node


def _shape(value: ir.Value) -> tuple[int, ...]:
    shape = value.shape
    return () if shape is None else tuple(int(each) for each in shape.numpy())


@dataclass(frozen=True)
class SchemeSizes:
    """Bytes of a part under a scheme, if no layer of it is left out.

    Attributes:
        quantised: the weights that the scheme takes, with their scales.
        rest: all others, in FP32.
        activations: what the largest operator reads and writes in FP32, at a batch of one.
    """

    quantised: int
    rest: int
    activations: int

    @property
    def weights(self) -> int:
        return self.quantised + self.rest


def sizes(graph: Path, scheme: Scheme) -> SchemeSizes:
    """What a canonical graph comes to; its weights are not read."""
    model = storage.reopen(graph)
    layers = find_layers(model, scheme)
    taken = {layer.weight.name for layer in layers}
    rest = sum(
        math.prod(_shape(value)) for name, value in model.graph.initializers.items()
        if name not in taken
    )  # fmt: skip
    largest = max((sum(map(_elements, (*n.inputs, *n.outputs))) for n in model.graph), default=0)
    bits = 8 * 4 / scheme.block if scheme.block else 0.0
    bits += 8 if scheme.dynamic else scheme.bits
    return SchemeSizes(
        quantised=int(sum(layer.elements for layer in layers) * bits / 8),
        rest=4 * rest,
        activations=4 * largest,
    )


def _elements(value: ir.Value | None) -> int:
    if value is None or value.shape is None or value.is_initializer():
        return 0
    return math.prod(size for size in value.shape if isinstance(size, int))
