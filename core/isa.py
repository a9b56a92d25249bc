"""The instruction sets of this CPU."""

from __future__ import annotations

import platform
from pathlib import Path

FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16",
         "amx_tile", "amx_int8", "amx_bf16")  # fmt: skip


def cpu_flags() -> set[str]:
    """The instruction sets of this CPU as the kernel names them; none where it does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def isa() -> str:
    """The instruction sets that decide which kernels, and so which weight layout, are used."""
    flags = cpu_flags()
    return " ".join([platform.machine(), *(flag for flag in FLAGS if flag in flags)])
