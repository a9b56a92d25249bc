"""Work in a process of its own: its peak memory is not the caller's, and a kill is only a failure.

`run_child` runs a module with a JSON job on stdin, by this interpreter or by that of another
environment; the module's `__main__` is `serve(work)`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backends.base import BackendError, OutOfMemoryError
from core.amounts import bytes_text
from core.files import ROOT, read_json, write_json
from core.process import die_with_parent, take_stdout

PEAK = "peak.json"
HOME_PYTHON = "ADDBENCH_PYTHON"
"""The interpreter of the project's own environment, told to workers that run in another one."""


def environment_for(python: Path, home: Path) -> dict[str, str]:
    """The variables for a process that `python` runs; where that is not `home`, the project's own
    interpreter, none that would give it the project's packages."""
    found = dict(os.environ)
    if python != home:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            found.pop(name, None)
    return found


def home_python() -> Path:
    """The interpreter of the project's own environment."""
    return Path(os.environ.get(HOME_PYTHON) or sys.executable)


def run_child(
    module: str,
    job: Mapping[str, Any],
    folder: Path,
    *,
    doing: str,
    need_bytes: int,
    advice: str,
    python: Path | None = None,
) -> None:
    """Run `python -m module` on `job`; its peak resident memory is written into `folder`.

    Args:
        folder: of the artifact that it makes; `compile_peak_mb` reads what is left there.
        doing: what it does, for messages: "compiling unet for OpenVINO".
        need_bytes: its estimated peak, told when it was killed.
        advice: what to do when it fails.
        python: another environment's interpreter; None for this one.

    Raises:
        OutOfMemoryError: it was killed.
        BackendError: it failed; the message ends with its last words.
    """
    python = python or Path(sys.executable)
    with tempfile.TemporaryFile("w+") as stderr:
        child = subprocess.run(
            [str(python), "-m", module],
            input=json.dumps({**job, "parent": os.getpid()}),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env=environment_for(python, Path(sys.executable)),
            check=False,
        )
        stderr.seek(0)
        words = stderr.read().strip()[-2000:]
    if child.returncode == -signal.SIGKILL:
        raise OutOfMemoryError(
            f"{doing} was killed",
            "most likely by the system, for want of memory",
            f"free memory (it needs about {bytes_text(need_bytes)})",
        )
    if child.returncode:
        raise BackendError(f"{doing} failed with exit code {child.returncode}", words, advice)
    write_json(folder / PEAK, json.loads(child.stdout))


def compile_peak_mb(artifact: Path) -> float | None:
    """Highest memory of the process that compiled `artifact`, whenever that was, in 10^6 bytes;
    None where it was compiled without one."""
    if not (artifact / PEAK).exists():
        return None
    return round(float(read_json(artifact / PEAK)["peak_bytes"]) / 1e6, 1)


def serve(work: Callable[[dict[str, Any]], None]) -> None:
    """Child process: do the job on stdin, then say on stdout what memory that took."""
    die_with_parent()
    answer = take_stdout()  # what libraries print is no answer
    job = json.loads(sys.stdin.read())
    die_with_parent(job.pop("parent"))
    try:
        work(job)
    except Exception as error:  # the parent shows it; a traceback would bury the reason
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    print(json.dumps({"peak_bytes": peak_bytes()}), file=answer, flush=True)


def peak_bytes() -> int:
    """Highest resident memory of this process; before exec the parent's too where the kernel does
    not tell the two apart (gVisor has no VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
