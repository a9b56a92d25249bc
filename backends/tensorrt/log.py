"""TensorRT's messages: kept in a file, errors read back. It says why something failed only here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TextIO

import tensorrt as trt

from backends.base import BackendError, OutOfMemoryError

NO_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "bad_alloc")
KEPT = 40
"""Errors that are remembered; a build that fails says the first ones first."""


class Log(trt.ILogger):
    """A logger that TensorRT writes to. It outlives every object that was made with it.

    Args:
        path: file for everything but `VERBOSE`, one line a message, with the second it came in.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.errors: list[str] = []
        self._started = time.monotonic()
        self._file: TextIO | None = path.open("w", encoding="utf-8") if path else None

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and len(self.errors) < KEPT:
            self.errors.append(msg.strip())
        if self._file and severity != trt.ILogger.VERBOSE:
            self.write(f"[{severity.name}] {msg.rstrip()}")

    def write(self, line: str) -> None:
        if self._file:
            self._file.write(f"{time.monotonic() - self._started:9.2f} {line}\n")
            self._file.flush()  # a build that is killed leaves what it said

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    @property
    def out_of_memory(self) -> bool:
        text = "\n".join(self.errors).lower()
        return any(words in text for words in NO_MEMORY)

    def failure(self, what: str, next: str) -> BackendError:
        """What TensorRT said as an error of ours; OutOfMemoryError where memory ran out."""
        why = "\n        ".join(self.errors[:8]) or "TensorRT gave no reason"
        if self.out_of_memory:
            return OutOfMemoryError(
                f"{what}: the GPU's memory ran out",
                why,
                "use a smaller batch, limit trt:workspace, or free the GPU (`nvidia-smi`)",
            )
        return BackendError(what, why, next)
