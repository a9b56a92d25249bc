"""CUDA streams and graphs on the CPU: a test double of what `torch.cuda` has of them.

A graph records every op between its begin and its end with the tensors it read and wrote, and a
replay does the same ops on the same memory again: what was computed on the host, or read from a
tensor that has moved since, is not computed anew - as on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class GraphDouble:
    """Stands for `torch.cuda.CUDAGraph`."""

    replays = 0

    def __init__(self) -> None:
        self.ops: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def replay(self) -> None:
        GraphDouble.replays += 1
        for op, args, kwargs, written in self.ops:
            again = tensors(op(*args, **kwargs))
            for old, new in zip(written, again, strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    """Runs every op and keeps it in a graph."""

    def __init__(self, graph: GraphDouble) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if any(tensor.is_pinned() for tensor in tensors((args, kwargs))):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.graph.ops.append((op, args, kwargs or {}, tensors(result)))
        return result


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


class StreamDouble:
    """Stands for `torch.cuda.Stream`: everything has happened already."""

    def wait_stream(self, _: StreamDouble) -> None: ...
    def synchronize(self) -> None: ...


@contextlib.contextmanager
def capture(graph: GraphDouble, **_: Any) -> Iterator[None]:
    try:
        with Recorder(graph):
            yield
    except BaseException:  # torch ends the capture first, and CUDA refuses to
        said = "CUDA error: operation failed due to a previous error during capture"
        raise RuntimeError(said) from None  # its context stays


@contextlib.contextmanager
def on_stream(_: StreamDouble) -> Iterator[None]:
    yield


def install(patch: pytest.MonkeyPatch) -> type[GraphDouble]:
    """Make `backends.pipeline.captured` believe that the CPU is a GPU."""
    from backends.pipeline.captured import DevicePipeline

    patch.setattr(DevicePipeline, "is_cuda", property(lambda _: True))
    for name, stand_in in {
        "CUDAGraph": GraphDouble,
        "Stream": StreamDouble,
        "current_stream": StreamDouble,
        "stream": on_stream,
        "graph": capture,
        "graph_pool_handle": object,
        "empty_cache": lambda: None,
    }.items():
        patch.setattr(torch.cuda, name, stand_in)
    patch.setattr(GraphDouble, "replays", 0)
    return GraphDouble
