"""The project's own operators for onnxruntime on a CPU, in C++ (backends/onnxrt/*.cc).

They are built with the system's C++ compiler when they are first needed, as `torch.compile` does
it, and kept under the build root. Where there is no compiler, onnxruntime's own kernels stay.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from backends.base import BackendError
from backends.onnxrt import libraries
from backends.onnxrt.compiler import (
    FLAGS,
    compile_library,
    compiler,
    give_up,
    identity,
    no_compiler,
    takes,
)
from core.files import sha256_file, sha256_json
from core.isa import isa

__all__ = ["compiler", "give_up", "no_compiler"]

PLAIN = {"convolutions": "op", "products": "op", "attention": "multihead", "norms": "layer"}
"""Options of `ort` that choose them, with the values that choose onnxruntime's own."""
SOURCES = tuple(sorted(Path(__file__).parent.glob("*.[ch]*")))
BASELINE = {"x86_64": ("-march=x86-64", "-mno-sse3"), "aarch64": ("-march=armv8-a",)}.get(
    platform.machine(), ()
)
"""After what `CXX` holds and before VECTORS: what a library may use is what its name says, also
where `CXX` is `g++ -march=native` or `g++ -mavx512f` (without SSE3 there is none of what came after
it)."""

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
    what = "the operators for onnxruntime cannot be built"
    advice = f"install a C++ compiler (apt install g++), or use ort:{plain}"
    if cxx is None:
        raise BackendError(what, f"there is no C++ compiler: {no_compiler()}", advice)
    units = [source for source in SOURCES if source.suffix == ".cc"]

    def build(out: Path) -> None:
        libraries.say_once("the operators for onnxruntime are built, once: about a minute")
        if reason := compile_library([*cxx, *BASELINE, *FLAGS, *vectors], units, out):
            raise BackendError(what, reason, advice)

    made_by = [digest(), identity(tuple(cxx)), FLAGS, BASELINE, vectors]
    try:
        return libraries.library(f"operators-{sha256_json(made_by)[:16]}.so", build)
    except OSError as error:
        raise BackendError(what, str(error), advice) from error


def _vectors(isa: str) -> list[str]:
    """The compiler's flags for the widest vectors that the operators know of this CPU's."""
    cxx, flags = compiler(), set(isa.split())
    for needed, made in VECTORS:
        if cxx is not None and needed <= flags and takes(tuple(cxx), tuple(made)):
            return made
    return []
