"""`addbench noise`: how often the rules of `addbench compare` and `addbench ab` are wrong.

A seeded simulation of measurement noise, through the very functions that judge: false alarms of a
whole job of 24 cells, and the power to see a cell that became slower. `--levels RUN...` estimates
how noisy this machine is from runs of an unchanged program instead, and `--choices` how often
`addbench choose` takes a wrong one.

Exit code 4 if a goal is missed; 5 if the runs are noisier than the simulation covers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from core.cli import Parser, add_format_argument, add_runs_argument, count, natural
from core.errors import EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_OK, PreconditionError

ROUNDS = 10
CHOICE_JOBS = 1000


def parser() -> Parser:
    top = Parser(
        prog="addbench noise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "--jobs", type=count, help=f"for false alarms (100000), or choices ({CHOICE_JOBS})"
    )
    top.add_argument("--power-jobs", type=count, default=20_000, help="for power (20000)")
    top.add_argument("--rounds", type=count, default=ROUNDS, help=f"of addbench ab ({ROUNDS})")
    top.add_argument("--seed", type=natural, default=0, help="(0)")
    add_format_argument(top)
    other = top.add_mutually_exclusive_group()
    other.add_argument(
        "--levels", nargs="+", metavar="RUN", help="estimate the levels from runs instead"
    )
    other.add_argument(
        "--choices", action="store_true", help="how often addbench choose is wrong instead"
    )
    add_runs_argument(top)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.choices:
        return choices(args)
    args.jobs = args.jobs or 100_000
    return from_runs(args) if args.levels else simulated(args)


def choices(args: argparse.Namespace) -> int:
    """4 if wrong choices are more than the goal allows."""
    from dataclasses import asdict

    from bench.verdict.choosing.simulated import COLUMNS, table
    from core.table import draw, markdown_lines

    lines = table(args.jobs or CHOICE_JOBS, args.seed)
    if args.format == "json":
        print(json.dumps([{**asdict(line), "met": line.met} for line in lines], indent=2))
    elif args.format == "markdown":
        print("\n".join(markdown_lines(COLUMNS, lines)))
    else:
        draw(COLUMNS, lines, "wrong choices for a difference of 10%")
    return EXIT_OK if all(line.met for line in lines) else EXIT_FAILED


def from_runs(args: argparse.Namespace) -> int:
    """5 if a level is beyond `harsh`: the simulated error rates do not cover the machine."""
    from bench.rows.store import open_run
    from bench.verdict.levels import report, report_text

    described = report([open_run(text, args.runs) for text in args.levels], args.jobs, args.seed)
    print(json.dumps(described, indent=2) if args.format == "json" else report_text(described))
    beyond = "beyond harsh" in described["against_the_model"].values()
    return EXIT_INCONCLUSIVE if beyond else EXIT_OK


def simulated(args: argparse.Namespace) -> int:
    """4 if a rule misses its goal."""
    from bench.verdict.noise import head_text, line_text, markdown, table
    from bench.verdict.rules import PAIR_ROUNDS

    if args.rounds < PAIR_ROUNDS:
        raise PreconditionError(
            f"--rounds {args.rounds} is too few",
            f"addbench ab judges nothing with fewer than {PAIR_ROUNDS}",
            f"use --rounds {ROUNDS}",
        )
    if args.format == "table":
        print(head_text(args.jobs, args.seed))
    lines = []
    for line in table(args.jobs, args.power_jobs, args.rounds, args.seed):
        lines.append(line)
        if args.format == "table":
            print(line_text(line), flush=True)
    if args.format == "markdown":
        print("\n".join(markdown(lines)))
    if args.format == "json":
        json.dump(lines, sys.stdout, indent=2)
        print()
    missed = any(not goal["met"] for line in lines for goal in line["goals"])
    return EXIT_FAILED if missed else EXIT_OK
