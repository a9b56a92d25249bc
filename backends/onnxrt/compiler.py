"""The C++ compiler of this machine: which it is, what it knows, and why there is none."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from core.process import run_kept

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden")
TRIAL_S = 60.0
"""Seconds that a compiler has for an empty file."""

_gave_up: dict[tuple[str, ...], str] = {}


def compiler() -> list[str] | None:
    """The C++ compiler that builds libraries: `CXX`, or c++; None where none does."""
    return None if os.name != "posix" or no_compiler() else list(_command())


def no_compiler() -> str:
    """Why there is no C++ compiler; "" where there is one."""
    try:
        command = _command()
    except ValueError as error:
        return f"CXX={os.environ.get('CXX')} is no command: {error}"
    return _gave_up.get(command) or why_not(command)


def give_up(reason: str) -> None:
    """Count the compiler as none from here on: it has built nothing, for this reason."""
    _gave_up[_command()] = reason


def _command() -> tuple[str, ...]:
    return tuple(shlex.split(os.environ.get("CXX", ""))) or ("c++",)


@cache
def why_not(command: tuple[str, ...]) -> str:
    """Why `command` is no C++ compiler: it is tried on an empty file. "" where it is one."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not there"
    with tempfile.TemporaryDirectory(prefix="addbench-cxx-") as folder:
        source, out = Path(folder) / "empty.cc", Path(folder) / "empty.so"
        source.write_text('extern "C" int addbench() { return 0; }\n')
        return compile_library([*command, *FLAGS], [source], out, TRIAL_S)


def compile_library(
    command: Sequence[str], sources: Sequence[Path], out: Path, timeout_s: float | None = None
) -> str:
    """Run the compiler; return why there is no library `out` now, "" where there is one."""
    name = shlex.join(command[:1])
    try:
        tried = run_kept([*command, *map(str, sources), "-o", str(out)], timeout_s)
    except subprocess.TimeoutExpired:
        return f"{name} does not end within {timeout_s:g} s"
    if tried.returncode:
        lines = tried.stderr.strip().splitlines() or ["it says nothing"]
        # The first error is the cause, and the last line says no more than that there was one.
        line = next((line for line in lines if "error" in line), lines[-1])
        return f"{name} ends with {tried.returncode}: {line[:200]}"
    if not out.is_file() or out.read_bytes()[:4] != b"\x7fELF":
        return f"{name} writes no library"
    return ""


@cache
def identity(command: tuple[str, ...]) -> list[str]:
    """The compiler as a library's name holds it: its words, its file, what it says of itself."""
    try:
        said = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, timeout=TRIAL_S, check=False,
        ).stdout  # fmt: skip
    except subprocess.TimeoutExpired:
        said = "nothing"
    return [*command, os.path.realpath(shutil.which(command[0]) or command[0]), said]


@cache
def takes(command: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    """Whether the compiler, which may be older than the CPU, knows these flags."""
    test = [*command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    try:
        return subprocess.run(
            test, capture_output=True, stdin=subprocess.DEVNULL, timeout=TRIAL_S, check=False
        ).returncode == 0  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
