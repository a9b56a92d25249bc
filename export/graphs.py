"""torch.onnx.export into the canonical form: opset 23, attention as one op, `batch` named."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import AddbenchError
from export.source.quiet import quiet

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from torch import nn

OPSET = 23
EXPORTER = ("torch.onnx", "torch.export", "onnxscript")
"""Loggers of the exporter, whose real failures are exceptions."""
UNBATCHED = ("timestep",)
"""Inputs that one value serves for the whole batch."""

EXTERNAL_BYTES = 1024
"""Tensors of at least this many bytes go to the data file beside the graph."""


@contextlib.contextmanager
def exported_graph(
    wrapper: nn.Module,
    inputs: dict[str, torch.Tensor],
    outputs: tuple[str, ...],
    name: str,
) -> Iterator[onnx_ir.Model]:
    """Trace `wrapper` (one of `export.parts`) into a canonical graph that refers to its weights.

    Args:
        inputs: example inputs with a batch of 2, in the order of the wrapper's arguments.
        outputs: names of the outputs, in order.
        name: of the graph: the part.
    """
    import torch

    batch = torch.export.Dim("batch", min=1)
    axes = tuple(None if key in UNBATCHED else {0: batch} for key in inputs)
    with quiet(EXPORTER, logging.ERROR), torch.no_grad():
        program = torch.onnx.export(
            wrapper,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=axes,
            opset_version=OPSET,
            dynamo=True,
            verify=False,
            optimize=False,
            verbose=False,
        )
        if program is None:
            raise AddbenchError(f"torch.onnx gave no graph for {name}", "", "report this")
        traced = list(program.model.graph.initializers.values())
        program.optimize()
    model: onnx_ir.Model = program.model
    _clean(model, name)
    try:
        yield model
    finally:
        # The optimiser's rules keep the values they have seen, and so every weight (onnxscript
        # 0.7): 1.4 GB of a text encoder would still be there beside the UNet's.
        for value in (*traced, *model.graph.initializers.values()):
            value.const_value = None


def save_graph(model: onnx_ir.Model, folder: Path) -> None:
    """Write `model.onnx` and, where there are weights to speak of, `model.onnx.data`."""
    import onnx_ir

    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = _contiguous(value.const_value)
    onnx_ir.save(
        model,
        folder / "model.onnx",
        external_data="model.onnx.data",
        size_threshold_bytes=EXTERNAL_BYTES,
        alignment=4096,  # whole pages, so that a runtime can map the weights where they lie
    )


def _contiguous(tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    """A folded transpose is a view in Fortran order, which numpy writes number by number: 50 MB/s.

    Copied to C order as it is written, one tensor at a time, so that memory stays as it is.
    """
    import numpy as np
    import onnx_ir

    if not isinstance(tensor, onnx_ir.Tensor) or tensor.numpy().flags.c_contiguous:
        return tensor
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.Tensor(np.ascontiguousarray(tensor.numpy()), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
    )


def describe_graph(model: onnx_ir.Model) -> dict[str, Any]:
    """Inputs, outputs, op counts and bytes of weights, as the manifest holds them."""
    names = {"FLOAT": "float32", "FLOAT16": "float16", "INT64": "int64"}

    def spec(value: onnx_ir.Value) -> dict[str, Any]:
        assert value.dtype is not None  # traced values are typed
        assert value.shape is not None
        shape = [axis if isinstance(axis, int) else axis.value for axis in value.shape]
        return {"name": value.name, "dtype": names[value.dtype.name], "shape": shape}

    weights = (value.const_value for value in model.graph.initializers.values())
    return {
        "inputs": [spec(value) for value in model.graph.inputs],
        "outputs": [spec(value) for value in model.graph.outputs],
        "ops": dict(sorted(Counter(node.op_type for node in model.graph).items())),
        "weight_bytes": sum(tensor.nbytes for tensor in weights if tensor is not None),
    }


def _clean(model: onnx_ir.Model, name: str) -> None:
    """Drop what the exporter notes for debugging: stack traces (paths of this machine), scopes.

    They are also most of the bytes of a graph whose weights are in a file of their own.
    """
    model.producer_name, model.producer_version = "addbench", None
    model.graph.name, model.doc_string = name, None
    model.metadata_props.clear()
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
            value.doc_string = None
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None
