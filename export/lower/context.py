"""The UNet in two graphs: what depends on the prompt alone, and the rest, which takes it as input.

Cross-attention's keys and values are projections of `encoder_hidden_states`, the same at every
step of an image. `output` keeps what computes them, and everything else between the prompt and the
first node that reads another input too; `input` keeps the rest, with that in place of the prompt.
What hangs on constants alone stays with whoever reads it. The operators do not matter: a quantised
product is split off like any other.

The two graphs hand over few tensors: values that agree in dtype and in all axes but the second
(K and V of attentions with heads of one size) are put side by side along it. The first axis is the
batch, in each of them: prompts can be stacked and cut apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from core.errors import PreconditionError
from export.lower.edit import Edit, static_dim

PROMPT = "encoder_hidden_states"
NAME = "context"
"""The name of the first tensor that is handed over; others are `context_2`, `context_3`, ..."""
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def split(model: ir.Model, form: str) -> None:
    """Leave in `model` the graph that gives the context (`output`) or the one that takes it.

    Raises:
        PreconditionError: the graph has no prompt, or makes nothing of it alone.
    """
    graph = model.graph
    prompt = next((value for value in graph.inputs if value.name == PROMPT), None)
    moved = set() if prompt is None else _of_prompt(graph, prompt)
    groups = [] if prompt is None else _groups(graph, prompt, moved)
    if prompt is None or not groups:
        raise PreconditionError(
            f"{graph.name} cannot be split at its prompt",
            f"nothing in it depends on {PROMPT} alone",
            "compile it whole (context=inline)",
        )
    if form == "output":
        _give(graph, groups)
        common_passes.RemoveUnusedNodesPass()(model)
        _drop_inputs(graph, [value for value in graph.inputs if value is not prompt])
    else:
        _take(model, groups, moved)
        common_passes.RemoveUnusedNodesPass()(model)
        # It stays beside the context where something reads it that cannot be handed over.
        _drop_inputs(graph, [] if prompt.uses() else [prompt])


def weight_bytes(graph: Path, form: str) -> int:
    """Bytes of the weights that `form` of the canonical graph at `graph` holds, as stored."""
    weights = (value.const_value for value in _half(graph, form).initializers.values())
    return sum(tensor.nbytes for tensor in weights if tensor is not None)


def input_shapes(graph: Path, form: str) -> dict[str, tuple[int | str, ...]]:
    """What `form` of the canonical graph at `graph` takes: name -> sizes, and names of axes."""
    return {
        str(value.name): tuple(
            dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()
        )
        for value in _half(graph, form).inputs
    }


def _half(graph: Path, form: str) -> ir.Graph:
    model = ir.from_proto(onnx.load(str(graph), load_external_data=False))
    split(model, form)
    return model.graph


def _of_prompt(graph: ir.Graph, prompt: ir.Value) -> set[ir.Node]:
    """Nodes that depend on the prompt and on no other input. One with a subgraph is not asked."""
    mine, others = {prompt}, {value for value in graph.inputs if value is not prompt}
    found = set()
    for node in graph:
        kinds = {attribute.type for attribute in node.attributes.values()}
        inner = bool(kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})
        if inner or any(value in others for value in node.inputs):
            others.update(node.outputs)
        elif any(value in mine for value in node.inputs):
            mine.update(node.outputs)
            found.add(node)
    return found


def _groups(graph: ir.Graph, prompt: ir.Value, moved: set[ir.Node]) -> list[list[ir.Value]]:
    """What the rest reads of `moved`, gathered by what can lie side by side, in graph order."""
    found: dict[tuple[object, ...], list[ir.Value]] = {}
    for node in graph:
        for value in node.outputs if node in moved else ():
            if any(user not in moved for user, _ in value.uses()) and _stackable(value, prompt):
                assert value.shape is not None  # a stackable one has numbers
                found.setdefault((value.dtype, *value.shape[2:]), []).append(value)
    return list(found.values())


def _stackable(value: ir.Value, prompt: ir.Value) -> bool:
    """Floats of [batch, number, ...]: shape arithmetic, which is not, is cheap to do twice."""
    shape, batch = value.shape, prompt.shape
    if value.dtype not in _FLOATS or shape is None or batch is None or shape.rank() < 2:
        return False
    return shape[0] == batch[0] and all(isinstance(dim, int) for dim in shape[1:])


def _handed_over(place: int, values: Sequence[ir.Value]) -> ir.Value:
    """A value like all of `values` side by side, named for its place among the groups."""
    shape = values[0].shape
    assert shape is not None
    name = NAME if place == 0 else f"{NAME}_{place + 1}"
    joint = ir.Shape([shape[0], sum(_widths(values)), *shape[2:]])
    return ir.Value(name=name, shape=joint, type=values[0].type)


def _widths(values: Sequence[ir.Value]) -> list[int]:
    return [width for value in values if (width := static_dim(value, 1)) is not None]


def _give(graph: ir.Graph, groups: Sequence[Sequence[ir.Value]]) -> None:
    graph.outputs.clear()
    for place, values in enumerate(groups):
        joint = _handed_over(place, values)
        name = f"{joint.name}/Concat"
        graph.append(ir.node("Concat", values, {"axis": 1}, outputs=[joint], name=name))
        graph.outputs.append(joint)


def _take(model: ir.Model, groups: Sequence[Sequence[ir.Value]], moved: set[ir.Node]) -> None:
    graph = model.graph
    for place, values in enumerate(groups):
        joint = _handed_over(place, values)
        graph.inputs.append(joint)
        apart = [
            ir.Value(name=f"{joint.name}/{number}", shape=value.shape, type=value.type)
            for number, value in enumerate(values)
        ]
        sizes = Edit(model, graph[0]).constant(np.array(_widths(values), np.int64))
        node = ir.node(
            "Split", [joint, sizes], {"axis": 1}, outputs=apart, name=f"{joint.name}/Split"
        )
        graph.insert_before(graph[0], node)
        for value, part in zip(values, apart, strict=True):
            for user, index in tuple(value.uses()):
                if user not in moved:
                    user.replace_input_with(index, part)


def _drop_inputs(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    for value in values:
        graph.inputs.remove(value)
