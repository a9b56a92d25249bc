"""`addbench gpu-check`: what a first hour on an NVIDIA GPU should show, in ten minutes.

Sanity of the device, FP16 against FP32, one captured graph against step by step, the time of every
part and kernel against the floor; then a sweep over every backend that can be used here, the
published claims beside it, and the goals. Needs torch, diffusers and transformers; whatever else is
missing is left out by name. The weights are random and drawn on the device: nothing is downloaded
or exported, unless a backend that compiles graphs can be used (then the export is made, or taken if
it is there).

Leaves one run folder, with gpu_check.md and gpu_check.json in it. Run again after it was cut off,
it goes on where it stopped. Exit code 0; 4 if a check failed, a cell did or is missing; 2 if
nothing can run here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.commands.arguments import add_runs_arguments, seconds
from bench.rows.store import Run, open_run, portable, run_names
from bench.run.measure import StopRule
from bench.run.request import QUICK, Request, Sampling
from core.cli import Parser, count, int_list, word_list
from core.errors import EXIT_FAILED, EXIT_OK, AddbenchError, PreconditionError
from core.files import ROOT, build_root, write_atomic, write_json
from export.models import DECODERS

if TYPE_CHECKING:
    from bench.gpu.job import GpuJob, Result
    from export.bundle import Bundle

NEEDED = ("torch", "diffusers", "transformers")
OPTIONAL = {
    "pynvml": "nvidia-ml-py: clocks, temperature, energy and other processes' use of the GPU",
    "skimage": "scikit-image: the judgement of every row's image",
    "matplotlib": "matplotlib: the plot",
    "pandas": "pandas: the table as CSV",
    "psutil": "psutil: swap and CPU clocks in the run's header",
    "cpuinfo": "py-cpuinfo: nothing that counts on a GPU",
}
"""Module -> its package and what is left out without it."""
MODES = {"cuda": ("graph", "compiled-graph", "eager"), "cpu": ("graph", "eager")}
GRAPH_BACKENDS = ("trt", "cuda")
EXPORT_PACKAGES = ("onnx", "onnxscript", "onnx_ir", "accelerate")
CHECKS_TIMEOUT_S = 240.0
TAIL_S = 15.0
"""Kept of the budget for the report."""
COMMAND = ("addbench", "gpu-check")
CHECK = Sampling(StopRule(min_time=2.0, max_time=20.0), rounds=1)


def parser() -> Parser:
    top = Parser(
        prog="addbench gpu-check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "--model", default="sdxl-turbo", metavar="NAME|PATH", help="or a bundle's folder"
    )
    top.add_argument("--device", choices=tuple(MODES), default="cuda", help="cpu: to try it out")
    top.add_argument(
        "--backend", action="append", metavar="NAME[:KEY=VALUE,...]",
        help="repeatable; every one that can be used here",
    )  # fmt: skip
    top.add_argument("--steps", type=int_list, default=[1, 2, 4], metavar="1,2,4")
    top.add_argument("--batch", type=int_list, default=[1, 4], metavar="1,4")
    top.add_argument("--decoder", type=word_list, default=list(DECODERS), metavar="vae,taesd")
    top.add_argument(
        "--budget", type=seconds("s"), default=600.0, metavar="90s|30m|1h",
        help="for all of it; a number alone is in seconds (10m)",
    )  # fmt: skip
    top.add_argument("--min-samples", type=count, default=10, help="per cell (10)")
    top.add_argument("--quick", action="store_true", help="3 samples a cell, rough ceilings")
    add_runs_arguments(top)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(arguments)
    started = time.monotonic()
    skipped = require_machine(args.device)
    backends = usable_backends(args.backend, args.device, skipped)
    bundle = bundle_for(args.model, args.device, backends, skipped)
    for what, why in skipped.items():
        print(f"left out: {what}: {why}")
    command = [*COMMAND, *arguments]
    old = unfinished(args.runs, command, bundle)
    results = checks(job_of(args, bundle), fresh=old is None)
    left_s = max(1.0, args.budget - (time.monotonic() - started) - TAIL_S)
    request = request_of(args, bundle, backends)
    target, spent = measure(request, args.runs, command, old, left_s)
    code = conclude(target, results, skipped, args.device, left_s if spent else None)
    if target.missing():
        print(f"go on with: {shlex.join(command)}", file=sys.stderr)
    return code


# ---- what is there


def require_machine(device: str) -> dict[str, str]:
    """What is missing and may be: package -> what is left out.

    Raises:
        PreconditionError: a package that it needs, or the GPU, is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise PreconditionError(
            f"gpu_check cannot run: {', '.join(missing)} missing",
            f"it needs {', '.join(NEEDED)}; the parts are their modules",
            f"pip install {' '.join(missing)}",
        )
    if device == "cuda":
        from backends.nvidia.gpu import torch_on_gpu

        found = torch_on_gpu()
        if found is not None:
            raise PreconditionError(f"gpu_check cannot run: {found.what}", found.why, found.next)
    return {
        words.partition(":")[0]: words.partition(": ")[2]
        for name, words in OPTIONAL.items()
        if importlib.util.find_spec(name) is None
    }


def usable_backends(asked: Sequence[str] | None, device: str, skipped: dict[str, str]) -> list[str]:
    """Return what was asked for, or the torch modes and all other NVIDIA backends usable here.

    Raises:
        PreconditionError: none of those that were asked for can be used: minutes of checks would
            come before the sweep said so.
    """
    from backends.base import UnavailableError
    from backends.registry import parse_backend
    from bench.run.plan import probe

    if asked:
        probe(asked)
        return list(asked)
    modes = list(MODES[device])
    lacking = compiler_lacks()
    if "compiled-graph" in modes and lacking:
        modes.remove("compiled-graph")
        skipped["torch.compile"] = f"it needs {' and '.join(lacking)}"
    found = [f"torch:device={device},mode={mode}" for mode in modes]
    for name in GRAPH_BACKENDS if device == "cuda" else ():
        try:
            probed = parse_backend(name).probe()
        except UnavailableError as error:
            skipped[f"backend {name}"] = error.what
            continue
        if probed.usable:
            found.append(name)
        else:
            skipped[f"backend {name}"] = probed.what
    return found


def compiler_lacks() -> list[str]:
    """What torch.compile misses here to build its kernels' launchers, which are C."""
    there = {
        "a C compiler (gcc)": shutil.which("cc") or shutil.which("gcc"),
        "Python's headers (python3-dev)": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "the package triton": importlib.util.find_spec("triton"),
    }
    return [what for what, found in there.items() if not found]


def bundle_for(name: str, device: str, backends: list[str], skipped: dict[str, str]) -> Bundle:
    """One with graphs if a backend compiles them and they can be had, else one without."""
    from export.bundle import MANIFEST, Bundle, find_bundle
    from export.graphless import write_graphless
    from export.models import find_model

    if Path(name, MANIFEST).is_file():
        return Bundle.open(Path(name))
    model = find_model(name)
    compiling = [text for text in backends if text.partition(":")[0] in GRAPH_BACKENDS]
    if compiling:
        try:
            return find_bundle(name, dtype="fp16")
        except PreconditionError as error:
            lacking = [name for name in EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
            if not lacking and export(name):
                return find_bundle(name, "random", "fp16")
            why = f"{', '.join(lacking)} missing" if lacking else "the export failed"
            for text in compiling:
                backends.remove(text)
                skipped[f"backend {text}"] = f"it needs graphs: {error.what}, and {why}"
            if not backends:
                raise PreconditionError(
                    f"gpu_check has no backend left: {', '.join(compiling)} cannot run",
                    f"it needs graphs: {error.what}, and {why}",
                    f"addbench export --model {name} --weights random says what is wrong",
                ) from error
    path = build_root() / "gpu-check" / f"{name}-{device}"
    try:
        bundle = Bundle.open(path)
    except PreconditionError:
        write_graphless(model, path, device)
        bundle = Bundle.open(path)
    return bundle


def export(model: str) -> bool:
    """Export `model` with random weights, in a process of its own; whether it worked."""
    command = [sys.executable, "-m", "export", "--model", model, "--weights", "random"]
    return subprocess.run([*command, "--no-parity"], cwd=ROOT, check=False).returncode == 0


# ---- checks


def job_of(args: argparse.Namespace, bundle: Bundle) -> GpuJob:
    """What the checks' process is to do."""
    from bench.gpu.job import GpuJob

    return GpuJob(
        bundle=str(bundle.path),
        device=args.device,
        decoders=args.decoder,
        steps=args.steps,
        batch=min(args.batch),
        quick=args.quick,
        out=str(build_root() / "gpu-check" / f"{bundle.path.name}-{args.device}.json"),
    )


def checks(job: GpuJob, *, fresh: bool) -> dict[str, Result]:
    """The stages of bench.gpu in a process of their own.

    Args:
        fresh: run all of them; else those of a run that is gone on with are kept.
    """
    from bench.gpu.checks import known

    out = Path(job.out)
    if fresh:
        out.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.gpu.checks"],
            input=json.dumps(job.columns()),
            text=True,
            cwd=ROOT,
            timeout=CHECKS_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"the checks took longer than {CHECKS_TIMEOUT_S:g} s and were ended", file=sys.stderr)
    else:
        if done.returncode:
            print(f"the checks ended with exit code {done.returncode}", file=sys.stderr)
    return known(out)


# ---- the sweep


def unfinished(runs: Path, command: Sequence[str], bundle: Bundle) -> Run | None:
    """The last run of this very command, if it lacks rows."""
    asked = [portable(word) for word in command]
    for name in reversed(run_names(runs)):
        try:
            target = open_run(name, runs)
        except AddbenchError:
            continue
        if target.header.command == asked:
            same = target.header.bundle["hash"] == bundle.hash
            return target if same and target.missing() else None
    return None


def request_of(args: argparse.Namespace, bundle: Bundle, backends: Sequence[str]) -> Request:
    """The sweep of the check."""
    return Request(
        str(bundle.path),
        backends=tuple(backends),
        steps=args.steps,
        batches=args.batch,
        decoders=args.decoder,
        method=QUICK if args.quick else CHECK.but(min_samples=args.min_samples),
    )


def measure(
    request: Request, runs: Path, command: Sequence[str], old: Run | None, budget_s: float
) -> tuple[Run, bool]:
    """Measure, or go on with `old`; the run, and whether the budget was spent before its end."""
    from bench.run.plan import plan
    from bench.run.resume import reopen
    from bench.run.runner import sweep

    planned = None
    if old is not None:
        try:
            planned = reopen(old, {"model": request.model})
        except PreconditionError as error:  # another package, another machine
            print(f"a new run, since {error.what}: {error.why}", file=sys.stderr)
            old = None
    return sweep(
        planned or plan(request),
        runs,
        command,
        old,
        timeout_s=budget_s,
        budget_s=budget_s,
        ceilings=False,
    )


# ---- the report


def conclude(
    target: Run,
    results: dict[str, Result],
    skipped: dict[str, str],
    device: str,
    spent_budget_s: float | None,
) -> int:
    """Table, checks, claims, goals and profile: printed, and into the run folder; the exit code."""
    from bench.gpu.report import goals, text
    from bench.sweep import conclude as show_rows

    code = show_rows(target, spent_budget_s)
    rows = target.rows()
    name = str(results.get("sanity", {}).get("device", {}).get("name", device))
    report = text(results, target, name, skipped)
    print(f"\n{report}")
    write_atomic(target.path / "gpu_check.md", report)
    write_json(
        target.path / "gpu_check.json",
        {
            "results": results,
            "goals": [goal.columns() for goal in goals(rows, name)],
            "left_out": skipped,
        },
    )
    print(f"run folder: {target.path}: rows.jsonl, gpu_check.md, gpu_check.json")
    bad = [stage for stage in ("sanity", "parity", "profile") if not passed(results.get(stage))]
    for stage in bad:
        print(f"{stage}: {results.get(stage, {}).get('status', 'missing')}", file=sys.stderr)
    return EXIT_FAILED if bad or code != EXIT_OK else EXIT_OK


def passed(result: Any) -> bool:
    return bool(result) and result["status"] == "ok"
