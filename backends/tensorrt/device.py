"""Memory, streams and CUDA graphs as a session needs them, through torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from backends.base import BackendError
from backends.nvidia.gpu import first_cause, memory_errors


class CudaDevice:
    """The GPU that torch uses now. One for each backend instance."""

    name = "cuda"

    def __init__(self) -> None:
        self._side: torch.cuda.Stream | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory at an address that stays. Usable outside of inference mode too."""
        with torch.inference_mode(False), memory_errors("for a TensorRT plan's tensors"):
            return torch.empty(tuple(shape), dtype=dtype, device=self.name)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Handle of the stream to enqueue on: torch's current one.

        On the legacy default stream TensorRT would synchronise in every call: there, work goes to
        a side stream that waits for it, and that it then waits for. The host waits for nothing.
        """
        current = torch.cuda.current_stream()
        if current.cuda_stream:
            yield current.cuda_stream
            return
        side = self._side = self._side or torch.cuda.Stream()
        side.wait_stream(current)
        yield side.cuda_stream
        current.wait_stream(side)

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured on the current stream, by whoever."""
        return torch.cuda.is_current_stream_capturing()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what `work` enqueues; the result replays it on torch's current stream."""
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                memory_errors("while a part was captured"),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                work()
        except RuntimeError as error:
            cause = first_cause(error)
            if isinstance(cause, BackendError):
                raise cause from None
            raise BackendError(
                "the part cannot be captured into a CUDA graph",
                f"{type(cause).__name__}: {cause}"[:500],
                "use trt:graph=none",
            ) from error
        return graph.replay

    def synchronize(self) -> None:
        torch.cuda.current_stream().synchronize()


class Scratch:
    """Activation memory that contexts share which never run at the same time.

    Contexts say what they need when they are made and ask for it when they first run: the largest
    need is then known, and one block serves all. A later, larger need gets a block of its own; the
    former stays with those that hold it, because captured graphs know its address.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._need = 0
        self._block: torch.Tensor | None = None

    def reserve(self, size: int) -> None:
        self._need = max(self._need, size)

    def block(self) -> torch.Tensor:
        if self._block is None or self._block.numel() < self._need:
            self._block = self._device.empty([max(1, self._need)], torch.uint8)
        return self._block

    def release(self) -> None:
        """Let go of the block; whoever runs in it still holds it."""
        self._block = None
