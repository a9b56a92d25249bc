"""`addbench show --as page RUN`: the run as one HTML page, complete in itself.

With --base, how the run compares to an earlier one. Exit code 0 once the page is written, whatever
it says: `addbench compare` is the gate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.rows.store import LATEST, RUNS, open_run
from core.cli import Parser, run
from core.errors import EXIT_OK
from core.files import write_atomic

PAGE = "report.html"


def parser() -> Parser:
    top = Parser(
        prog="addbench show --as page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("run", nargs="?", default=LATEST, metavar="RUN|latest")
    top.add_argument("--base", metavar="RUN|latest", help="the run to compare with")
    top.add_argument("--out", type=Path, metavar="FILE", help=f"(RUN/{PAGE})")
    top.add_argument("--runs", type=Path, default=RUNS, help="where runs lie (results/runs)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    target = open_run(args.run, args.runs)
    base = open_run(args.base, args.runs) if args.base else None

    from bench.show.export import output_file
    from bench.show.page.page import render

    file = output_file(args.out or target.path / PAGE, target)
    write_atomic(file, render(target, base))
    print(file)
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run(main))
