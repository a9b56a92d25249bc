"""How a pass puts a few nodes in the place of one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from core.errors import PreconditionError

Operand = ir.Value | np.ndarray | Sequence[int]
"""What an operator reads: a value of the graph, or a constant (plain integers become int64)."""


class Edit:
    """Records the nodes that take the place of `node`; `replace` puts them in.

    Example: `edit.replace(edit("Mul", edit("Add", x, one), y))`.
    """

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.node = node
        self._constants = model.graph  # of the main graph, which subgraphs see
        self._tape = ir.tape.Tape()

    def __call__(
        self, op_type: str, *inputs: Operand | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Record one operator; return its output."""
        values = [
            x if x is None or isinstance(x, ir.Value) else self.constant(np.asarray(x))
            for x in inputs
        ]
        value = self._tape.op(op_type, values, attributes, domain=domain)
        name = f"{self.node.name}/{op_type}_{len(self._tape.nodes)}"
        value.name = name
        producer = value.producer()
        if producer is not None:
            producer.name = name
        return value

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initializer that holds `array`; equal ones are one."""
        data = np.ascontiguousarray(array)
        digest = hashlib.sha256(f"{data.dtype}{data.shape}".encode() + data.tobytes()).hexdigest()
        name = f"const_{digest[:16]}"
        known = self._constants.initializers.get(name)
        if known is not None:
            return known
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._constants.register_initializer(value)
        return value

    def append(self) -> None:
        """Put the recorded nodes in at the graph's end; `node` stays."""
        self._constants.extend(self._tape.nodes)

    def replace(self, *outputs: ir.Value) -> None:
        """Put the recorded nodes in; `outputs` take over name, shape and users of the old ones."""
        node = self.node
        if node.graph is None:
            raise ValueError(f"{describe(node)} was replaced already")
        # An output that the old node leaves out has an empty name, which must not be taken over.
        pairs = [(old, new) for old, new in zip(node.outputs, outputs, strict=False) if old.name]
        ir.convenience.replace_nodes_and_values(
            node.graph,
            node,
            [node],
            self._tape.nodes,
            [old for old, _ in pairs],
            [new for _, new in pairs],
        )


def describe(node: ir.Node) -> str:
    """`Operator node_name`, as messages name a node."""
    return f"{node.op_type} {node.name or '(without a name)'}"


def refuse(node: ir.Node, why: str, next: str) -> PreconditionError:
    """The error for a node that the profile's form cannot express."""
    return PreconditionError(f"{describe(node)} cannot be lowered", why, next)


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index`, or None where the node leaves it out."""
    return node.inputs[index] if index < len(node.inputs) else None


def required(node: ir.Node, index: int) -> ir.Value:
    """Input `index`, or an error that names `node`: the operator cannot do without."""
    value = operand(node, index)
    if value is None:
        raise refuse(node, f"its input {index} is missing", "export the graph again")
    return value


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, or `default` where the node leaves it out."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array of a small constant (an initializer or a Constant node), else None."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def initializer_of(value: ir.Value | None) -> ir.Value | None:
    """The initializer that `value` is, or is a cast of: a weight, which a compiler folds."""
    if value is None or value.is_initializer():
        return value
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        return producer.inputs[0] if producer.inputs[0].is_initializer() else None
    return None


def static_dim(value: ir.Value, axis: int) -> int | None:
    """One dimension of a value where it is known as a number."""
    if value.shape is None:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def dtype_and_rank(node: ir.Node, value: ir.Value) -> tuple[ir.DataType, int]:
    """Both, or an error that names `node`: shape inference could not tell."""
    if value.dtype is None or value.shape is None:
        raise refuse(
            node,
            f"dtype or rank of its input {value.name} is not known",
            "export the graph again with shapes on every value",
        )
    return value.dtype, value.shape.rank()


def only_reader(node: ir.Node) -> ir.Node | None:
    """The one node that reads the output of `node`, if nothing else does."""
    value = node.outputs[0]
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader = next(iter(uses)).node
    return None if reader.domain else reader


def same_shape(one: ir.Value, other: ir.Value) -> bool:
    return one.shape is not None and other.shape is not None and one.shape == other.shape


def added(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The sum that alone reads a node's output, and its other operand."""
    add = only_reader(node)
    if add is None or add.op_type != "Add":
        return None
    other = next((v for v in add.inputs if v is not node.outputs[0]), None)
    return None if other is None else (add, other)
