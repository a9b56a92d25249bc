"""What backends on an NVIDIA GPU share: is there one, does torch reach it, did its memory run out.

Which GPU and driver: `backends.nvidia.driver`, through libcuda. A probe imports no torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from backends.base import Capability, OutOfMemoryError, installed
from backends.nvidia.driver import NoGpu, driver_problem, find_gpu

ALLOCATION_FAILED = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cudaErrorMemoryAllocation",
    "Failed to allocate",
)
"""How torch, cuBLAS, cuDNN, the CUDA runtime and onnxruntime say that device memory ran out."""


def missing_gpu(built_for: int | None = None) -> Capability | None:
    """Why nothing runs on a GPU here, or None if it does.

    Args:
        built_for: major version of the CUDA that a library is built for.
    """
    gpu = find_gpu()
    if isinstance(gpu, NoGpu):
        return Capability(False, "no NVIDIA GPU can be used here", gpu.why, gpu.next)
    problem = driver_problem(gpu, built_for) if built_for is not None else None
    if problem is not None:
        return Capability(False, "the NVIDIA driver is too old", problem.why, problem.next)
    return None


def gpu_name() -> str:
    """The GPU that sessions run on, as its driver calls it; `none` without one."""
    gpu = find_gpu()
    return "none" if isinstance(gpu, NoGpu) else gpu.name


def architecture() -> str:
    """Its compute capability (`9.0`), which compiled results depend on; `none` without a GPU."""
    gpu = find_gpu()
    return "none" if isinstance(gpu, NoGpu) else gpu.architecture


def torch_cuda() -> int | None:
    """Major version of the CUDA that the installed torch is built for; None for a CPU build."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = Path(found.origin).with_name("version.py").read_text()
    built = re.search(r"^cuda\b.*=\s*['\"](\d+)\.", text, re.MULTILINE)
    return int(built[1]) if built else None


def torch_on_gpu() -> Capability | None:
    """Why torch cannot use a GPU here, or None if it can. torch is not imported."""
    built_for = torch_cuda()
    missing = missing_gpu(built_for)
    if missing is not None:
        return missing
    if built_for is None:
        return Capability(
            False,
            f"torch {installed('torch')} is built for the CPU only",
            "its version.py names no CUDA",
            "pip uninstall -y torch && pip install torch: its default build for Linux has CUDA",
        )
    return None


def first_cause(error: BaseException) -> BaseException:
    """What went wrong first. A capture that broke raises when it is ended too, and says only that
    there was an error before."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def ran_out(error: BaseException) -> bool:
    """Whether a library's exception means that device memory ran out."""
    text = str(first_cause(error)).lower()
    return any(hint.lower() in text for hint in ALLOCATION_FAILED)


@contextlib.contextmanager
def memory_errors(doing: str) -> Iterator[None]:
    """Turn a library's way of saying "no device memory" into OutOfMemoryError."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not ran_out(error):
            raise
        raise OutOfMemoryError(
            f"memory ran out {doing}",
            str(first_cause(error)).strip().splitlines()[0][:500],
            "use a smaller batch, the taesd decoder, or a GPU with more memory; `nvidia-smi` shows"
            " who else holds some",
        ) from error
