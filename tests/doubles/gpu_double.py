"""The GPU and its memory as the TensorRT double sees them: a test double of both.

"Device memory" are CPU tensors that `DeviceDouble` handed out; a stream is a number, a CUDA graph
a list of what was enqueued.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from backends.base import OutOfMemoryError
from backends.nvidia.driver import Gpu


class ApiMisuse(AssertionError):
    """The code under test did what the real API does not allow."""


def demand(condition: object, rule: str) -> None:
    if not condition:
        raise ApiMisuse(rule)


class World:
    """What the double's GPU and library are like, and what was done with them."""

    def __init__(self) -> None:
        self.version = "10.14.1.48"
        self.gpu = Gpu("Test Double 9000", (9, 0), (13, 0), 8 * 2**30)
        self.unsupported: set[str] = set()
        """Operators that the parser refuses."""
        self.build_error: str | None = None
        """What a build that gives no plan logs."""
        self.builds = self.executions = self.replays = self.known_timings = 0
        self.memory: dict[int, weakref.ref[torch.Tensor]] = {}
        self.stream_handle = 0
        self.recording: list[tuple[Any, int]] | None = None

    @property
    def release(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def identity(self) -> list[str]:
        return [self.version, self.gpu.name, self.gpu.architecture]

    def tensor(self, address: int, size: int, what: str) -> torch.Tensor:
        """The live device memory at `address`, which must be of `size` bytes."""
        reference = self.memory.get(address)
        tensor = reference() if reference else None
        demand(tensor is not None, f"{what}: no device memory is alive at this address")
        assert tensor is not None
        held = tensor.numel() * tensor.element_size()
        demand(held == size, f"{what}: {held} bytes at this address, {size} are needed")
        return tensor


WORLD = World()


class DeviceDouble:
    """Stands for `backends.tensorrt.device.CudaDevice`: CPU tensors as device memory."""

    name = "cpu"

    def __init__(self) -> None:
        self.synchronized = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode(False):
            tensor = torch.full(tuple(shape), 1, dtype=dtype)
        bytes_held = sum(
            t.numel() * t.element_size()
            for reference in WORLD.memory.values()
            if (t := reference()) is not None
        )
        if bytes_held > WORLD.gpu.memory_bytes:
            raise OutOfMemoryError("the double's memory ran out", "it was told so", "less")
        WORLD.memory[tensor.data_ptr()] = weakref.ref(tensor)
        return tensor

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        WORLD.stream_handle = 7
        yield WORLD.stream_handle
        WORLD.stream_handle = 0

    def capturing(self) -> bool:
        return WORLD.recording is not None

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        demand(WORLD.recording is None, "captures do not nest")
        WORLD.recording = []
        work()
        recorded, WORLD.recording = WORLD.recording, None

        def replay() -> None:
            for context, state in recorded:
                demand(context._state == state, "a graph is void once its context was changed")
                context._compute()
                WORLD.replays += 1

        return replay

    def synchronize(self) -> None:
        self.synchronized += 1
