"""onnxruntime's sessions on the CPU, their options, and its errors as ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import Backend, BackendError, OutOfMemoryError, Session
from backends.onnxrt import operators
from export.bundle import Spec

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle

MODEL = "model.onnx"
LEVELS = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


class OrtSession(Session):
    """An onnxruntime session on host tensors; inputs are shared, not copied."""

    def __init__(self, session: Any, bundle: Bundle, part: str) -> None:
        self.session = session
        info = bundle.source(part)
        known = {spec.name: spec.shape for spec in (*info.inputs, *info.outputs)}
        self.inputs, self.outputs = (
            {
                # What is handed over between the halves of a UNet is in no bundle.
                one.name: Spec(one.name, TYPES[one.type], known.get(one.name, tuple(one.shape)))
                for one in values
            }
            for values in (self.session.get_inputs(), self.session.get_outputs())
        )

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        try:
            results = self.session.run(None, arrays)
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise translate(error, "running the graph") from error
        return {
            name: torch.from_numpy(array) for name, array in zip(self.outputs, results, strict=True)
        }

    def close(self) -> None:
        del self.session


def plain_options(backend: Backend) -> Any:
    """onnxruntime's defaults, but for a number of threads that was asked for."""
    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.log_severity_level = 3
    if backend.texts["threads"] != "auto":
        made.intra_op_num_threads = backend.options["threads"]
    return made


def open_session(model: Path, options: Mapping[str, Any]) -> Any:
    import onnxruntime

    made = session_options(options, optimise=False)
    return onnxruntime.InferenceSession(str(model), made, ["CPUExecutionProvider"])


def session_options(options: Mapping[str, Any], *, optimise: bool) -> Any:
    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.log_severity_level = 3
    made.intra_op_num_threads = options["threads"]
    made.inter_op_num_threads = 1
    made.enable_cpu_mem_arena = options["arena"]
    spin = options["spin"]
    # Each part has a pool of its own: one that goes on spinning takes the cores from the next part
    # (tiny-sdxl on 2 cores, processes in turn: in-call 4.6 ms an image, never 5.6, always 13).
    made.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin != "never")))
    made.add_session_config_entry("session.force_spinning_stop", str(int(spin == "in-call")))
    level = LEVELS[options["level"]] if optimise else "ORT_DISABLE_ALL"
    if operators.are_in(options):
        operators.register(made)
    made.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    return made


def translate(error: Exception, doing: str, library: str = "onnxruntime") -> BackendError:
    """A library's exception as ours; allocation failures become OutOfMemoryError."""
    text = str(error)
    if isinstance(error, MemoryError) or "bad_alloc" in text or "Failed to allocate" in text:
        return OutOfMemoryError(
            f"{library} ran out of memory {doing}",
            text[:500],
            "use a smaller batch, or close other programs",
        )
    return BackendError(
        f"{library} failed {doing}", text[:2000], "`addbench cache verify`, then retry"
    )
