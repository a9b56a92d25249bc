"""Plan -> tensors in, tensors out."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path

import tensorrt as trt
import torch

from backends.base import BackendError, Session, UnsupportedError
from backends.tensorrt.build import parser_errors
from backends.tensorrt.device import CudaDevice, Scratch
from backends.tensorrt.log import Log
from export.bundle import Spec

TYPES = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.INT64: torch.int64,
}


class StalePlanError(BackendError):
    """A plan that this TensorRT or GPU does not take: it is to be built again."""


class Binding:
    """An engine at one batch size: its context, its buffers, and its CUDA graph.

    This is what a caller captures into a graph of its own: write `inputs`, call `enqueue`, read
    `outputs`. The addresses stay, nothing waits for the device. It must have run once before.

    Attributes:
        inputs, outputs: tensors on the device, by name; `outputs` hold the last run's results.
    """

    def __init__(
        self, engine: trt.ICudaEngine, batch: int, device: CudaDevice, scratch: Scratch, log: Log
    ) -> None:
        self._device, self._log = device, log
        self._replay: Callable[[], None] | None = None
        # A context of its own: a captured graph is void once its context is changed.
        context = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise log.failure("TensorRT made no execution context", "compile it again")
        self._context = context
        block = self._block = scratch.block()
        context.set_device_memory(block.data_ptr(), block.numel())
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        taken = True
        for name in names:
            shape = sizes(engine.get_tensor_shape(name))
            if is_input[name] and -1 in shape:
                bound = tuple(batch if size == -1 else size for size in shape)
                taken &= context.set_input_shape(name, bound)
        buffers: dict[str, torch.Tensor] = {}
        for name in names:
            shape = sizes(context.get_tensor_shape(name))
            buffers[name] = device.empty(shape, TYPES[engine.get_tensor_dtype(name)])
            taken &= context.set_tensor_address(name, buffers[name].data_ptr())
        if not taken:
            raise log.failure(f"TensorRT does not take a batch of {batch}", "use trt:batch=static")
        self.inputs = {name: buffer for name, buffer in buffers.items() if is_input[name]}
        self.outputs = {name: buffer for name, buffer in buffers.items() if not is_input[name]}

    def enqueue(self) -> None:
        """Put the engine's kernels on torch's current stream."""
        with self._device.stream() as stream:
            done = self._context.execute_async_v3(stream)
        if not done:
            raise self._log.failure(
                "TensorRT did not run the plan", "`addbench cache verify`, then retry"
            )

    def launch(self) -> None:
        """Do what `enqueue` does, from a CUDA graph that the first call captures."""
        if self._replay is None:
            self.enqueue()  # what it does the first time only cannot be captured
            self._replay = self._device.capture(self.enqueue)
        self._replay()


class TrtSession(Session):
    """A TensorRT engine on tensors of torch's current device and stream.

    Args:
        graph: replay a CUDA graph of the part, unless a caller is capturing one.
        scratch: activation memory, shared with the sessions that run before and after this one.
    """

    def __init__(
        self,
        engine: trt.ICudaEngine,
        device: CudaDevice,
        scratch: Scratch,
        log: Log,
        *,
        graph: bool,
    ) -> None:
        self._engine, self._log, self._cuda = engine, log, device
        self._scratch, self._graph = scratch, graph
        self._bindings: dict[int, Binding] = {}
        self.device = device.name
        self.inputs, self.outputs = (
            described(engine, mode) for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
        )
        scratch.reserve(engine.device_memory_size_v2)

    def binding(self, batch: int) -> Binding:
        """The engine at `batch`; made when first asked for.

        Raises:
            UnsupportedError: the plan is of another batch size or range.
            OutOfMemoryError: its buffers do not fit the GPU.
        """
        if batch not in self._bindings:
            self._check_batch(batch)
            self._bindings[batch] = Binding(
                self._engine, batch, self._cuda, self._scratch, self._log
            )
        return self._bindings[batch]

    def _check_batch(self, batch: int) -> None:
        spec = next(s for name, s in self.inputs.items() if name != "timestep")
        first = spec.shape[0]
        if isinstance(first, int):
            least = most = first
        else:
            low, _, high = self._engine.get_tensor_profile_shape(spec.name, 0)
            least, most = low[0], high[0]
        if not least <= batch <= most:
            taken = f"{least}" if least == most else f"{least} to {most}"
            raise UnsupportedError(
                f"a batch of {batch} does not fit this plan",
                f"it takes {taken}",
                f"pass that many prompts, or compile with trt:batch={min(least, batch)}"
                f"-{max(most, batch)}",
            )

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The buffers are the next run's too: what is handed out is a copy.
        return {name: buffer.clone() for name, buffer in self.enqueue(inputs).items()}

    def enqueue(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Run on torch's current stream without waiting; the results are the binding's buffers."""
        batch = next(t.shape[0] for name, t in inputs.items() if name != "timestep")
        binding = self.binding(batch)
        for name, buffer in binding.inputs.items():
            given = inputs[name]
            if given.shape != buffer.shape or given.dtype != buffer.dtype:
                raise BackendError(
                    f"the input {name} is {given.dtype} {list(given.shape)}",
                    f"this plan takes {buffer.dtype} {list(buffer.shape)}",
                    "pass it so",
                )
            if given.data_ptr() != buffer.data_ptr():
                buffer.copy_(given, non_blocking=True)
        if self._graph and not self._cuda.capturing():
            binding.launch()
        else:
            binding.enqueue()
        return binding.outputs

    def synchronize(self) -> None:
        self._cuda.synchronize()

    def close(self) -> None:
        """Graphs and contexts first, then the engine, then what they wrote to."""
        self._cuda.synchronize()
        self._bindings.clear()
        del self._engine
        self._scratch.release()


def sizes(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(dims[axis] for axis in range(len(dims)))


def described(engine: trt.ICudaEngine, mode: trt.TensorIOMode) -> dict[str, Spec]:
    """The engine's inputs or outputs: those of its graph, which may be half a UNet. In a static
    plan every axis is a number; what is named is the batch."""
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == mode:
            dtype = str(TYPES[engine.get_tensor_dtype(name)]).removeprefix("torch.")
            shape = sizes(engine.get_tensor_shape(name))
            found[name] = Spec(name, dtype, tuple("batch" if n == -1 else n for n in shape))
    return found


def load_engine(plan: Path, log: Log, *, foreign_code: bool) -> trt.ICudaEngine:
    """The engine of a plan file.

    Args:
        foreign_code: run the host code that a version-compatible plan brings with it.

    Raises:
        StalePlanError: TensorRT does not take it: another version, another GPU, a damaged file.
        OutOfMemoryError: its weights do not fit the GPU.
    """
    try:
        runtime = trt.Runtime(log)
    except TypeError as error:  # the bindings' word for a constructor that gave nothing
        raise log.failure("TensorRT's runtime does not start", "check `nvidia-smi`") from error
    if foreign_code:
        runtime.engine_host_code_allowed = True
    # Mapped: the UNet's plan is 5 GB, which need not lie in memory a second time.
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        engine = runtime.deserialize_cuda_engine(mapped)
    if engine is None:
        failed = log.failure("TensorRT does not take the plan", "it is built again")
        if log.out_of_memory:
            raise failed
        raise StalePlanError(failed.what, failed.why, failed.next)
    return engine


def refit(engine: trt.ICudaEngine, graph: Path, log: Log) -> None:
    """Put the weights of the lowered `graph` into an engine whose plan was stripped of them."""
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(graph)):
        raise BackendError(
            "TensorRT cannot put the weights back into the plan",
            parser_errors(parser),
            "use trt:refit=0; `addbench verify` checks the bundle",
        )
    if not refitter.refit_cuda_engine():
        missing = ", ".join(refitter.get_missing_weights()[:8])
        raise log.failure(
            f"TensorRT's plan misses weights: {missing or 'it does not say which'}",
            "use trt:refit=0",
        )
