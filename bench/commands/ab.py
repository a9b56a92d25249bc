"""`addbench ab --base REV`: did a change make it slower?

Checks two revisions out side by side, each with a bundle and a cache of its own, and measures the
same cells on both in alternating order, every round in fresh processes. What the machine does to
both cancels; what looks slower is measured once more. The head is the working tree (WORKTREE)
where it holds uncommitted changes, else HEAD.

Exit code 0: no regression. 3: a cell is slower. 4: cells failed or are missing. 5: inconclusive.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from bench.commands.arguments import (
    add_axis_arguments,
    add_limit_arguments,
    add_method_arguments,
    add_runs_arguments,
    request_of,
)
from bench.run.request import AB
from core.cli import Parser, add_format_argument, share
from core.errors import PreconditionError

COMMAND = ("addbench", "ab")


def parser() -> Parser:
    top = Parser(
        prog="addbench ab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = top.add_argument_group("which revisions")
    what.add_argument("--base", required=True, metavar="REV", help="what to compare with")
    what.add_argument(
        "--head", metavar="REV|WORKTREE", help="the change (WORKTREE where it is changed, or HEAD)"
    )
    add_axis_arguments(top, "backend", "steps", "batch", "decoder")
    how = top.add_argument_group("how to measure")
    add_method_arguments(how, AB, f"{AB.rounds}, of each side")
    how.add_argument("--max-slowdown", type=share, metavar="8%", help="limit (8%%)")
    add_limit_arguments(how, bare="m", usual="30m", timeout_s=1800.0)
    where = add_runs_arguments(top)
    where.add_argument("--extra", default="cpu", help="of pyproject.toml, for environments (cpu)")
    where.add_argument(
        "--work", type=Path, metavar="FOLDER",
        help="keep checkouts, bundles and caches here for the next time (none: a scratch folder)",
    )  # fmt: skip
    add_format_argument(where)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(arguments)

    from bench.run import duel, revisions
    from bench.verdict.outcome import show
    from bench.verdict.rules import PAIR_ROUNDS, PAIR_SLOWDOWN

    request = replace(request_of(args, AB), dtype=args.dtype or "fp16")
    if request.method.rounds < PAIR_ROUNDS:
        raise PreconditionError(
            f"--rounds {request.method.rounds} is too few",
            f"no rule holds its error rate with fewer than {PAIR_ROUNDS} rounds",
            f"use --rounds {AB.rounds}",
        )
    revisions.require_own_repository()
    head = args.head or (revisions.WORKTREE if revisions.changed() else "HEAD")
    with redirect_stdout(sys.stderr):  # progress: stdout is the result, for a file or a summary
        outcome = duel.measure(
            request,
            (args.base, head),
            args.runs,
            [*COMMAND, *arguments],
            max_slowdown=args.max_slowdown or PAIR_SLOWDOWN,
            budget_s=args.budget,
            timeout_s=args.timeout,
            extra=args.extra,
            work=args.work,
        )
    show(outcome, args.format)
    return outcome.exit_code
