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
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.rows.store import RUNS, Run, open_run, run_names
from bench.run.arguments import count, positive
from bench.sweep import interrupt
from core.cli import Parser, int_list, run, word_list
from core.errors import EXIT_FAILED, EXIT_OK, AddbenchError, PreconditionError
from core.files import ROOT, build_root, write_atomic, write_json
from export.models import DECODERS

if TYPE_CHECKING:
    from bench.gpu.checks import Result
    from bench.sweep import Sweep
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
COMMAND = ["python", "-m", "bench.commands.gpu_check"]


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
    top.add_argument("--budget", type=positive, default=600.0, metavar="S", help="in all (600)")
    top.add_argument("--min-samples", type=count, default=10, help="per cell (10)")
    top.add_argument("--quick", action="store_true", help="3 samples a cell, rough ceilings")
    top.add_argument("--out", type=Path, default=RUNS, help="runs land below it (results/runs)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(arguments)
    started = time.monotonic()
    skipped = require_machine(args.device)
    backends = usable_backends(args, skipped)
    bundle = bundle_for(args, backends, skipped)
    for what, why in skipped.items():
        print(f"left out: {what}: {why}")
    old = unfinished(args.out, arguments, bundle)
    results = checks(args, bundle, fresh=old is None)
    left = args.budget - (time.monotonic() - started) - TAIL_S
    target, code = sweep(args, arguments, bundle, backends, old, max(left, 1.0))
    return conclude(args, target, results, skipped, code)


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


def usable_backends(args: argparse.Namespace, skipped: dict[str, str]) -> list[str]:
    """As asked for, or the torch modes and every other NVIDIA backend that can be used here.

    Raises:
        PreconditionError: none of those that were asked for can be used: minutes of checks would
            come before the sweep said so.
    """
    from backends.base import UnavailableError
    from backends.registry import parse_backend
    from bench.run.plan import probe

    if args.backend:
        probe(args.backend)
        return list(args.backend)
    modes = list(MODES[args.device])
    lacking = compiler_lacks()
    if "compiled-graph" in modes and lacking:
        modes.remove("compiled-graph")
        skipped["torch.compile"] = f"it needs {' and '.join(lacking)}"
    found = [f"torch:device={args.device},mode={mode}" for mode in modes]
    for name in GRAPH_BACKENDS if args.device == "cuda" else ():
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


def bundle_for(args: argparse.Namespace, backends: list[str], skipped: dict[str, str]) -> Bundle:
    """One with graphs if a backend compiles them and they can be had, else one without."""
    from export.bundle import MANIFEST, Bundle, find_bundle
    from export.graphless import write_graphless
    from export.models import find_model

    if Path(args.model, MANIFEST).is_file():
        return Bundle.open(Path(args.model))
    model = find_model(args.model)
    compiling = [text for text in backends if text.partition(":")[0] in GRAPH_BACKENDS]
    if compiling:
        try:
            return find_bundle(args.model, dtype="fp16")
        except PreconditionError as error:
            lacking = [name for name in EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
            if not lacking and export(args.model):
                return find_bundle(args.model, "random", "fp16")
            why = f"{', '.join(lacking)} missing" if lacking else "the export failed"
            for text in compiling:
                backends.remove(text)
                skipped[f"backend {text}"] = f"it needs graphs: {error.what}, and {why}"
            if not backends:
                raise PreconditionError(
                    f"gpu_check has no backend left: {', '.join(compiling)} cannot run",
                    f"it needs graphs: {error.what}, and {why}",
                    f"addbench export --model {args.model} --weights random says what is wrong",
                ) from error
    path = build_root() / "gpu-check" / f"{args.model}-{args.device}"
    try:
        bundle = Bundle.open(path)
    except PreconditionError:
        write_graphless(model, path, args.device)
        bundle = Bundle.open(path)
    return bundle


def export(model: str) -> bool:
    """Export `model` with random weights, in a process of its own; whether it worked."""
    command = [sys.executable, "-m", "export", "--model", model, "--weights", "random"]
    return subprocess.run([*command, "--no-parity"], cwd=ROOT, check=False).returncode == 0


# ---- checks


def checks(args: argparse.Namespace, bundle: Bundle, *, fresh: bool) -> dict[str, Result]:
    """The stages of bench.gpu in a process of their own; those of a run to go on with are kept."""
    from bench.gpu.checks import Job, known

    out = build_root() / "gpu-check" / f"{bundle.path.name}-{args.device}.json"
    if fresh:
        out.unlink(missing_ok=True)
    job = Job(
        bundle=str(bundle.path),
        device=args.device,
        decoders=args.decoder,
        steps=args.steps,
        batch=min(args.batch),
        quick=args.quick,
        out=str(out),
    )
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


def header_command(arguments: Sequence[str]) -> list[str]:
    from bench.run.arguments import shown

    return [*COMMAND, *shown(arguments)]


def unfinished(out: Path, arguments: Sequence[str], bundle: Bundle) -> Run | None:
    """The last run of this very command, if it lacks rows."""
    for name in reversed(run_names(out)):
        try:
            found = open_run(name, out)
        except AddbenchError:
            continue
        if found.header.command == header_command(arguments):
            same = found.header.bundle["hash"] == bundle.hash
            return found if same and found.missing() else None
    return None


def sweep(
    args: argparse.Namespace,
    arguments: Sequence[str],
    bundle: Bundle,
    backends: Sequence[str],
    old: Run | None,
    budget_s: float,
) -> tuple[Run, int]:
    """Measure, or go on with `old`; the run and the sweep's exit code."""
    made = planned(args, arguments, bundle, backends, old)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        code = made.run(budget_s, budget_s, roofline=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    name = made.old.name if made.old else run_names(args.out)[-1]
    return open_run(name, args.out), code


def planned(
    args: argparse.Namespace,
    arguments: Sequence[str],
    bundle: Bundle,
    backends: Sequence[str],
    old: Run | None,
) -> Sweep:
    from bench.run.arguments import parser as sweep_parser
    from bench.sweep import plan_new, reopened

    words = ["--model", str(bundle.path), "--out", str(args.out)]
    if old is not None:
        try:
            return reopened(sweep_parser().parse_args([*words, "--resume", old.name]))
        except PreconditionError as error:  # another package, another machine
            print(f"a new run, since {error.what}: {error.why}", file=sys.stderr)
    for backend in backends:
        words += ["--backend", backend]
    words += ["--steps", ",".join(map(str, args.steps)), "--batch", ",".join(map(str, args.batch))]
    words += ["--decoder", ",".join(args.decoder), "--no-roofline"]
    words += (
        ["--quick"]
        if args.quick
        else ["--min-samples", str(args.min_samples), "--min-time", "2", "--max-time", "20"]
    )
    made = plan_new(sweep_parser().parse_args(words), words)
    made.header = replace(made.header, command=header_command(arguments))
    return made


# ---- the report


def conclude(
    args: argparse.Namespace,
    target: Run,
    results: dict[str, Result],
    skipped: dict[str, str],
    code: int,
) -> int:
    """Checks, claims, goals and profile: printed, and into the run folder; the exit code."""
    from bench.gpu.report import goals, text

    rows = target.rows()
    device = str(results.get("sanity", {}).get("device", {}).get("name", args.device))
    report = text(results, target, device, skipped)
    print(f"\n{report}")
    found = [one.columns() for one in goals(rows, device)]
    write_atomic(target.path / "gpu_check.md", report)
    write_json(
        target.path / "gpu_check.json", {"results": results, "goals": found, "left_out": skipped}
    )
    print(f"run folder: {target.path}: rows.jsonl, gpu_check.md, gpu_check.json")
    bad = [name for name in ("sanity", "parity", "profile") if not passed(results.get(name))]
    for name in bad:
        print(f"{name}: {results.get(name, {}).get('status', 'missing')}", file=sys.stderr)
    if target.missing(rows):
        print(f"go on with: {' '.join(target.header.command)}", file=sys.stderr)
    return EXIT_FAILED if bad or code != EXIT_OK else EXIT_OK


def passed(result: Any) -> bool:
    return bool(result) and result["status"] == "ok"


if __name__ == "__main__":
    raise SystemExit(run(main))
