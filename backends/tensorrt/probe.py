"""Is TensorRT here, which version, on which GPU; and how to get what is missing.

Reads package metadata and asks the driver; tensorrt and torch are not imported.
"""

from __future__ import annotations

import importlib.util

from backends.base import Capability, UnavailableError
from backends.nvidia import installed, torch_cuda
from backends.tensorrt.gpu import Gpu, NoGpu, driver_problem, find_gpu

OLDEST = (10, 1)
"""Activation memory by `set_device_memory(address, size)` came with 10.1."""
ATTENTION = (10, 14)
"""The ONNX parser takes the Attention operator (its changelog, 10.14)."""
GROUP_NORM = (10, 9)
"""The ONNX parser takes GroupNormalization as opset 21 has it (its changelog, 10.9)."""
OLDEST_GPU = (7, 5)
"""Turing: the oldest architecture that TensorRT 11 supports."""
PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
INSTALL = (
    "pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu13 (tensorrt-cu12 where torch"
    " is built for CUDA 12; the libraries are on NVIDIA's own index), or use the container"
    " nvcr.io/nvidia/pytorch:<tag>-py3 (PyTorch and TensorRT) or nvcr.io/nvidia/tensorrt:<tag>-py3"
    " (TensorRT and trtexec)"
)
INSTALL_TORCH = "pip uninstall -y torch && pip install torch: its default build for Linux has CUDA"


def release(text: str) -> tuple[int, int]:
    """`10.14.1.48` -> (10, 14)."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def library_version() -> str | None:
    """Version of the installed TensorRT; `unknown` where no package says it; None without one."""
    found = importlib.util.find_spec("tensorrt")
    if found is None or found.origin is None:  # type stubs alone make a folder without a module
        return None
    return next((text for package in PACKAGES if (text := installed(package))), "unknown")


def capability(summary: str) -> Capability:
    """Usable here? If not, everything that is missing, and how to get each."""
    problems: list[NoGpu] = []
    library, gpu = library_version(), find_gpu()
    if isinstance(gpu, NoGpu):
        problems.append(gpu)
    else:
        problems += _gpu_problems(gpu)
    if library is None:
        problems.append(NoGpu("the package tensorrt is missing", INSTALL))
    elif library != "unknown" and release(library) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        problems.append(NoGpu(f"TensorRT {library} is older than {oldest}", INSTALL))
    if torch_cuda() is None:
        problems.append(NoGpu(f"torch {installed('torch')} has no CUDA", INSTALL_TORCH))
    if problems or isinstance(gpu, NoGpu):
        return Capability(
            False,
            "; ".join(problem.why for problem in problems),
            "TensorRT builds and runs its plans on an NVIDIA GPU, through torch's CUDA tensors",
            numbered([problem.next for problem in problems]),
            version=library or "",
        )
    return Capability(True, summary, version=library or "", devices=(gpu.name,))


def numbered(steps: list[str]) -> str:
    if len(steps) == 1:
        return steps[0]
    return "; ".join(f"({number}) {step}" for number, step in enumerate(steps, start=1))


def _gpu_problems(gpu: Gpu) -> list[NoGpu]:
    problems = []
    if gpu.capability < OLDEST_GPU:
        oldest = ".".join(map(str, OLDEST_GPU))
        why = f"{gpu.name} has compute capability {gpu.architecture}, TensorRT needs {oldest}"
        problems.append(NoGpu(why, "use a GPU of the Turing generation or newer"))
    needed = [cuda for cuda in (12, 13) if installed(f"tensorrt-cu{cuda}-libs")]
    newest = max([*needed, torch_cuda() or 0])
    too_old = driver_problem(gpu, newest)
    return [*problems, too_old] if too_old else problems


def loaded_version() -> str:
    """The version as the library itself says it. Imports tensorrt.

    Raises:
        UnavailableError: it is installed and does not load.
    """
    try:
        import tensorrt

        return str(tensorrt.__version__)
    except (ImportError, OSError, AttributeError) as error:
        raise UnavailableError(
            "backend trt cannot be used: TensorRT is installed and does not load",
            str(error),
            INSTALL,
        ) from error


def require_gpu() -> Gpu:
    gpu = find_gpu()
    if isinstance(gpu, NoGpu):
        raise UnavailableError(f"backend trt cannot be used: {gpu.why}", "", gpu.next)
    return gpu
