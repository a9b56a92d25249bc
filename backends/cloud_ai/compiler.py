"""Runs the compiler: a list of arguments, no shell; its output is kept and its failures explained.

A lowered graph and the compiler's input files live in a scratch folder while it runs; what stays is

    qpc/programqpc.bin   the program
    compiler.log         what the compiler printed
    compile.json         the arguments, the exit code, and the compiler's own estimates
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from backends.base import BackendError, OutOfMemoryError
from backends.cloud_ai import qpc
from backends.cloud_ai.figures import parse_metrics
from backends.cloud_ai.probe import Sdk
from backends.cloud_ai.spec import CompileSpec, Dialect
from core.files import build_root, write_atomic, write_json
from export.bundle import Spec

QPC, LOG, RECORD = "qpc", "compiler.log", "compile.json"
WIDE = ("timestep", "time_ids")
"""Float buffers that stay FP32: the pipeline's numbers for them are no activations."""
SHOWN_LINES = 30


class FlagError(BackendError):
    """The compiler of this version does not take a flag."""


def half_buffers(specs: Iterable[Spec]) -> list[str]:
    """Inputs and outputs that travel as FP16."""
    return [each.name for each in specs if each.dtype.startswith("float") and each.name not in WIDE]


def io_list(names: Sequence[str]) -> str:
    """The YAML for `-custom-IO-list-file`, as quic/efficient-transformers writes it."""
    return "".join(f" - IOName: {name}\n   Precision: float16\n\n" for name in names)


def compile_graph(
    spec: CompileSpec, sdk: Sdk, part: str, folder: Path, facts: dict[str, Any], kept: str
) -> None:
    """Run the compiler on `spec`, whose QPC belongs to `folder`, and record how it went.

    Args:
        facts: what else the record holds.
        kept: stem of the log's name below the build folder's `logs/`, should it fail: `folder` is
            gone then.

    Raises:
        FlagError: it does not know a flag.
        BackendError: it failed, or wrote no QPC.
    """
    dialect = sdk.dialect
    if dialect is None:
        raise BackendError("there is no compiler", f"looked below {sdk.root}", "set QAIC_SDK_ROOT")
    command = spec.command(dialect, sdk.root)
    log, started = folder / LOG, time.perf_counter()
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
            ).returncode
        except OSError as error:
            raise BackendError(
                f"{command[0]} cannot be run", str(error), "install the Apps SDK again"
            ) from error
    said = log.read_text(errors="replace")
    try:
        if code:
            raise failure(code, said, part, command[1:], dialect, sdk.version)
        header = qpc.read_header(spec.binary_dir)
    except BackendError as error:
        place = build_root() / "logs" / f"{kept}.log"
        write_atomic(place, f"exit code {code}\n{' '.join(command)}\n\n{said}")
        raise type(error)(error.what, error.why, f"{error.next}; all of it: {place}") from error
    record = {
        "schema": 1,
        "arguments": [_portable(word, spec) for word in command[1:]],
        "compiler": dialect.name,
        "compiler_version": sdk.version or None,
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 3),
        "qpc_format": f"{header.major}.{header.minor}",
        "estimate": parse_metrics(said),
        **facts,
    }
    write_json(folder / RECORD, record)


def _portable(word: str, spec: CompileSpec) -> str:
    """An argument without the scratch folder, which is gone when the record is read."""
    for place in (spec.model.parent, spec.binary_dir.parent):
        word = word.replace(f"{place}/", "")
    return word


def failure(
    code: int,
    said: str,
    part: str,
    arguments: Sequence[str],
    dialect: Dialect,
    version: str,
) -> BackendError:
    """The error for a compile that ended with `code`; the compiler's words are in it."""
    tail = "\n".join(said.strip().splitlines()[-SHOWN_LINES:]) or "it printed nothing"
    if code == -signal.SIGKILL:
        return OutOfMemoryError(
            f"compiling {part} was killed",
            "most likely by the system, for want of memory",
            "free memory; a UNet wants several times the size of its weights",
        )
    flag = unknown_flag(said, arguments)
    if flag is not None:
        return FlagError(
            f"{dialect.name} {version or '(version unknown)'} does not know {flag}",
            tail,
            "insist on the other compiler with qaic:compiler=..., or install an SDK of another"
            " version; SDK 1.22 changed the compiler's name and flags",
        )
    return BackendError(
        f"{dialect.name} failed on {part} with exit code {code}",
        tail,
        "`qaic:block=`, `cores=` and `norms=` change what it is given",
    )


_COMPLAINTS = re.compile(
    r"unknown|unrecogni[sz]ed|not recogni[sz]ed|invalid (option|argument|flag)|no such option|"
    r"unsupported (option|flag)|unexpected (option|argument)",
    re.IGNORECASE,
)


def unknown_flag(said: str, arguments: Sequence[str]) -> str | None:
    """The flag of ours that stands in a line of complaint, if there is one.

    The compiler's wording is not documented: a line counts if it complains and quotes the flag.
    """
    for line in said.splitlines():
        if not _COMPLAINTS.search(line):
            continue
        for argument in sorted(arguments, key=len, reverse=True):
            name = argument.partition("=")[0]
            if re.search(rf"(?<![\w-])-?{re.escape(name)}(?![\w-])", line):
                return name
    return None
