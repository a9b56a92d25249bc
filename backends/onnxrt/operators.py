"""The project's own operators for onnxruntime on a CPU, in C++ (backends/onnxrt/*.cc).

They are built with the system's C++ compiler when they are first needed, as `torch.compile` does
it, and kept under the build root. Where there is no compiler, onnxruntime's own kernels stay.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from backends.base import BackendError
from core.files import build_root, sha256_file, sha256_json, write_atomic
from core.isa import isa

PLAIN = {"convolutions": "op", "products": "op", "attention": "multihead", "norms": "layer"}
"""Options of `ort` that choose them, with the values that choose onnxruntime's own."""
SOURCES = tuple(sorted(Path(__file__).parent.glob("*.[ch]*")))
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden")

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_BF16 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512bf16"]
VECTORS = (
    ({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16"},
     [*_BF16, "-mamx-tile", "-mamx-bf16"]),
    ({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16"}, _BF16),
    ({"avx2", "fma", "f16c", "avx512f"}, [*_AVX2, "-mavx512f"]),
    ({"avx2", "fma", "f16c"}, _AVX2),
)  # fmt: skip
"""What a CPU has, and the compiler's flags for it; the widest first."""


def compiler() -> list[str] | None:
    """The C++ compiler that would build them: `CXX`, or c++; None where there is none."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    return command if os.name == "posix" and shutil.which(command[0]) else None


@cache
def digest() -> str:
    """Names their code, whatever built it."""
    return sha256_json([sha256_file(source) for source in SOURCES])[:8]


def are_in(options: Mapping[str, Any]) -> bool:
    """Whether graphs compiled with these options of `ort` hold operators of our own."""
    return any(options.get(key, plain) != plain for key, plain in PLAIN.items())


def may_use_tiles() -> bool:
    """Whether this CPU has AMX for BF16, Linux lets this process use it, and the compiler knows it.

    Linux keeps the tiles' state for processes that have asked for it (arch_prctl(2)).
    """
    if "-mamx-bf16" not in _vectors(isa()):
        return False
    arch_prctl, ask_for_state, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, ask_for_state, tile_data) == 0


def may_multiply_bf16() -> bool:
    """Whether this CPU has products of BF16 numbers in vectors (AVX-512), and the compiler knows
    them."""
    return "-mavx512bf16" in _vectors(isa())


def register(options: Any) -> None:
    """Let a session of these SessionOptions run graphs that hold the operators."""
    options.register_custom_ops_library(str(library()))


def library() -> Path:
    """The library for this CPU, built where it is not there yet.

    Raises:
        BackendError: there is no compiler, or it fails.
    """
    cxx, vectors = compiler(), _vectors(isa())
    plain = ",".join(f"{key}={value}" for key, value in PLAIN.items())
    advice = f"use ort:{plain}, or install a C++ compiler (apt install g++)"
    if cxx is None:
        raise BackendError("the operators for onnxruntime cannot be built",
                           "there is no C++ compiler", advice)  # fmt: skip
    found = build_root() / "native" / f"operators-{sha256_json([digest(), vectors])[:16]}.so"
    if found.exists():
        return found
    found.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(found.with_suffix(".lock")):
        if not found.exists():
            fresh = found.with_suffix(".new")
            units = [str(source) for source in SOURCES if source.suffix == ".cc"]
            made = subprocess.run(
                [*cxx, *FLAGS, *vectors, *units, "-o", str(fresh)],
                capture_output=True,
                text=True,
                check=False,
            )
            if made.returncode:
                raise BackendError(
                    f"{shlex.join(cxx)} could not build the operators for onnxruntime",
                    made.stderr.strip()[-2000:],
                    advice,
                )
            write_atomic(found, fresh.read_bytes())
            fresh.unlink()
    return found


def _vectors(isa: str) -> list[str]:
    """The compiler's flags for the widest vectors that the operators know of this CPU's."""
    flags = set(isa.split())
    return next((made for needed, made in VECTORS if needed <= flags and _takes(made)), [])


def _takes(flags: list[str]) -> bool:
    """Whether the compiler, which may be older than the CPU, knows these."""
    cxx = compiler()
    if cxx is None:
        return False
    test = [*cxx, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(test, capture_output=True, check=False).returncode == 0
