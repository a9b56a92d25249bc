"""`addbench compare BASE HEAD`: did it become slower from one run to the other?

Two runs of the same cells, measured one after the other on one machine, five rounds each or more.
For a change in code use `addbench ab`, which alternates and so sees smaller slowdowns.
`addbench compare --history [RUN]` holds a run against all earlier ones of the machine.

Exit code 0: no regression. 3: a cell is slower. 4: cells failed or are missing. 5: inconclusive.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from core.amounts import count_text
from core.cli import Parser, add_format_argument, add_runs_argument, share
from core.errors import PreconditionError


def parser() -> Parser:
    top = Parser(
        prog="addbench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("run", nargs="*", metavar="RUN|latest", help="BASE HEAD; one for --history")
    top.add_argument("--max-slowdown", type=share, default=None, metavar="15%", help="limit (15%%)")
    add_format_argument(top)
    top.add_argument(
        "--allow-other-machine", action="store_true", help="compare, but never end in 3"
    )
    top.add_argument("--history", action="store_true", help="against all earlier runs")
    add_runs_argument(top)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.history and (len(args.run) > 1 or args.max_slowdown or args.allow_other_machine):
        raise PreconditionError(
            "--history takes one run and no other limit",
            "the earlier runs of the machine are what it is held against",
            "addbench compare --history RUN",
        )
    if not args.history and len(args.run) != 2:
        raise PreconditionError(
            f"{count_text(len(args.run), 'run')} named, and two are compared",
            "the first is the base, the second the head",
            "addbench compare BASE HEAD",
        )
    from bench.rows.store import LATEST, open_run
    from bench.show.history import draw
    from bench.verdict.compare import compare
    from bench.verdict.history import against_history
    from bench.verdict.outcome import show
    from bench.verdict.rules import RUN_SLOWDOWN

    if args.history:
        target = open_run([*args.run, LATEST][0], args.runs)
        outcome, bands = against_history(target, args.runs)
        plots = [f"plot: {target.name}/{file.name}" for file in draw(target, outcome, bands)[:1]]
        outcome = replace(outcome, notes=[*outcome.notes, *plots])
    else:
        base, head = (open_run(name, args.runs) for name in args.run)
        limit = args.max_slowdown or RUN_SLOWDOWN
        outcome = compare(base, head, limit, args.allow_other_machine)
    show(outcome, args.format)
    return outcome.exit_code
