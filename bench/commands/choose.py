"""`addbench choose RUN...`: which backend, precision, decoder, steps and batch to take.

    addbench choose latest --within 'latency<=4s memory<=8GB psnr>=40dB'

Limits are quantities with `<=` or `>=` and a number with its unit: latency, images/s, memory, psnr,
captions (of runs with --quality), joule/image, and usd/1000 with --price. Of the cells that meet
them all the best is taken of the first quantity without a limit, or of --best. Intervals decide:
cells that cannot be told apart tie, and the simpler one is taken. Runs may be of several machines,
and of modelled cards, which are labelled.

Exit code 0 with a choice, 4 where nothing meets the limits (with the nearest that does), 5 where
nothing can be said.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.commands.arguments import add_axis_arguments, axes_of
from bench.verdict.choosing.wants import QUANTITIES
from core.cli import Parser, add_format_argument, add_out_argument, add_runs_argument, run

if TYPE_CHECKING:
    from bench.rows.cell import Cell
    from bench.verdict.choosing.choice import Decision

FILTERS = ("backend", "steps", "batch", "decoder")
"""The axes that say which cells of a run are looked at."""
FRONTIERS = ("memory", "captions", "psnr")


def parser() -> Parser:
    top = Parser(
        prog="addbench choose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("run", nargs="*", metavar="RUN|latest", help="choose from these (latest)")
    asked = top.add_argument_group("what is wanted")
    asked.add_argument(
        "--within", default="", metavar="'LIMIT ...'",
        help="; ".join(each.example for each in QUANTITIES.values()).replace("%", "%%"),
    )  # fmt: skip
    asked.add_argument(
        "--best", default="", metavar="QUANTITY",
        help=f"of what the best is taken (the first without a limit of: {', '.join(QUANTITIES)})",
    )  # fmt: skip
    asked.add_argument("--price", type=float, metavar="USD", help="an hour of the machine")
    add_axis_arguments(top, *FILTERS)
    shown = top.add_argument_group("how it is shown")
    shown.add_argument(
        "--across", choices=FRONTIERS, default="",
        help="the other axis of the frontier (captions where there are some, else memory)",
    )  # fmt: skip
    add_format_argument(shown)
    shown.add_argument("--json", dest="format", action="store_const", const="json",
                       help="the same as --format json")  # fmt: skip
    add_out_argument(shown, "STEM", "files are STEM.md, .csv, .svg and .png (the run's folder)")
    add_runs_argument(shown)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)

    from bench.verdict.choosing.wants import wants_of

    wants = wants_of(args.within, args.best, args.price)

    from bench.rows.store import open_run
    from bench.verdict.choosing.choice import decide
    from bench.verdict.choosing.contenders import contenders_of

    targets = [open_run(name, args.runs) for name in args.run or ["latest"]]
    choice = decide(contenders_of(targets, wants, wanted(args)), wants, args.across)
    stem = args.out or place([target.path for target in targets]) / "choice"
    return conclude(choice, args, stem, [])


def wanted(args: argparse.Namespace) -> Callable[[Cell], bool]:
    """Which cells of a run the axes ask for; every one where none is given."""
    from backends.registry import parse_backend

    axes = axes_of(args)
    backends = {text for given in axes.get("backends", ()) for text in (given, sorted_text(given))}

    def keep(cell: Cell) -> bool:
        return (
            axes.get("model", cell.model) == cell.model
            and (not backends or cell.backend_text in backends or cell.backend in backends)
            and cell.steps in axes.get("steps", [cell.steps])
            and cell.batch in axes.get("batches", [cell.batch])
            and cell.decoder in axes.get("decoders", [cell.decoder])
        )

    for text in axes.get("backends", ()):
        parse_backend(text)
    return keep


def sorted_text(backend: str) -> str:
    """A backend as cells write it: its options sorted."""
    name, colon, options = backend.partition(":")
    return name + colon + ",".join(sorted(options.split(",")))


def conclude(
    choice: Decision, args: argparse.Namespace, stem: Path, left_out: Sequence[str]
) -> int:
    """Show a choice and write its files; the exit code."""
    from bench.show import choice as shown
    from bench.verdict.choosing.choice import as_json
    from core.table import print_json

    model = args.model or ""
    files = shown.write(choice, left_out, stem, model)
    if args.format == "json":
        taken = choice.taken and shown.commands(choice.taken.contender, model)
        print_json(as_json(choice) | {"commands": taken, "left_out": list(left_out),
                                      "files": [str(file) for file in files]})  # fmt: skip
    elif args.format == "markdown":
        print(shown.markdown(choice, left_out, model), end="")
    else:
        shown.show(choice, left_out, model)
        print(f"files: {', '.join(str(file) for file in files)}")
    return choice.exit_code


def place(folders: Sequence[Path]) -> Path:
    """Return the folder for what no --out names: the run's, unless it is published or not alone."""
    from core.cli import PUBLISHED
    from core.files import build_root

    if len(folders) == 1 and not folders[0].resolve().is_relative_to(PUBLISHED):
        return folders[0]
    return build_root() / "choose" / "+".join(folder.name for folder in folders)


if __name__ == "__main__":
    raise SystemExit(run(main))
