"""The NVIDIA GPU as its driver describes it, through libcuda: no torch, no CUDA context."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

# From cuda.h: what cuDeviceGetAttribute is asked for, and the results that have a name here.
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
NO_DEVICE, VERSION_MISMATCH = 100, 803
DRIVERS = {12: "r525", 13: "r580"}
"""CUDA major version -> the first Linux driver branch that runs it (CUDA release notes)."""


@dataclass(frozen=True)
class Gpu:
    """The GPU that this process would use: the first visible one (CUDA_VISIBLE_DEVICES counts).

    Attributes:
        capability: compute capability, (9, 0) for Hopper.
        cuda: the newest CUDA version that the driver runs, (13, 0).
        memory_bytes: of the whole card.
    """

    name: str
    capability: tuple[int, int]
    cuda: tuple[int, int]
    memory_bytes: int

    @property
    def architecture(self) -> str:
        return ".".join(map(str, self.capability))


@dataclass(frozen=True)
class NoGpu:
    """Why no GPU can be used, and what to do about it."""

    why: str
    next: str


@cache
def find_gpu() -> Gpu | NoGpu:
    """Asked once per process. Never raises."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return NoGpu(
            "there is no NVIDIA driver (libcuda.so.1 is not found)",
            "run on a machine with an NVIDIA GPU and its driver; in a container, start it with"
            " `docker run --gpus all`",
        )
    code = driver.cuInit(0)
    if code == NO_DEVICE:
        return NoGpu(
            "the NVIDIA driver sees no GPU",
            "check `nvidia-smi` and CUDA_VISIBLE_DEVICES; in a container, `docker run --gpus all`",
        )
    if code == VERSION_MISMATCH:
        return NoGpu(
            "the NVIDIA driver's library and its kernel module are of different versions",
            "restart the machine after the driver's update",
        )
    if code:
        return NoGpu(f"the NVIDIA driver does not start: {_words(driver, code)}", "run nvidia-smi")
    number, device, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    label = ctypes.create_string_buffer(256)

    def attribute(which: int) -> int:
        driver.cuDeviceGetAttribute(ctypes.byref(number), which, device)
        return number.value

    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(label, len(label), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDriverGetVersion(ctypes.byref(number))  # 13000: CUDA 13.0
    cuda = number.value // 1000, number.value % 1000 // 10
    return Gpu(
        label.value.decode(),
        (attribute(CAPABILITY_MAJOR), attribute(CAPABILITY_MINOR)),
        cuda,
        memory.value,
    )


def _words(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return text.value.decode() if text.value else f"CUDA error {code}"


def driver_problem(gpu: Gpu, built_for: int) -> NoGpu | None:
    """What keeps a library built for CUDA `built_for` from running on this driver, if anything."""
    if gpu.cuda[0] >= built_for:
        return None
    return NoGpu(
        f"the NVIDIA driver is too old: it runs CUDA {gpu.cuda[0]}.{gpu.cuda[1]}, and this is"
        f" built for CUDA {built_for}",
        f"update the driver to {DRIVERS.get(built_for, 'a newer branch')} or later, or install the"
        f" build for CUDA {gpu.cuda[0]}",
    )
