"""`addbench sweep`: plan cells, measure each in a worker, keep every row as it comes.

Exit code 0 if every planned cell has an ok row; 4 if one failed or is missing; 2 if nothing could
start; 130 after Ctrl-C. A run that ended early is finished with --resume.

With --fleet the same on every machine of a fleet that --on selects, in a run each: docs/fleet.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.commands.arguments import (
    AXES,
    FRAMES,
    add_axis_arguments,
    add_limit_arguments,
    add_method_arguments,
    add_price_argument,
    add_runs_arguments,
    axes_of,
    method_of,
    patience,
    request_of,
)
from bench.rows.cell import Cell
from bench.rows.fields import OK
from bench.rows.store import LATEST, is_noisy
from bench.run.request import CAPTIONS, QUICK, SWEEP
from core.amounts import count_text
from core.cli import Parser, add_recipe_argument, count, run
from core.errors import EXIT_FAILED, EXIT_OK, PreconditionError

if TYPE_CHECKING:
    from bench.fleet.drive import Part
    from bench.fleet.protocol import Machine
    from bench.rows.store import Row, Run

COMMAND = ("addbench", "sweep")


def parser() -> Parser:
    top = Parser(
        prog="addbench sweep",
        description="Measure a model over backends, steps, batches and decoders.",
    )
    add_axis_arguments(top)
    add_recipe_argument(top)
    how = top.add_argument_group("how to measure")
    add_method_arguments(how, SWEEP, "5 where one takes less than a minute, else 1")
    how.add_argument(
        "--quality", type=count, nargs="?", const=CAPTIONS, metavar="CAPTIONS",
        help=f"judge the pictures of as many held-out captions too ({CAPTIONS}); for models whose"
        " pictures can be judged",
    )  # fmt: skip
    how.add_argument(
        "--frames", type=count, nargs="?", const=FRAMES, metavar="PICTURES",
        help=f"frames a second from as many pictures in a row too ({FRAMES}); with --strength",
    )  # fmt: skip
    how.add_argument("--quick", action="store_true", help="3 samples a cell, no roofline")
    how.add_argument(
        "--no-images", dest="images", action="store_const", const=False,
        help="modelled cards only: their figures, at once",
    )  # fmt: skip
    how.add_argument(
        "--no-roofline", action="store_true", help="do not measure the machine's ceilings first"
    )
    how.add_argument(
        "--patience", type=patience, metavar="60s|0",
        help="for measuring again, in all, what other programs disturbed (60s; 0 where CI is set)",
    )  # fmt: skip
    add_limit_arguments(how, bare="s", usual=None, timeout_s=1800.0)
    where = add_runs_arguments(top)
    where.add_argument(
        "--resume", nargs="?", const=LATEST, metavar="RUN|latest", help="measure what is missing"
    )
    where.add_argument("--retry-failed", action="store_true", help="and what failed")
    where.add_argument(
        "--fleet", metavar="ADDRESS",
        help="measure on the machines of a Ray cluster (auto, HOST:6379), of slurm:PARTITION, or"
        " through submitit on this one (local)",
    )  # fmt: skip
    where.add_argument(
        "--on", metavar="KEY=VALUE,...",
        help="those with these labels, | between values (all; addbench fleet lists them)",
    )  # fmt: skip
    add_price_argument(where)
    where.add_argument(
        "--dry-run", nargs="?", const="plan", choices=("plan", "ceilings"),
        help="print the plan and its time; `ceilings` measures the machine's for the estimate",
    )  # fmt: skip
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(arguments)
    check_arguments(args)
    if args.recipe:
        follow(args)
    if args.fleet:
        return over_fleet(args, [*COMMAND, *arguments])

    from bench.run.estimate import describe, past, survey
    from bench.run.patience import usual_patience_s
    from bench.run.plan import plan
    from bench.run.resume import open_single, reopen
    from bench.run.runner import sweep

    resumed = open_single(args.resume, args.runs) if args.resume else None
    if resumed:
        planned = reopen(resumed, given(args), retry_failed=args.retry_failed)
    else:
        request = request_of(args, QUICK if args.quick else SWEEP)
        planned = plan(request, away=bool(args.dry_run))
    if args.dry_run:
        if args.dry_run == "ceilings":
            planned = replace(planned, roofline=survey(planned))
        describe(planned, past(args.runs, planned))
        return EXIT_OK
    measured, spent = sweep(
        planned,
        args.runs,
        [*COMMAND, *arguments],
        resumed,
        timeout_s=args.timeout,
        budget_s=args.budget,
        patience_s=usual_patience_s() if args.patience is None else args.patience,
        ceilings=not (args.quick or args.no_roofline),
    )
    return conclude(measured, args.budget if spent else None)


def over_fleet(args: argparse.Namespace, command: Sequence[str]) -> int:
    """The same sweep on machines of a fleet, a run each, and one table over them."""
    from bench.fleet.drive import Drive
    from bench.fleet.engines import fleet_at
    from bench.fleet.protocol import select
    from bench.rows.store import with_siblings
    from bench.run.estimate import describe, past
    from bench.run.resume import open_single
    from bench.show.machines import check_prices

    runs: list[Run] = []
    if args.resume:
        runs = with_siblings(open_single(args.resume, args.runs))
        if runs[0].header.fleet is None:
            raise PreconditionError(
                f"run {runs[0].name} is of no fleet", "it was measured on one machine",
                f"go on with it there: addbench sweep --resume {runs[0].argument}",
            )  # fmt: skip
    fleet = fleet_at(args.fleet)
    try:
        machines = select(fleet.machines(), args.on)
        if runs:
            machines, runs = there_now(machines, runs)
        for busy in (machine for machine in machines if machine.running):
            print(f"{busy.name} measures {'; '.join(busy.running)}: groups take turns with it")
        check_prices([machine.name for machine in machines], dict(args.price))
        drive = Drive(fleet, machines)
        if runs:
            plans = drive.rests(runs, args.model, retry_failed=args.retry_failed)
        else:
            plans = drive.plans(request_of(args, QUICK if args.quick else SWEEP))
        if args.dry_run:
            for machine, planned in zip(machines, plans, strict=True):
                print(f"\n{machine.name}: {planned.environment['cpu']}")
                describe(planned, past(args.runs, planned))
            return EXIT_OK
        parts = drive.sweep(
            plans, args.runs, command, runs, timeout_s=args.timeout, budget_s=args.budget,
            ceilings=not (args.quick or args.no_roofline),
        )  # fmt: skip
    finally:
        fleet.close()
    return conclude_all(args, parts)


def there_now(machines: Sequence[Machine], runs: Sequence[Run]) -> tuple[list[Machine], list[Run]]:
    """The machines that runs go on with, each with its run.

    Raises:
        PreconditionError: none of them is there.
    """
    by_name = {machine.name: machine for machine in machines}
    names = {run.name: str((run.header.fleet or {})["machine"]) for run in runs}
    going = [run for run in runs if names[run.name] in by_name]
    if not going:
        raise PreconditionError(
            f"none of the machines of run {runs[0].name} is there",
            f"it is of {', '.join(names.values())}; there are {', '.join(by_name)}",
            "start their nodes again with the labels that they had",
        )
    return [by_name[names[run.name]] for run in going], going


def conclude_all(args: argparse.Namespace, parts: Sequence[Part]) -> int:
    """The table over machines, what is not ok on each, and how to go on; the exit code.

    Machines of the sweep that were away count too.
    """
    from bench.rows.store import with_siblings
    from bench.show import machines, table

    faults = {part.run.name: part.fault for part in parts}
    runs = with_siblings(parts[0].run)
    machines.show(runs, dict(args.price))
    bad = missing = 0
    for target in runs:
        rows = target.rows()
        failed = [row for row in rows if row["status"] != OK]
        left = target.missing(rows)
        bad, missing = bad + len(failed), missing + len(left)
        print(f"{(target.header.fleet or {})['machine']}: {target.path}")
        if target.name in faults:
            table.write(target, rows)
        if fault := faults.get(target.name):
            print(f"  {fault.what}: {fault.why}", file=sys.stderr)
        if left:
            away = "" if target.name in faults else ", the machine is not there"
            print(f"  {count_text(len(left), 'cell')} missing{away}", file=sys.stderr)
        for row in failed:
            print_bad(row)
    if not bad and not missing:
        return EXIT_OK
    if any(part.spent for part in parts):
        print(f"the budget of {args.budget:g} s is spent", file=sys.stderr)
    retry = " --retry-failed" if bad else ""
    print(f"go on with: addbench sweep --fleet {args.fleet} --resume"
          f" {runs[0].argument}{retry}", file=sys.stderr)  # fmt: skip
    return EXIT_FAILED


def check_arguments(args: argparse.Namespace) -> None:
    if args.retry_failed and not args.resume:
        raise PreconditionError(
            "--retry-failed without --resume", "a new run has no failed cells", "add --resume RUN"
        )
    if args.resume and args.quick:
        raise PreconditionError(
            "--quick with --resume", "a run keeps the settings it began with", "drop --quick"
        )
    if not args.fleet and (args.on or args.price):
        flag = "--on" if args.on else "--price"
        raise PreconditionError(
            f"{flag} without --fleet", "it is of the machines of a fleet", "add --fleet ADDRESS"
        )
    if args.fleet and args.patience:
        raise PreconditionError(
            "--patience with --fleet",
            "whether a machine is quiet is not looked at from another one; rows carry their flags",
            "drop it",
        )
    if args.fleet and args.resume and (more := given(args).keys() - {"model"}):
        raise PreconditionError(
            f"--resume over a fleet with {', '.join(sorted(more))}",
            "its runs go on as they began",
            f"addbench sweep --fleet {args.fleet} --resume {args.resume}",
        )


def follow(args: argparse.Namespace) -> None:
    """Set the axes that --recipe says; no flag may say one of them too."""
    from backends.locked import LockedRecipe, refuse_beside

    locked = LockedRecipe.read(args.recipe)
    refuse_beside(f"--{FLAGS.get(name, name.replace('_', '-'))}" for name in axes_of(args))
    vars(args).update(locked.axes())
    if text := locked.elsewhere():
        print(f"note: {text}", file=sys.stderr)


FLAGS = {axis.field: flag for flag, axis in AXES.items()}


def given(args: argparse.Namespace) -> dict[str, Any]:
    """What of the request was given beside --resume, by name."""
    rest = {name: getattr(args, name) for name in ("quality", "frames", "images")}
    asked = {name: value for name, value in rest.items() if value is not None}
    return axes_of(args) | method_of(args) | asked


def conclude(target: Run, spent_budget_s: float | None) -> int:
    """Table, plot, and the list of what is not ok; the exit code."""
    from bench.show import latency as plot
    from bench.show import table

    rows = target.rows()
    table.show(target, rows)
    if any(map(is_noisy, rows)):
        print(f"measure them again when it is quiet: addbench sweep --resume {target.argument}"
              " --patience 10m")  # fmt: skip
    files: list[Path] = []
    for what, write in (("table", table.write), ("plot", plot.write)):
        try:
            files += write(target, rows)
        except ImportError as error:  # nothing of the run hangs on it
            print(f"left out: the {what}: {error}", file=sys.stderr)
    print(f"run folder: {target.path}")
    print(f"files: rows.jsonl, header.json, {', '.join(file.name for file in files)}")
    bad = [row for row in rows if row["status"] != OK]
    missing = target.missing(rows)
    if not bad and not missing:
        return EXIT_OK
    print(f"\n{count_text(len(bad), 'cell')} failed, {len(missing)} missing:", file=sys.stderr)
    for row in bad:
        print_bad(row)
    for cell, round_ in missing:
        print(f"  missing: {cell}, round {round_ + 1}", file=sys.stderr)
    if spent_budget_s is not None:
        print(f"the budget of {spent_budget_s:g} s is spent", file=sys.stderr)
    retry = " --retry-failed" if bad else ""
    print(f"go on with: addbench sweep --resume {target.argument}{retry}", file=sys.stderr)
    return EXIT_FAILED


def print_bad(row: Row) -> None:
    error = row["error"] or {}
    print(f"  {row['status']}: {Cell.of(row)}, round {row['round'] + 1}", file=sys.stderr)
    for key in ("what", "why", "next"):
        if error.get(key):
            print(f"    {key}: {error[key]}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run(main))
