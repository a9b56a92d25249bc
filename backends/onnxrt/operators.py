"""The project's own operators for onnxruntime on a CPU, in C++ (backends/onnxrt/*.cc).

They are built with the system's C++ compiler when they are first needed, as `torch.compile` does
it, and kept under the build root. Where there is no compiler, onnxruntime's own kernels stay.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from backends.artifacts.cache import waiting_lock
from backends.base import BackendError
from core.files import build_root, sha256_file, sha256_json, write_atomic
from core.isa import isa

PLAIN = {"convolutions": "op", "products": "op", "attention": "multihead", "norms": "layer"}
"""Options of `ort` that choose them, with the values that choose onnxruntime's own."""
SOURCES = tuple(sorted(Path(__file__).parent.glob("*.[ch]*")))
BASELINE = ("-march=x86-64",) if platform.machine() == "x86_64" else ()
"""Before all others, and so before VECTORS: what a library may use is what its name says."""
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
    """The C++ compiler that builds them: `CXX`, or c++; None where none builds a library."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    return command if os.name == "posix" and not why_not(tuple(command)) else None


def no_compiler() -> str:
    """Why there is no C++ compiler; "" where there is one."""
    return why_not(tuple(shlex.split(os.environ.get("CXX") or "c++")))


@cache
def why_not(command: tuple[str, ...]) -> str:
    """Why `command` is no C++ compiler: it is tried on an empty file. "" where it is one."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not there"
    with tempfile.TemporaryDirectory(prefix="addbench-cxx-") as folder:
        source, out = Path(folder) / "empty.cc", Path(folder) / "empty.so"
        source.write_text('extern "C" int addbench() { return 0; }\n')
        tried = subprocess.run(
            [*command, *FLAGS, str(source), "-o", str(out)],
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if tried.returncode:
            said = (tried.stderr.strip().splitlines() or ["it says nothing"])[-1]
            return f"{shlex.join(command)} ends with {tried.returncode}: {said[:200]}"
        if not out.is_file() or out.read_bytes()[:4] != b"\x7fELF":
            return f"{shlex.join(command)} writes no library"
    return ""


@cache
def compiler_version(command: tuple[str, ...]) -> str:
    """What the compiler says of itself."""
    asked = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, errors="replace", check=False
    )
    return asked.stdout


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
    advice = f"install a C++ compiler (apt install g++), or use ort:{plain}"
    if cxx is None:
        raise BackendError(
            "the operators for onnxruntime cannot be built",
            f"there is no C++ compiler: {no_compiler()}",
            advice,
        )
    made_by = [digest(), cxx, compiler_version(tuple(cxx)), FLAGS, BASELINE, vectors]
    built = build_root() / "native" / f"operators-{sha256_json(made_by)[:16]}.so"
    if is_ours(built):
        return built
    built.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(built.with_suffix(".lock")):
        if not is_ours(built):
            _build([*cxx, *BASELINE, *FLAGS, *vectors], built, advice)
    return built


def is_ours(library: Path) -> bool:
    """Whether a library is the one that was built here: nobody else owns it or may write it, and
    its content has the hash that lies beside it."""
    note = library.with_suffix(".sha256")
    try:
        states = [file.stat(follow_symlinks=False) for file in (library, note)]
        if any(state.st_uid != os.getuid() or state.st_mode & 0o022 for state in states):
            return False
        return note.read_text() == sha256_file(library)
    except (OSError, UnicodeDecodeError):
        return False


def _build(command: Sequence[str], library: Path, advice: str) -> None:
    """Run the compiler; the library takes its name when it is whole."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        fresh = Path(folder) / library.name
        units = [str(source) for source in SOURCES if source.suffix == ".cc"]
        done = subprocess.run(
            [*command, *units, "-o", str(fresh)],
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode or not fresh.is_file():
            raise BackendError(
                f"{shlex.join(command[:1])} could not build the operators for onnxruntime",
                done.stderr.strip()[-2000:] or "it wrote nothing",
                advice,
            )
        library.unlink(missing_ok=True)  # another user's, or torn: not written over
        library.with_suffix(".sha256").unlink(missing_ok=True)
        write_atomic(library, fresh.read_bytes())
    write_atomic(library.with_suffix(".sha256"), sha256_file(library))


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
