"""`addbench show RUN...`: what runs measured, as a table, a picture, a page or for other programs.

    table     one line per cell, in the terminal or with --format markdown or json
    plot      latency and images/s against steps (or --x nfe), several runs in one picture
    roofline  what each stage reached under the machine's ceilings
    quality   prompt following against latency, of runs of `addbench sweep --quality`
    strength  what is changed of a picture and at what cost, of runs with --strength and --quality
    page      the run as one HTML page, complete in itself; --base shows how it compares
    csv       the table unrounded          json     the same, a record per cell
    parquet   a line per cell and round, every column with its type (needs pyarrow)
    github    the JSON of github-action-benchmark's `customSmallerIsBetter`
    machines  one table over the runs' machines, a column each; a run of `sweep --fleet` brings
              those of its other machines along

A run is `latest`, a folder, or the name of a published run. Without --out pictures and pages lie in
the run's folder; those of published or of several runs in build/show, as nothing that is committed
changes by being looked at. What is text is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.commands.arguments import add_price_argument
from core.cli import Parser, add_format_argument, add_out_argument, add_runs_argument
from core.errors import EXIT_OK, PreconditionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bench.rows.store import Row, Run

AS = (
    "table",
    "plot",
    "roofline",
    "quality",
    "strength",
    "page",
    "csv",
    "parquet",
    "github",
    "json",
    "machines",
)
OF_ONE = ("roofline", "page", "parquet", "github")
"""What is made of one run only."""


def parser() -> Parser:
    top = Parser(
        prog="addbench show",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("run", nargs="*", default=["latest"], metavar="RUN|latest", help="(latest)")
    top.add_argument("--as", choices=AS, default="table", dest="form", help="(table)")
    add_out_argument(top, help="of a picture FILE.svg, FILE.png, or both as FILE")
    add_runs_argument(top)
    add_format_argument(top)
    top.add_argument("--x", choices=("steps", "nfe"), default="steps",
                     help="of a plot: steps, or UNet evaluations of an image (steps)")  # fmt: skip
    top.add_argument("--base", metavar="RUN|latest", help="of a page: the run to compare with")
    add_price_argument(top)
    return top


def refuse(args: argparse.Namespace) -> None:
    """Refuse what does not go together."""
    for flag, given, forms in (
        ("--x", args.x != "steps", ("plot",)),
        ("--base", args.base, ("page",)),
        ("--format", args.format != "table", ("table", "machines")),
        ("--price", args.price, ("machines",)),
    ):
        if given and args.form not in forms:
            raise PreconditionError(
                f"{flag} does not go with --as {args.form}",
                f"it is of --as {forms[0]}",
                f"drop it, or use --as {forms[0]}",
            )
    if len(args.run) > 1 and args.form in OF_ONE:
        raise PreconditionError(
            f"--as {args.form} shows one run", f"{len(args.run)} were named", "name one of them"
        )


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    refuse(args)
    from bench.rows.store import open_run, with_siblings

    targets = [open_run(name, args.runs) for name in args.run]
    if args.form == "machines":
        targets = list({run.name: run for each in targets for run in with_siblings(each)}.values())
    if args.form in ("plot", "roofline", "quality", "strength"):
        files = picture(args, targets)
    elif args.form in ("page", "parquet"):
        files = document(args, targets[0])
    else:
        files = text(args, targets)
    for file in files:
        print(file)
    return EXIT_OK


def text(args: argparse.Namespace, targets: Sequence[Run]) -> list[Path]:
    """Print what is text, or write it to --out; the file written."""
    from bench.show import export, machines, table
    from core.files import write_atomic

    prices = dict(args.price)
    if args.form == "machines" and args.format == "table" and args.out is None:
        machines.show(targets, prices)
        return []
    if args.form == "table" and args.format == "table" and args.out is None:
        for target in targets:
            if len(targets) > 1:
                print(f"\n{target.label}")
            table.show(target, target.rows())
        return []
    form = args.form
    written_as = args.format if args.format != "table" else "markdown"
    if form in ("table", "machines"):
        form = written_as if form == "table" else f"machines {written_as}"
    ways: dict[str, Callable[[], str]] = {
        "markdown": lambda: "\n".join(table.page(each, each.rows()) for each in targets),
        "json": lambda: table.json_text(targets),
        "machines markdown": lambda: machines.markdown(targets, prices),
        "machines json": lambda: json.dumps(machines.json_lines(targets, prices), indent=2) + "\n",
        "csv": lambda: table.csv([row for each in targets for row in each.rows()]),
        "github": lambda: export.smaller_is_better(targets[0]).decode(),
    }
    written = ways[form]()
    if args.out is None:
        print(written, end="")
        return []
    write_atomic(export.output_file(args.out, targets), written)
    return [args.out]


def document(args: argparse.Namespace, target: Run) -> list[Path]:
    """Write a page or a parquet file; its path."""
    from bench.rows.store import open_run
    from bench.show.export import output_file, parquet
    from core.files import write_atomic

    name = "report.html" if args.form == "page" else "rows.parquet"
    file = output_file(args.out or place(args, [target]) / name, [target])
    if args.form == "page":
        from bench.show.page.page import render

        base = open_run(args.base, args.runs) if args.base else None
        content: str | bytes = render(target, base)
    else:
        content = parquet(target)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, content)
    return [file]


def picture(args: argparse.Namespace, targets: Sequence[Run]) -> list[Path]:
    """Draw one picture of all runs; its files."""
    from bench.show import canvas, export, latency, quality, roofline, strength

    drawn: Figure | None
    if args.form == "roofline":
        drawn = roofline.figure(targets[0], targets[0].rows())
    elif args.form == "quality":
        drawn = quality.figure(rows_of(targets), quality.machine_of(targets))
    elif args.form == "strength":
        drawn = strength.figure(rows_of(targets), quality.machine_of(targets))
    else:
        drawn = latency.figure([(each, each.rows()) for each in targets], args.x)
    if drawn is None:
        print(f"no cell of {', '.join(each.label for each in targets)} is ok: nothing to draw")
        return []
    stem = args.out
    if stem is None:
        name = f"{args.form}-{args.x}" if args.x != "steps" else args.form
        stem = place(args, targets) / name
    export.output_file(stem, targets)
    stem.parent.mkdir(parents=True, exist_ok=True)
    return canvas.save(drawn, stem)


def rows_of(targets: Sequence[Run]) -> list[Row]:
    """The rows of some runs."""
    return [row for target in targets for row in target.rows()]


def place(args: argparse.Namespace, targets: Sequence[Run]) -> Path:
    """Return the folder for what no --out names: the run's, unless it is a published one."""
    from bench.rows.store import PUBLISHED
    from core.files import build_root

    one = len(targets) == 1
    if one and not targets[0].path.resolve().is_relative_to(PUBLISHED):
        return targets[0].path
    return build_root() / "show" / "+".join(target.label for target in targets)
