"""Is TensorRT here, which version, on which GPU; and how to get what is missing.

Reads package metadata and asks the driver; tensorrt and torch are not imported.
"""

from __future__ import annotations

import importlib.util

from backends.base import Capability, UnavailableError, installed
from backends.nvidia.driver import Gpu, NoGpu, driver_problem, find_gpu
from backends.nvidia.gpu import torch_cuda
from core.errors import PreconditionError
from export.quantize.modelopt import modelopt_version

OLDEST = (10, 1)
"""Activation memory by `set_device_memory(address, size)` came with 10.1."""
ATTENTION = (10, 14)
"""The ONNX parser takes the Attention operator (its changelog, 10.14)."""
GROUP_NORM = (10, 9)
"""The ONNX parser takes GroupNormalization as opset 21 has it (its changelog, 10.9)."""
OLDEST_GPU = (7, 5)
"""Turing: the oldest architecture that TensorRT 11 supports."""
OLDEST_FOR = {"fp8": (8, 9), "int8": OLDEST_GPU}
"""Compute capability that a precision needs: Ada has the first FP8 tensor cores."""
PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
INSTALL = (
    "pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu13 (tensorrt-cu12 where torch"
    " is built for CUDA 12; the libraries are on NVIDIA's own index), or use the container"
    " nvcr.io/nvidia/pytorch:<tag>-py3 (PyTorch and TensorRT) or nvcr.io/nvidia/tensorrt:<tag>-py3"
    " (TensorRT and trtexec)"
)
DRY_RUN = "without one: `addbench compile --backend trt --dry-run` prints trtexec's commands"
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


def capability(summary: str, precision: str = "auto") -> Capability:
    """Usable here? If not, everything that is missing, and how to get each.

    Args:
        precision: fp8 and int8 ask for more than a plan in the graph's own dtypes.
    """
    problems: list[NoGpu] = []
    library, gpu = library_version(), find_gpu()
    if isinstance(gpu, NoGpu):
        problems.append(NoGpu(gpu.why, f"{gpu.next}; {DRY_RUN}"))
    else:
        problems += _gpu_problems(gpu, precision)
    if precision in OLDEST_FOR:
        problems += modelopt_problems()
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


def modelopt_problems() -> list[NoGpu]:
    """What a calibrated precision lacks here beside the GPU."""
    try:
        modelopt_version()
    except PreconditionError as error:
        return [NoGpu(error.what, error.next)]
    return []


def _gpu_problems(gpu: Gpu, precision: str) -> list[NoGpu]:
    problems = []
    needed = OLDEST_FOR.get(precision, OLDEST_GPU)
    if OLDEST_GPU <= gpu.capability < needed:
        why = (
            f"{gpu.name} has compute capability {gpu.architecture}, and {precision.upper()} needs"
            f" {'.'.join(map(str, needed))} (Ada, Hopper or newer)"
        )
        problems.append(NoGpu(why, "use trt:precision=int8, or trt without it for FP16"))
    if gpu.capability < OLDEST_GPU:
        oldest = ".".join(map(str, OLDEST_GPU))
        why = f"{gpu.name} has compute capability {gpu.architecture}, TensorRT needs {oldest}"
        problems.append(NoGpu(why, "use a GPU of the Turing generation or newer"))
    libraries = [cuda for cuda in (12, 13) if installed(f"tensorrt-cu{cuda}-libs")]
    newest = max([*libraries, torch_cuda() or 0])
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
