"""A test double of TensorRT's Python API and of the GPU below it. It stands for neither's speed.

`import tensorrt` gives this module while a `World` is installed. What a real build chooses kernels
for is computed here by onnxruntime on the CPU, in the dtypes of the graph; "device memory" are CPU
tensors that `DeviceDouble` handed out. It is strict where the real API is silent or crashes:

- every object must have been made as the API says, every tensor address must belong to device
  memory that is alive and of the exact size, every shape must lie in the profile;
- a call on the default stream, a capture without a run before it, a replay after its context was
  changed, activation memory that is too small: each is an `ApiMisuse`;
- what TensorRT answers with None or False and a logged error, it answers so too.

Names, signatures and enum members are held against the published type stubs by a test.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import gpu_double as gpu
import numpy as np
import torch
from gpu_double import DeviceDouble, World, demand
from tensorrt_build_double import *  # noqa: F403  # one module, as `import tensorrt` gives it
from tensorrt_build_double import (
    BYTES,
    AttentionInputLayer,
    DataType,
    Dims,
    ExecutionContextAllocationStrategy,
    ILogger,
    Reader,
    Severity,
    TensorIOMode,
    checked_logger,
)

__version__ = "10.14.1.48"
IAttentionInputLayer = AttentionInputLayer


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = checked_logger(logger)
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        content = bytes(memoryview(serialized_engine))
        if not content.startswith(b"PLAN"):
            return self._refuse("Error Code 1: Serialization (magic tag does not match)")
        plan = pickle.loads(content[4:])
        if plan["portable"] and not self.engine_host_code_allowed:
            return self._refuse("the plan has host code and engine_host_code_allowed is False")
        if plan["identity"] != gpu.WORLD.identity and not plan["portable"]:
            return self._refuse(
                "The engine plan file is not compatible with this version of TensorRT, expecting"
                f" {gpu.WORLD.identity} got {plan['identity']}, please rebuild."
            )
        weights = sum(map(len, plan["data"].values()))
        if weights > gpu.WORLD.gpu.memory_bytes:
            return self._refuse(f"Error Code 2: OutOfMemory (Requested size was {weights} bytes.)")
        return ICudaEngine(plan, self)

    def _refuse(self, why: str) -> None:
        self._logger.log(Severity.ERROR, f"IRuntime::deserializeCudaEngine: {why}")


class ICudaEngine:
    def __init__(self, plan: dict[str, Any], runtime: Runtime) -> None:
        self._plan, self._runtime = plan, runtime  # keep_alive: an engine holds its runtime
        self._modes = {name: TensorIOMode.INPUT for name, _, _ in plan["inputs"]}
        self._modes |= {name: TensorIOMode.OUTPUT for name, _, _ in plan["outputs"]}
        self._specs = {spec[0]: spec for spec in (*plan["inputs"], *plan["outputs"])}
        self._session: Any = None

    @property
    def num_io_tensors(self) -> int:
        return len(self._specs)

    @property
    def device_memory_size_v2(self) -> int:
        return 1024 + len(self._plan["graph"])

    def get_tensor_name(self, index: int) -> str:
        return list(self._specs)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._modes[name]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._specs[name][1]

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._specs[name][2])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        demand(profile_index == 0, "there is one profile")
        return [Dims(shape) for shape in self._plan["profiles"][name]]

    def create_execution_context(
        self,
        strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC,
    ) -> IExecutionContext:
        return IExecutionContext(self, strategy)

    def _infer(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        import onnxruntime

        demand(self._plan["data"] or not self._needs_data(), "the plan's weights are missing")
        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "model.onnx").write_bytes(self._plan["graph"])
                for name, content in self._plan["data"].items():
                    (Path(folder) / name).write_bytes(content)
                self._session = onnxruntime.InferenceSession(
                    str(Path(folder) / "model.onnx"), options, ["CPUExecutionProvider"]
                )
        return self._session.run([name for name, _, _ in self._plan["outputs"]], inputs)

    def _needs_data(self) -> bool:
        return b"location" in self._plan["graph"]


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        self._engine, self._strategy = engine, strategy
        self._shapes: dict[str, list[int]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._state = 0
        """Grows with every change; a captured graph is of one state."""
        self._ran_in: int | None = None

    def set_device_memory(self, memory: int, size: int) -> None:
        managed = self._strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        demand(managed, "this context manages its own memory")
        demand(size >= self._engine.device_memory_size_v2, "the activation memory is too small")
        self._memory, self._state = (memory, size), self._state + 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine._plan["profiles"].get(name, ([], [], []))
        fits = all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if not fits:
            self._engine._runtime._logger.log(Severity.ERROR, f"{name} {shape} is out of profile")
            return False
        self._shapes[name], self._state = list(shape), self._state + 1
        return True

    def get_tensor_shape(self, name: str) -> Dims:
        shape = list(self._shapes.get(name, self._engine._specs[name][2]))
        if -1 in shape and self._engine.get_tensor_mode(name) == TensorIOMode.OUTPUT:
            batches = {given[0] for given in self._shapes.values()}
            demand(len(batches) == 1, "the output's shape is not known before the inputs'")
            shape[0] = batches.pop()
        demand(-1 not in shape, f"the shape of {name} was not set")
        return Dims(shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        demand(name in self._engine._specs, f"there is no tensor {name}")
        self._addresses[name], self._state = memory, self._state + 1
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        demand(stream_handle != 0, "on the default stream every call synchronises")
        demand(stream_handle == gpu.WORLD.stream_handle, "this is not the current stream")
        if gpu.WORLD.recording is not None:
            demand(self._ran_in == self._state, "a context runs once before it is captured")
            gpu.WORLD.recording.append((self, self._state))
            return True
        self._compute()
        self._ran_in = self._state
        gpu.WORLD.executions += 1
        return True

    def _compute(self) -> None:
        if self._strategy == ExecutionContextAllocationStrategy.USER_MANAGED:
            demand(self._memory is not None, "set_device_memory was not called")
            assert self._memory is not None
            # Activations are written before any output is: memory that is an output's too shows.
            gpu.WORLD.tensor(*self._memory, "activation memory").view(torch.uint8).fill_(0xAB)
        tensors = {}
        for name, (_, dtype, _) in self._engine._specs.items():
            dims = self.get_tensor_shape(name)
            shape = [dims[axis] for axis in range(len(dims))]
            demand(name in self._addresses, f"the address of {name} was not set")
            size = int(np.prod(shape)) * BYTES[dtype]
            tensor = gpu.WORLD.tensor(self._addresses[name], size, name)
            demand(list(tensor.shape) == shape, f"{name} is {list(tensor.shape)}, not {shape}")
            tensors[name] = tensor
        feeds = {name: tensors[name].numpy() for name, _, _ in self._engine._plan["inputs"]}
        results = self._engine._infer(feeds)
        for (name, _, _), result in zip(self._engine._plan["outputs"], results, strict=True):
            demand(result.dtype == tensors[name].numpy().dtype, f"{name} has another dtype")
            tensors[name].copy_(torch.from_numpy(result))


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine, self._logger = engine, checked_logger(logger)
        self._given: dict[str, bytes] | None = None
        demand(engine._plan["stripped"], "this engine is not refittable")

    def refit_cuda_engine(self) -> bool:
        if self._given is None:
            return False
        self._engine._plan["data"] = self._given
        return True

    def get_missing_weights(self) -> list[str]:
        return [] if self._given else ["every weight"]


class OnnxParserRefitter(Reader):
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        super().__init__(logger)
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        read = self._read(model)
        if read is None:
            return False
        proto, data = read
        digest = hashlib.sha256(proto.SerializeToString()).hexdigest()
        if digest != self._refitter._engine._plan["digest"]:
            self._fail("the weights' names are not those of the engine")
            return False
        self._refitter._given = data
        return True


def install(monkeypatch: Any, version: str = "10.14.1.48") -> World:
    """A fresh world in the place of TensorRT and the GPU, until `monkeypatch` is undone."""
    module = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    from backends.tensorrt import device, probe

    for where, name, value in (
        (gpu, "WORLD", World()),
        (module, "__version__", version),
        (module, "IAttentionInputLayer", AttentionInputLayer),
    ):
        monkeypatch.setattr(where, name, value, raising=False)
    set_version(version)
    here = ("tensorrt", "tensorrt-cu13-libs")
    monkeypatch.setattr(probe, "find_gpu", lambda: gpu.WORLD.gpu)
    monkeypatch.setattr(probe, "torch_cuda", lambda: 13)
    monkeypatch.setattr(probe, "installed", lambda n: gpu.WORLD.version if n in here else None)
    monkeypatch.setattr(device, "CudaDevice", DeviceDouble)
    return gpu.WORLD


def set_version(version: str) -> None:
    """The double becomes another release: what that one does not have is gone."""
    module = sys.modules[__name__]
    gpu.WORLD.version = version
    module.__version__ = version  # type: ignore[attr-defined]
    if gpu.WORLD.release >= (10, 14):
        module.IAttentionInputLayer = AttentionInputLayer  # type: ignore[attr-defined]
    elif hasattr(module, "IAttentionInputLayer"):
        del module.IAttentionInputLayer
