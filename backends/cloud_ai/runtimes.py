"""One compiled program on one device, over each Python runtime that the SDK has.

All three take and give contiguous arrays of exactly the program's shapes and types. They are:

    QaicRuntime     `qaic.Session`: the SDK's high-level package; raw buffers out. Programs of one
                    device share an oversubscription group, as in the public recipe: each of the
                    four has all cores, and the runtime lets them take turns.
    QaicrtRuntime   `qaicrt`: the low-level bindings, driven as quic/efficient-transformers does.
                    No group there: a program is activated when it is called, and those that hold
                    its cores are deactivated first.
    EpRuntime       ONNX Runtime's QAicExecutionProvider over the compiled program; its buffers
                    have the graph's types.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from backends.base import BackendError, UnavailableError
from backends.cloud_ai.probe import library
from backends.cloud_ai.qpc import FILE
from backends.cloud_ai.spec import CompileSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class Buffer:
    """Shape and type of an input or output of a program."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Program:
    """What a runtime is to load, and where.

    Attributes:
        folder: holds programqpc.bin.
        device: id of the device (QID).
        spec: as it was compiled; `cores` is what it holds while it runs.
        cores_total: of the device, or None if unknown.
        root: of the SDK.
        graph: the lowered ONNX file (EpRuntime only).
    """

    folder: Path
    device: int
    spec: CompileSpec
    cores_total: int | None
    root: Path
    graph: Path | None = None


class Runtime(ABC):
    """A loaded program. `inputs` and `outputs` by name."""

    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]

    @abstractmethod
    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]: ...

    def close(self) -> None:
        """Give the device's cores and memory back."""


def import_sdk(name: str, *folders: Path) -> ModuleType:
    """A module of the SDK: installed, or below its root, which pip does not know."""
    for folder in folders:
        if folder.is_dir() and str(folder) not in sys.path:
            sys.path.append(str(folder))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(
            f"the Python module {name} of the SDK does not import",
            str(error),
            "install the Platform SDK for this Python version, or use qaic:runtime=...",
        ) from error


# ---- qaic.Session


def described(session: Any, kind: str) -> dict[str, Buffer]:
    """`model_<kind>_shape_dict`: a method in the documentation, an attribute in the samples."""
    found = getattr(session, f"model_{kind}_shape_dict")
    entries = found() if callable(found) else found
    return {
        name: Buffer(tuple(int(size) for size in shape), np.dtype(dtype))
        for name, (shape, dtype) in entries.items()
    }


class QaicRuntime(Runtime):
    def __init__(self, program: Program) -> None:
        qaic = import_sdk("qaic")
        if not hasattr(qaic, "Session"):
            raise UnavailableError(
                "the installed Python module qaic is not Qualcomm's",
                "it has no Session",
                f"pip install {library(program.root)}/qaic-*.whl in place of it",
            )
        self.session = qaic.Session(
            model_path=str(program.folder / FILE),
            dev_id=program.device,
            num_activations=1,
            set_size=1,
            oversubscription_name=f"addbench-{program.device}",
        )
        if hasattr(self.session, "setup"):
            self.session.setup()
        self.inputs, self.outputs = (described(self.session, kind) for kind in ("input", "output"))

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        raw = self.session.run(dict(arrays))
        return {
            name: np.frombuffer(raw[name], buffer.dtype).reshape(buffer.shape)
            for name, buffer in self.outputs.items()
        }

    def close(self) -> None:
        if hasattr(self.session, "reset"):
            self.session.reset()


# ---- qaicrt


class QaicrtRuntime(Runtime):
    active: ClassVar[dict[int, list[QaicrtRuntime]]] = {}
    """Programs that hold cores, by device; oldest first."""
    turns: ClassVar[defaultdict[int, threading.RLock]] = defaultdict(threading.RLock)
    """One call at a time on a device: the next one may take its program's cores away."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.rt = rt = import_sdk("qaicrt", library(program.root))
        api = import_sdk("QAicApi_pb2", program.root / "dev" / "python")
        self.types = {
            getattr(api, name): np.dtype(kind)
            for name, kind in {
                "FLOAT_TYPE": np.float32,
                "FLOAT_16_TYPE": np.float16,
                "INT32_I_TYPE": np.int32,
                "INT64_I_TYPE": np.int64,
                "INT8_TYPE": np.int8,
            }.items()
        }
        devices = rt.QIDList([program.device])
        self.context = rt.Context(devices)
        self.queue = rt.Queue(self.context, program.device)
        container = rt.Qpc(str(program.folder))
        status, described = container.getIoDescriptor()
        self._check(status, "reading the program's description")
        description = api.IoDesc()
        description.ParseFromString(bytes(described))
        self.bindings = list(description.selected_set.bindings)
        self.inputs, self.outputs = (
            {
                binding.name: Buffer(tuple(binding.dims), self.types[binding.type])
                for binding in self.bindings
                if binding.dir == direction
            }
            for direction in (api.BUFFER_IO_TYPE_INPUT, api.BUFFER_IO_TYPE_OUTPUT)
        )
        properties = rt.QAicProgramProperties()
        self.loaded = rt.Program(self.context, program.device, container, properties)
        self._check(self.loaded.load(), "loading the program")
        self.execution: Any = None

    def _check(self, status: Any, doing: str) -> None:
        if status != self.rt.QStatus.QS_SUCCESS:
            raise BackendError(f"qaicrt failed {doing}", f"status {status}", "qaic-util -q")

    def _activate(self) -> None:
        """Take the cores, from other programs of ours if there are not enough for both."""
        if self.execution is not None:
            return
        holders = self.active.setdefault(self.program.device, [])
        total = self.program.cores_total or 0  # unknown: one program at a time
        while holders and sum(one.program.spec.cores for one in [*holders, self]) > total:
            holders[0]._deactivate()
        self._check(self.loaded.activate(), "activating the program")
        self.execution = self.rt.ExecObj(self.context, self.loaded)
        holders.append(self)

    def _deactivate(self) -> None:
        if self.execution is not None:
            self.execution = None
            self.active[self.program.device].remove(self)
            self.loaded.deactivate()

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        with self.turns[self.program.device]:
            self._activate()
            return self._execute(arrays)

    def _execute(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        rt = self.rt
        buffers = [
            rt.QBuffer(arrays[each.name].tobytes())
            if each.name in self.inputs
            else rt.QBuffer(bytes(each.size))
            for each in self.bindings
        ]
        dimensions = rt.BufferDimensionsVecRef(
            [(self.types[each.type].itemsize, list(each.dims)) for each in self.bindings]
        )
        self._check(self.execution.setData(buffers, dimensions), "setting the buffers")
        self._check(self.queue.enqueue(self.execution), "enqueueing")
        self._check(self.execution.waitForCompletion(), "running")
        status, results = self.execution.getData()
        self._check(status, "reading the buffers")
        return {
            name: np.frombuffer(bytes(results[index]), buffer.dtype).reshape(buffer.shape)
            for index, each in enumerate(self.bindings)
            if (buffer := self.outputs.get(name := each.name)) is not None
        }

    def close(self) -> None:
        with self.turns[self.program.device]:
            self._deactivate()


# ---- ONNX Runtime


def settings_yaml(program: Program) -> str:
    """The model-settings file of the QAic EP: with `aic-binary-dir` it skips compiling."""
    spec = program.spec
    lines = {
        "aic-binary-dir": program.folder,
        "device-id": program.device,
        "set-size": 1,
        "aic-num-of-activations": 1,
        "aic-num-cores": spec.cores,
        "mos": spec.mos,
        "ols": spec.ols,
        "convert-to-fp16": spec.convert_to_fp16,
        "onnx-define-symbol": " ".join(f"{name},{value}" for name, value in spec.symbols) or None,
        "aic-enable-depth-first": True if spec.depth_first_mem else None,
        "aic-depth-first-mem": spec.depth_first_mem,
        "aic-hw": True,
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None)


class EpRuntime(Runtime):
    PROVIDER = "QAicExecutionProvider"
    KINDS: ClassVar[Mapping[str, str]] = {
        "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64",
    }  # fmt: skip

    def __init__(self, program: Program) -> None:
        import onnxruntime

        if self.PROVIDER not in onnxruntime.get_available_providers():
            raise UnavailableError(
                f"the installed onnxruntime has no {self.PROVIDER}",
                "it comes as a patched build inside of Qualcomm's containers",
                "use that container's Python, or qaic:runtime=qaic",
            )
        if program.graph is None:
            raise BackendError("the QAic EP needs the graph", "it was not lowered", "compile it")
        with tempfile.TemporaryDirectory(prefix="addbench-qaic-ep-") as scratch:
            config = Path(scratch) / "settings.yaml"
            config.write_text(settings_yaml(program))
            options = {"config": str(config), "aic_device_id": str(program.device)}
            self.session = onnxruntime.InferenceSession(
                str(program.graph), providers=[(self.PROVIDER, options)]
            )
        sizes = dict(program.spec.symbols)
        self.inputs, self.outputs = (
            {
                value.name: Buffer(
                    tuple(sizes.get(d, d) for d in value.shape),
                    np.dtype(self.KINDS[value.type]),
                )
                for value in values
            }
            for values in (self.session.get_inputs(), self.session.get_outputs())
        )

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self.outputs, self.session.run(None, dict(arrays)), strict=True))

    def close(self) -> None:
        del self.session


CLASSES: dict[str, Callable[[Program], Runtime]] = {
    "qaic": QaicRuntime,
    "qaicrt": QaicrtRuntime,
    "ep": EpRuntime,
}
