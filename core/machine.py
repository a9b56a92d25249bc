"""Which machine this is: its CPU, and a hash that tells machines apart without naming one."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
from pathlib import Path
from typing import Any

MACHINE_ID = Path("/etc/machine-id")


def package(name: str) -> Any:
    """The module, or None: on a GPU's machine there may be torch, diffusers and transformers only
    (bench/commands/gpu_check.py), and then what others would tell is null."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def cpu_info() -> dict[str, Any]:
    """`brand_raw` and `flags` of the CPU; by py-cpuinfo, or as the kernel lists them."""
    cpuinfo = package("cpuinfo")
    if cpuinfo is not None:
        found: dict[str, Any] = cpuinfo.get_cpu_info()
        return found
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    known = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    brand = {"brand_raw": known["model name"]} if "model name" in known else {}
    return {**brand, "flags": known.get("flags", "").split()}


def cpu_name(cpu: dict[str, Any]) -> str:
    """What the CPU calls itself, of `cpu_info`."""
    return str(cpu.get("brand_raw", platform.processor() or "unknown"))


def machine_hash(cpu: str, cores: int | None) -> str:
    """Tell machines apart without naming one: a hash of the CPU and the installation's id."""
    identity = MACHINE_ID.read_text().strip() if MACHINE_ID.exists() else ""
    return hashlib.sha256(f"addbench {identity} {cpu} {cores}".encode()).hexdigest()[:12]


def this_machine() -> str:
    """The hash of the machine that this runs on."""
    return machine_hash(cpu_name(cpu_info()), os.cpu_count())
