"""What `addbench sweep` takes: its axes, how cells are measured, and their defaults."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.rows.store import LATEST, RUNS
from bench.run.plan import Settings
from core.cli import (
    Parser,
    add_model_arguments,
    add_precision_argument,
    image_size,
    int_list,
    word_list,
)
from core.errors import PreconditionError
from export.models import DEFAULT_MODEL, SCHEDULERS

AXES: dict[str, list[Any]] = {"steps": [1, 2, 4], "batch": [1], "decoder": ["vae", "taesd"]}
CAPTIONS = 600
"""For `--quality`: a share of 0.9 among as many is known to 2.4 points (95%)."""
METHOD = {"rounds": 1, "min_samples": 10, "min_time": 3.0, "max_time": 60.0, "warmup": 1}
QUICK = METHOD | {"min_samples": 3, "min_time": 0.2, "max_time": 5.0}


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def calls(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def switch_list(text: str) -> list[bool]:
    if not set(text.split(",")) <= {"0", "1"}:
        raise argparse.ArgumentTypeError(f"{text} is not 0, 1 or both")
    return [word == "1" for word in text.split(",")]


def parser() -> Parser:
    top = Parser(
        prog="addbench sweep",
        description="Measure a model over backends, steps, batches and decoders.",
    )
    add_model_arguments(top, DEFAULT_MODEL)
    top.set_defaults(model=None)
    axes = top.add_argument_group("what to measure")
    axes.add_argument(
        "--backend", action="append", metavar="NAME[:KEY=VALUE,...]", help="repeatable (ort)"
    )
    add_precision_argument(axes)
    axes.add_argument(
        "--device", type=word_list, action="extend", metavar="NAME|ID[,...]",
        help="repeatable, for backends that take one; a card's name is modelled, an id is here",
    )  # fmt: skip
    axes.add_argument(
        "--steps", type=int_list, metavar="1,2,4", help="denoising steps (1,2,4, or the model's)"
    )
    axes.add_argument("--batch", type=int_list, metavar="1,4", help="images per call (1)")
    axes.add_argument("--decoder", type=word_list, metavar="vae,taesd", help="(vae,taesd)")
    axes.add_argument(
        "--scheduler", type=word_list, metavar="dpm++2m,unipc",
        help=f"{', '.join(SCHEDULERS)} (the model's own)",
    )  # fmt: skip
    axes.add_argument("--guidance", type=float, metavar="SCALE", help="(the model's own)")
    axes.add_argument(
        "--guidance-mode", type=word_list, metavar="batch,calls",
        help="both evaluations of a step as one batch of two, or one after the other (batch)",
    )  # fmt: skip
    axes.add_argument(
        "--low-memory", type=switch_list, nargs="?", const=[True], metavar="0,1",
        help="a call loads each part when it needs it and releases it after (without a value: 1;"
        " default: 0)",
    )  # fmt: skip
    axes.add_argument(
        "--size", type=image_size, metavar="PIXELS|WxH",
        help="which bundle, by the size it was exported for (the model's own)",
    )  # fmt: skip
    how = top.add_argument_group("how to measure")
    how.add_argument("--rounds", type=count, help="fresh processes per cell (1)")
    how.add_argument("--min-samples", type=count, help="samples per cell, at least (10)")
    how.add_argument("--min-time", type=positive, metavar="S", help="sampling, at least (3)")
    how.add_argument(
        "--max-time", type=positive, metavar="S", help="wins once a cell has 3 samples (60)"
    )
    how.add_argument("--warmup", type=calls, metavar="N", help="calls after the cold one (1)")
    how.add_argument(
        "--quality", type=count, nargs="?", const=CAPTIONS, metavar="CAPTIONS",
        help=f"judge the pictures of as many held-out captions too ({CAPTIONS}); for models whose"
        " pictures can be judged",
    )  # fmt: skip
    how.add_argument("--quick", action="store_true", help="3 samples a cell, no roofline")
    how.add_argument(
        "--no-images", action="store_true", help="modelled cards only: their figures, at once"
    )
    how.add_argument(
        "--no-roofline", action="store_true", help="do not measure the machine's ceilings first"
    )
    how.add_argument(
        "--timeout", type=positive, default=1800.0, metavar="S", help="per load and cell (1800)"
    )
    how.add_argument("--budget", type=positive, metavar="S", help="for the whole sweep")
    where = top.add_argument_group("where")
    where.add_argument("--out", type=Path, default=RUNS, help="runs land below it (results/runs)")
    where.add_argument(
        "--resume", nargs="?", const=LATEST, metavar="RUN|latest", help="measure what is missing"
    )
    where.add_argument("--retry-failed", action="store_true", help="and what failed")
    where.add_argument("--dry-run", action="store_true", help="print the plan and its time")
    return top


def check_arguments(args: argparse.Namespace) -> None:
    if args.retry_failed and not args.resume:
        raise PreconditionError(
            "--retry-failed without --resume", "a new run has no failed cells", "add --resume RUN"
        )
    if args.resume and args.quick:
        raise PreconditionError(
            "--quick with --resume", "a run keeps the settings it began with", "drop --quick"
        )


def settings_of(args: argparse.Namespace) -> Settings:
    defaults = QUICK if args.quick else METHOD
    given = {name: getattr(args, name) for name in METHOD}
    chosen = {name: defaults[name] if given[name] is None else given[name] for name in METHOD}
    if chosen["max_time"] < chosen["min_time"]:
        raise PreconditionError(
            f"--max-time {chosen['max_time']:g} is below --min-time {chosen['min_time']:g}",
            "a cell cannot take at least one and at most the other",
            "raise --max-time or lower --min-time",
        )
    return Settings.of(chosen | {"quality": args.quality or 0})


def shown(arguments: Sequence[str]) -> list[str]:
    """The command line for the header: published, so without this machine's folders."""
    from bench.rows.store import portable

    return [portable(argument) for argument in arguments]
