"""The child process of `addbench gpu-check`: everything that touches the device itself.

A JSON job on stdin; each stage's result goes to the job's `out` as soon as it is there, so that a
stage which takes the process down costs only itself and what comes after it.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.gpu import parity, profile, sanity
from bench.gpu.job import GpuJob, Result
from core.errors import AddbenchError
from core.files import read_json, write_json
from core.process import die_with_parent

STAGES = ("sanity", "parity", "profile")


def stage_functions() -> Mapping[str, Callable[[GpuJob, Mapping[str, Result]], Result]]:
    return {"sanity": sanity.check, "parity": parity.check, "profile": profile.check}


def known(out: Path) -> dict[str, Result]:
    """The results so far; none from a file that cannot be read."""
    try:
        found: dict[str, Result] = read_json(out) if out.is_file() else {}
    except AddbenchError:
        return {}
    return found


def run(job: GpuJob) -> dict[str, Result]:
    """Every stage that `job.out` does not hold yet. A stage that fails is a result too."""
    out = Path(job.out)
    results = known(out)
    for name, check in stage_functions().items():
        if name in results:
            continue
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        try:
            result = check(job, results)
        except Exception as error:  # any library may raise anything: it becomes the stage's result
            traceback.print_exc()
            words = (
                error.as_dict()
                if isinstance(error, AddbenchError)
                else {"what": f"{type(error).__name__}: {error}"[:2000]}
            )
            result = {"status": "failed", "error": words}
        result["seconds"] = round(time.perf_counter() - started, 1)
        results[name] = result
        write_json(out, results)
    return results


def main() -> int:
    die_with_parent()
    run(GpuJob(**json.loads(sys.stdin.read())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
