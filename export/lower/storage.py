"""Model files in and out. External data is linked, never read.

onnx and onnx_ir refuse to read weights from a file with several hard links (they take them for an
attack): here, and in the bundle that the file comes from, as long as the link exists. onnxruntime
reads them. So a lowered graph is for a compiler to read, and then to delete; it
is checked here in memory, and what little is read of external data is read by hand.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes import common as common_passes

from core.errors import AddbenchError, PreconditionError
from core.files import write_atomic
from export.lower.profile import CANONICAL_OPSET, OLDEST_OPSET, Profile

_READ_LIMIT = 1 << 20
"""Bytes. Integers and booleans beyond are data, not shape arithmetic, and stay on disk."""
_PAGE = 4096
"""Bytes. Each weight begins on a page, as maps of a file do."""
_NODE_METADATA_IR = 10
"""The IR version that brought metadata on nodes and values (torch writes stack traces there)."""


def load(graph: Path, profile: Profile) -> ir.Model:
    """Read a canonical graph, weights left on disk, with a shape on every value it can infer."""
    if not OLDEST_OPSET <= profile.opset <= CANONICAL_OPSET:
        raise PreconditionError(
            f"profile {profile.name} asks for opset {profile.opset}",
            f"graphs are lowered to opset {OLDEST_OPSET} to {CANONICAL_OPSET}",
            "give the profile an opset in that range",
        )
    if not graph.is_file():
        raise PreconditionError(
            f"there is no graph at {graph}",
            "it is not a file",
            "export the model again, or check the path",
        )
    proto = onnx.load(str(graph), load_external_data=False)
    model = ir.from_proto(infer_shapes(proto, graph))
    ir.external_data.set_base_dir(model.graph, str(graph.parent))
    _read_integers(model)
    found = model.graph.opset_imports.get("")
    if found != CANONICAL_OPSET:
        raise PreconditionError(
            f"{graph} is not a canonical graph",
            f"its opset is {found}, the canonical one is {CANONICAL_OPSET}",
            "lower the graph of a bundle, not one that was lowered already",
        )
    common_passes.InlinePass()(model)
    return model


def reopen(graph: Path) -> ir.Model:
    """Read a graph as it is, canonical or lowered, weights left on disk."""
    try:
        proto = onnx.load(str(graph), load_external_data=False)
    except DecodeError as error:
        raise PreconditionError(
            f"{graph} cannot be read as a graph", str(error), "export the model again"
        ) from error
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, str(graph.parent))
    return model


def _read_integers(model: ir.Model) -> None:
    """Bring external integers and booleans into the model: sizes, axes, masks; never weights."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if (
            isinstance(tensor, ir.ExternalTensor)
            and tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
            and tensor.nbytes <= _READ_LIMIT
        ):
            value.const_value = ir.tensor(np.array(mapped(tensor)), name=value.name)


def mapped(tensor: ir.ExternalTensor) -> np.ndarray:
    """An external tensor as a read-only array over its file: memory is used as it is looked at."""
    if not tensor.size:
        return np.empty(tuple(tensor.shape.numpy()), tensor.dtype.numpy())
    return np.memmap(
        _weights_file(tensor),
        tensor.dtype.numpy(),
        "r",
        offset=tensor.offset or 0,
        shape=tuple(tensor.shape.numpy()),
    )


def written(file: BinaryIO, array: np.ndarray, name: str) -> ir.Value:
    """An initializer that holds `array`, written to the end of a file beside the graph."""
    file.write(bytes(-file.tell() % _PAGE))
    offset = file.tell()
    file.write(np.ascontiguousarray(array).view(np.uint8).data)  # BF16 is not a buffer's type
    external = ir.ExternalTensor(
        Path(file.name).name,
        offset,
        array.nbytes,
        ir.DataType.from_numpy(array.dtype),
        shape=ir.Shape(array.shape),
        name=name,
        base_dir=str(Path(file.name).parent),
    )
    return ir.Value(
        name=name, shape=external.shape, type=ir.TensorType(external.dtype), const_value=external
    )


def save(model: ir.Model, out: Path) -> None:
    """Check `model` (strict shape inference, the ONNX checker), then write it to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.RemoveUnusedOpsetsPass()(model)
    imports = [onnx.helper.make_opsetid(*item) for item in model.graph.opset_imports.items()]
    oldest = onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)
    model.ir_version = min(model.ir_version, oldest)
    if model.ir_version < _NODE_METADATA_IR:
        common_passes.ClearMetadataAndDocStringPass()(model)
    _link_weights(model, out)
    proto = infer_shapes(ir.to_proto(model), out)
    check(proto, out)
    write_atomic(out, proto.SerializeToString())


def infer_shapes(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Strict shape and type inference with data propagation."""
    try:
        return onnx.shape_inference.infer_shapes(
            proto, check_type=True, strict_mode=True, data_prop=True
        )
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise AddbenchError(
            f"the shapes of {path} do not fit together",
            str(error),
            "export the model again; if it stays, report it with the model's name",
        ) from error


def check(proto: onnx.ModelProto, path: Path) -> None:
    """The ONNX checker on everything but the weights, which stand in as inputs."""
    light = onnx.ModelProto()
    light.CopyFrom(proto)
    del light.graph.initializer[:]
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        else:
            light.graph.initializer.append(tensor)
    try:
        onnx.checker.check_model(light)
    except onnx.checker.ValidationError as error:
        raise AddbenchError(
            f"the lowered graph {path} fails the ONNX checker",
            str(error),
            "report it with the model's name: a pass made something that ONNX does not allow",
        ) from error


def _link_weights(model: ir.Model, out: Path) -> None:
    """Point every external initializer at `<out>.data`, and make that file."""
    names: dict[Path, str] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            source = _weights_file(tensor)
            number = len(names) or ""
            name = names.setdefault(source, f"{out.name}.data{number}")
            value.const_value = ir.ExternalTensor(
                name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name or "",
                base_dir=str(out.parent),
            )
    for source, name in names.items():
        link_or_copy(source, out.parent / name)


def _weights_file(tensor: ir.ExternalTensor) -> Path:
    """The file that holds an external tensor, in full, inside the graph's folder."""
    source, folder = Path(tensor.path).resolve(), Path(tensor.base_dir).resolve()
    if not source.is_relative_to(folder):
        raise PreconditionError(
            f"the weights of {tensor.name} are outside of the graph's folder",
            f"its external data is {tensor.location}",
            "export the model again: weights lie beside their graph",
        )
    size = source.stat().st_size if source.is_file() else 0
    if (tensor.offset or 0) + tensor.nbytes > size:
        raise PreconditionError(
            f"the weights file {source} is missing or too short",
            f"{tensor.name} lies beyond its end, at {size} bytes",
            "export the model again: the file was cut",
        )
    return source


def link_or_copy(source: Path, target: Path) -> None:
    """`target` becomes a hard link to `source`; across disks, a copy. Replaced atomically."""
    if target.exists() and target.samefile(source):
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        fresh = Path(scratch) / target.name
        try:
            os.link(source, fresh)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, fresh)
        os.replace(fresh, target)
