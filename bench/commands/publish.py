"""`addbench publish RUN...`: copy runs into results/published and redraw from there.

What is committed - tables, plots, the blocks of README and docs - is derived from
`results/published` alone; `--check` derives it again and says whether it still matches, whether the
ratios that pages state still hold, and whether the published rows are as they were published (exit
code 4 if not). All is written, or nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.cli import Parser, add_runs_argument
from core.errors import EXIT_FAILED, EXIT_OK, PreconditionError
from core.files import ROOT


def parser() -> Parser:
    top = Parser(
        prog="addbench publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("run", nargs="*", metavar="RUN|latest", help="none: only redraw")
    top.add_argument("--check", action="store_true", help="write nothing; 4 if something is stale")
    top.add_argument(
        "--name", action="append", default=[], metavar="NAME",
        help="what pages call the run, as cpu-zen4-peers; once for each run",
    )  # fmt: skip
    add_runs_argument(top)
    top.add_argument(
        "--results", type=Path, default=ROOT / "results", help="where results are published"
    )
    top.add_argument(
        "--pages", type=Path, nargs="+", default=[ROOT / "README.md", *sorted(
            (ROOT / "docs").glob("*.md"))], help="with marked blocks (README and docs)",
    )  # fmt: skip
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.check and (args.run or args.name):
        raise PreconditionError(
            "--check takes no run", "it checks what is published", "drop the run"
        )
    from bench.rows.store import open_run
    from bench.show import publish
    from bench.show.sums import PUBLISHED

    if args.check:
        problems = publish.stale(args.results, args.pages)
        for problem in problems:
            print(f"stale: {problem}")
        if problems:
            print("redraw with: addbench publish")
        else:
            print("the published rows are as they were published; tables and plots match them")
        return EXIT_FAILED if problems else EXIT_OK
    targets = [open_run(name, args.runs) for name in args.run]
    names = publish.names_for(targets, args.name)
    derived = publish.publish(targets, args.results, args.pages, names)
    for name in dict.fromkeys(target.name for target in targets):
        print(f"published: {args.results / PUBLISHED / name}")
    print(f"redrawn: {len(derived)} files in {args.results / 'tables'}, {args.results / 'plots'}")
    return EXIT_OK
