"""nvidia-modelopt: canonical graph + calibration file -> scales, on the CPU.

modelopt is given the graph as FP32 in plain operators, and only its scales are taken: its own
FP16 conversion would also convert what the graph keeps in FP32 on purpose (the sinusoids of a
timestep near 1000 are noise in FP16), and writes the weights out again.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import AddbenchError, PreconditionError
from core.files import sha256_file
from export.quantize.qdq import SCALES, SCHEMES, LayerScales, QdqScheme, write_scales

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from export.quantize.calibration import Calibration

PACKAGE = "nvidia-modelopt"
MODULES = ("modelopt", "onnx_graphsurgeon", "onnxslim", "lief", "onnxruntime")
"""What modelopt's ONNX half imports on the way to a scale."""
INSTALL = "pip install -e '.[cpu,modelopt]' (beside onnxruntime-gpu: without cpu)"
SKIPPED = re.compile(r"conv_in|conv_out|conv_shortcut")
"""Convolutions that stay as they are: few channels, or on the way around a block. So do the Gemms,
which embed time and size. NVIDIA's recipe for SDXL leaves out the same layers (Model-Optimizer,
examples/diffusers/quantization/utils.py)."""
METHOD = "max"
"""A tensor's range is its largest value in the samples. modelopt's conversion of scales to FP8 is
made for no other; its default for INT8, `entropy`, clips, and doubles the error of the UNet of
models/shapes-teacher (6.0e-2 for 3.2e-2)."""


def modelopt_version() -> str:
    """Version of the installed modelopt; PreconditionError with what is missing."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        missing = [PACKAGE, *(name for name in missing if name != "modelopt")]
    if missing:
        raise PreconditionError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            "calibrated schemes (qdq-fp8, qdq-int8) take their scales from nvidia-modelopt, which"
            " calibrates on the CPU with onnxruntime",
            INSTALL,
        )
    return found


def make_scales(graph: Path, scheme: str, calibration: Path, folder: Path) -> None:
    """Let modelopt calibrate the UNet at `graph`; writes `scales.safetensors` into `folder`.

    Best in a process of its own: modelopt patches onnxruntime's modules.

    Raises:
        PreconditionError: modelopt or the calibration file is missing.
        AddbenchError: modelopt failed, or quantised nothing.
    """
    from export.quantize.calibration import Calibration

    found = modelopt_version()
    chosen, recorded = SCHEMES[scheme], Calibration.open(calibration)
    folder.mkdir(parents=True, exist_ok=True)
    scratch_folder = tempfile.TemporaryDirectory(dir=folder, prefix=".modelopt-")
    with without("tensorrt"), scratch_folder as scratch:
        work = Path(scratch)
        before, tempfile.tempdir = tempfile.tempdir, scratch  # modelopt writes whole models there
        try:
            names = calibration_graph(graph, work / "fp32.onnx")
            wanted = [alias for alias, (_, large) in names.items() if large]
            quantise(work / "fp32.onnx", work / "qdq.onnx", chosen, recorded, wanted)
            layers = harvest(work / "qdq.onnx", {a: n for a, (n, _) in names.items()})
        finally:
            tempfile.tempdir = before
    if not layers:
        raise AddbenchError(
            f"modelopt {found} quantised no layer of {graph}",
            f"{len(wanted)} were asked for; it leaves out what is too narrow for tensor cores",
            "use the model as it is: precision=fp16",
        )
    facts = {
        "scheme": scheme,
        "modelopt": found,
        "method": METHOD,
        "graph": sha256_file(graph),
        "calibration": recorded.hash,
        "samples": recorded.samples,
        "asked": len(wanted),
    }
    write_scales(folder / SCALES, layers, facts)


@contextmanager
def without(module: str) -> Iterator[None]:
    """A block in which `module` cannot be imported.

    modelopt looks in TensorRT for plugins: on a GPU, though these graphs have none, and where only
    TensorRT's type stubs are installed it fails.
    """
    before = {name: found for name, found in sys.modules.items() if name == module}
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
        sys.modules.update(before)


def quantise(
    source: Path, out: Path, scheme: QdqScheme, recorded: Calibration, wanted: list[str]
) -> None:
    """modelopt's own call; the names that it is given are taken as patterns of a name's start."""
    from modelopt.onnx.quantization import quantize
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class SampleReader(CalibrationDataReader):
        """The recorded samples, as modelopt reads them."""

        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self.feeds = recorded.feeds()

        def get_next(self) -> Any:
            sample = next(self.feeds, None)
            return sample and {name: as_float(array) for name, array in sample.items()}

        def get_first(self) -> Any:
            self.rewind()
            first = self.get_next()
            self.rewind()
            return first

    try:
        quantize(
            str(source),
            quantize_mode=scheme.mode,
            calibration_data_reader=SampleReader(),
            calibration_method=METHOD,
            calibration_eps=["cpu"],
            op_types_to_quantize=["Conv", "MatMul"],
            nodes_to_quantize=wanted,
            use_external_data_format=True,
            output_path=str(out),
            high_precision_dtype="fp32",
            passes=[],
            log_level="WARNING",
        )
    except Exception as error:  # whatever modelopt and onnxruntime raise
        raise AddbenchError(
            f"modelopt failed to calibrate {scheme.name}",
            f"{type(error).__name__}: {error}"[:2000],
            f"the versions that were seen to work are pinned in constraints.txt; {INSTALL}",
        ) from error


def as_float(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """FP16 as FP32, as the calibration graph takes it."""
    return array.astype("float32") if array.dtype == "float16" else array


def calibration_graph(graph: Path, out: Path) -> dict[str, tuple[str, bool]]:
    """Write the FP32 graph of batch 1 that modelopt calibrates; its own weights lie beside it.

    Every operator is one that its shape inference knows, every name as long as any other: modelopt
    matches names by their start, and `node_linear` would take `node_linear_6` with it.

    Returns:
        Name in that graph -> name in the canonical one, and whether it is to be quantised.
    """
    import onnx_ir as ir

    from export.lower import Profile, lower, storage

    plain = Profile(
        "calibration", opset=19, attention="matmul", norms="decomposed", dtype="float32", batch=1
    )
    names = {}
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:  # a link to the weights is in it
        lower(graph, plain, Path(scratch) / out.name)
        model = ir.load(Path(scratch) / out.name)
        fold_casts(model.graph, storage)
        for number, node in enumerate(model.graph):
            names[f"n{number:06d}"] = (node.name or "", is_large(node))
            node.name = f"n{number:06d}"
        ir.save(model, out, external_data=f"{out.name}.data")
    return names


def fold_casts(graph: ir.Graph, storage: Any) -> None:
    """Each weight with a Cast to FP32 behind it becomes an FP32 weight, read when it is saved."""
    import onnx_ir as ir

    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Cast" else None
        if weight is None or weight.const_value is None:
            continue
        wide, name = node.outputs[0], weight.name or ""
        folded = ir.Value(name=name, shape=wide.shape, type=wide.type)
        folded.const_value = as_fp32(weight.const_value, name, storage)
        ir.convenience.replace_all_uses_with(wide, folded)
        graph.remove(node, safe=True)
        del graph.initializers[name]
        graph.register_initializer(folded)
    for name, value in graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):  # FP32 as it is, in the linked file
            value.const_value = as_fp32(value.const_value, name, storage)


def as_fp32(tensor: ir.TensorProtocol, name: str, storage: Any) -> ir.LazyTensor:
    """`tensor` in FP32, converted when it is wanted: not all weights at once."""
    import onnx_ir as ir

    def read() -> ir.TensorProtocol:
        stored = isinstance(tensor, ir.ExternalTensor)
        array = storage.mapped(tensor) if stored else tensor.numpy()
        return ir.tensor(array.astype("float32"))

    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name=name)


def is_large(node: ir.Node) -> bool:
    """Whether the schemes quantise it: a convolution or a linear layer over tokens."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op_type not in ("Conv", "MatMul") or weight is None or weight.const_value is None:
        return False
    return not SKIPPED.search(weight.name or "")


def harvest(graph: Path, names: dict[str, str]) -> dict[str, LayerScales]:
    """The scales of a graph with Q/DQ pairs: canonical node name -> its layer's."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}

    def pair(value: str) -> tuple[np.ndarray[Any, Any], int] | None:
        node = made_by.get(value)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        scale = onnx.numpy_helper.to_array(stored[node.input[1]], base_dir=str(graph.parent))
        return scale, axis

    layers = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "MatMul"):
            continue
        activation, weight = pair(node.input[0]), pair(node.input[1])
        if activation is not None and weight is not None:
            scale = weight[0].reshape(-1)
            layers[names[node.name]] = LayerScales(float(activation[0]), scale, weight[1])
    return layers
