"""Processes of our own: they end with the one that started them, and how they ended is told."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TextIO, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    Args:
        parent: its number; where it has ended before the kernel was told, this process ends now.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        raise SystemExit(1)


def run_apart(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work` in a fresh process: what it imports and holds is gone after it."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, fresh, initializer=die_with_parent, initargs=(os.getpid(),)
    ) as pool:
        return pool.submit(work, *args, **kwargs).result()


KEEPER = Path(__file__).with_name("keeper.py")


def run_kept(
    command: Sequence[str], timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program that starts others, as a compiler does, and return what it says. None of them
    outlives this process, however that ends, or the time that they have.

    Raises:
        subprocess.TimeoutExpired: they took longer, and were ended.
    """
    with subprocess.Popen(
        [sys.executable, "-I", str(KEEPER), str(os.getpid()), *command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            end_group(process)
    out_text, err_text = (text.decode(errors="replace") for text in (out, err))
    return subprocess.CompletedProcess(list(command), process.returncode, out_text, err_text)


def take_stdout() -> TextIO:
    """The stream of a worker's answers; from here on anything printed to stdout goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


# ---- from the parent's side: end a worker, and say how it ended


def end_group(process: subprocess.Popen[bytes], grace_s: float = 0.0) -> int:
    """The exit status of a worker that leads a process group; what of it and its children is left
    after `grace_s` is killed. Calling it again does nothing."""
    if process.returncode is not None:
        return process.returncode
    until = time.monotonic() + grace_s
    # Looked at, not reaped: the group's number cannot pass to another process meanwhile.
    look = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while os.waitid(os.P_PID, process.pid, look) is None and time.monotonic() < until:
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def oom_kills() -> int:
    """How often this kernel's OOM killer struck since boot; 0 where it does not say."""
    with contextlib.suppress(OSError):  # a kernel in user space (gVisor) has no such file
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def obituary(status: int, kills_before: int, log: str) -> dict[str, Any]:
    """Status and error of work whose worker ended without giving a result.

    Args:
        status: the worker's exit status, negative for a signal.
        kills_before: `oom_kills()` when it was started.
        log: where its last words are.
    """
    if status == -signal.SIGKILL and oom_kills() > kills_before:
        return {
            "status": "oom",
            "error": {
                "type": "OutOfMemory",
                "what": "the kernel killed the worker: memory ran out",
                "why": "the OOM killer's count went up while it ran",
                "next": "a smaller batch, or a machine with more memory",
            },
        }
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
    return {
        "status": "crashed",
        "error": {
            "type": "Crash",
            "what": f"the worker {how}",
            "why": "a library crashed, or something from outside ended the process",
            "next": f"its last words are in {log}",
        },
    }
