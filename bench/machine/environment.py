"""What the machine was: recorded once per run, without host name, user or paths."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import NamesHardware
from bench.machine.power import accelerators
from core.git import git
from core.machine import cpu_info, cpu_name, machine_hash, package

if TYPE_CHECKING:
    from backends.base import Backend
    from export.bundle import Bundle

PACKAGES = (
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "diffusers",
    "transformers",
    "tokenizers",
    "numpy",
    "openvino",
    "optimum",
    "optimum-onnx",
)
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "MALLOC_ARENA_MAX",
    "LD_PRELOAD",
)
ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""What decides how fast a CPU multiplies; the rest of /proc/cpuinfo's flags does not."""


def subject(bundle: Bundle, backend: Backend) -> dict[str, Any]:
    """What a record that is no sweep's is of; its environment is that of the call."""
    return {
        "model": bundle.name,
        "weights": bundle.weights,
        "bundle_hash": bundle.hash,
        "backend": {
            "name": backend.name,
            "options": dict(backend.effective_options()),
            **backend.fingerprint(),
        },
        "environment": collect(),
    }


def collect() -> dict[str, Any]:
    """The environment of a run: CPU, memory, OS, versions, thread settings, load."""
    psutil = package("psutil")
    cpu = cpu_info()
    frequency = psutil.cpu_freq() if psutil else None
    flags = set(cpu.get("flags", ()))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    hardware: dict[str, Any] = {
        "cpu": cpu_name(cpu),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "cores_physical": psutil.cpu_count(logical=False) if psutil else None,
        "cores_logical": os.cpu_count(),
        "memory_gb": round((psutil.virtual_memory().total if psutil else pages) / 1e9, 1),
    }
    return {
        **hardware,
        **accelerators(),
        "machine": machine_hash(hardware["cpu"], hardware["cores_logical"]),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "cpu_freq_max_mhz": frequency.max or None if frequency else None,
        "governor": governor(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "threads_env": {
            # LD_PRELOAD holds paths; the libraries' names are what matters
            name: " ".join(Path(piece).name for piece in os.environ[name].split(":"))
            for name in THREAD_VARIABLES
            if name in os.environ
        },
        "load_avg": load_average(),
        "swap_used_gb": round(psutil.swap_memory().used / 1e9, 1) if psutil else None,
    }


def with_hardware(environment: dict[str, Any], backends: Iterable[Backend]) -> dict[str, Any]:
    """`environment`, whose `accelerators` also name the devices that only their backend knows.

    Args:
        backends: those that can be used here.
    """
    named = {
        each.device: name
        for each in backends
        if isinstance(each, NamesHardware) and (name := each.hardware())
    }
    return {**environment, "accelerators": {**environment["accelerators"], **named}}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def governor() -> str | None:
    file = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return file.read_text().strip() if file.exists() else None


def load_average() -> float:
    """The kernel's average over one minute."""
    return round(os.getloadavg()[0], 2)


def cpu_freq_mhz() -> float | None:
    """Mean over the cores, now."""
    psutil = package("psutil")
    frequency = psutil.cpu_freq() if psutil else None
    return round(frequency.current, 1) if frequency else None


def git_state() -> dict[str, Any]:
    """Commit of the checkout and whether it holds uncommitted changes; null outside of git."""
    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain") if commit else None
    return {"git_commit": commit, "git_dirty": None if status is None else bool(status)}
