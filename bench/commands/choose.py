"""`addbench choose`: which backend, precision, decoder, steps and batch to take.

    addbench choose latest --within 'latency<=4s memory<=8GB psnr>=40dB'
    addbench choose --model sdxl-turbo --within 'latency<=4s memory<=8GB psnr>=40dB' --budget 10m

With runs it chooses from them and measures nothing; they may be of several machines, and of
modelled cards, which are labelled. With --model alone it measures, no more than the choice takes:
every backend that can be used here in each of its precisions, or those that --backend names.

Limits are quantities with `<=` or `>=` and a number with its unit: latency, images/s, memory, psnr,
captions (of models whose pictures can be judged), joule/image, and usd/1000 with --price. Of the
cells that meet them all the best is taken of the first quantity without a limit, or of --best.
Intervals decide: cells that cannot be told apart tie, and the simpler one is taken.

Exit code 0 with a choice, 4 where nothing meets the limits (with the nearest that does), 5 where
nothing can be said.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.commands.arguments import AXES, add_axis_arguments, add_limit_arguments, axes_of
from bench.verdict.choosing.wants import QUANTITIES
from core.cli import Parser, add_format_argument, add_out_argument, add_runs_argument
from core.errors import EXIT_OK, PreconditionError

if TYPE_CHECKING:
    from bench.rows.cell import Cell
    from bench.rows.store import Run
    from bench.run.regret import Regret
    from bench.verdict.choosing.choice import Decision
    from bench.verdict.choosing.wants import Wants

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
    add_axis_arguments(top)
    how = top.add_argument_group("how to measure, with --model")
    add_limit_arguments(how, bare="s", usual=None, timeout_s=1800.0)
    how.add_argument("--no-roofline", action="store_true", help="order candidates without ceilings")
    how.add_argument(
        "--dry-run", action="store_true",
        help="print what would be measured, in which order, and about how long that takes",
    )  # fmt: skip
    how.add_argument("--resume", nargs="?", const="latest", metavar="RUN|latest",
                     help="go on with a search that was interrupted")  # fmt: skip
    shown = top.add_argument_group("how it is shown")
    shown.add_argument(
        "--against-grid", metavar="RUN",
        help="hold the choice against the best of a full sweep of this machine",
    )  # fmt: skip
    shown.add_argument(
        "--across", choices=FRONTIERS, default="",
        help="the other axis of the frontier (captions where there are some, else memory)",
    )  # fmt: skip
    shown.add_argument(
        "--save", type=Path, metavar="FILE.toml",
        help="lock the choice: image, sweep and load_pipeline take it as --recipe",
    )  # fmt: skip
    add_format_argument(shown)
    shown.add_argument("--json", dest="format", action="store_const", const="json",
                       help="the same as --format json")  # fmt: skip
    add_out_argument(shown, "STEM", "files are STEM.md, .csv, .svg and .png (the run's folder)")
    add_runs_argument(shown)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(arguments)

    from bench.verdict.choosing.wants import wants_of

    wants = wants_of(args.within, args.best, args.price)

    from bench.rows.store import open_run
    from bench.verdict.choosing.choice import decide
    from bench.verdict.choosing.contenders import contenders_of

    check(args)
    if args.resume or (args.model and not args.run):
        return measured(args, wants, arguments)
    targets = [open_run(name, args.runs) for name in args.run or ["latest"]]
    choice = decide(contenders_of(targets, wants, wanted(args)), wants, args.across)
    stem = args.out or place([target.path for target in targets]) / "choice"
    return conclude(choice, args, stem, [], targets[-1])


def check(args: argparse.Namespace) -> None:
    """Refuse what does not go together, and a place that nothing can be saved to."""
    from bench.verdict.choosing.lock import require_place

    if args.save:
        require_place(args.save)
    measuring = args.resume or (args.model and not args.run)
    if args.run and args.resume:
        raise PreconditionError(
            "--resume with runs to choose from", "one measures, the other does not", "drop one"
        )
    if args.dry_run and (args.resume or args.save or args.against_grid):
        flag = "--resume" if args.resume else "--save" if args.save else "--against-grid"
        raise PreconditionError(
            f"--dry-run with {flag}", "nothing is measured or chosen, and nothing is written",
            f"drop {flag}, or --dry-run",
        )  # fmt: skip
    if args.resume and (args.within or args.best or args.price):
        raise PreconditionError(
            "--resume with limits", "a search keeps those that it began with",
            "drop them; `addbench choose RUN` with limits chooses again from what it has",
        )  # fmt: skip
    if measuring:
        return
    others = [f"--{flag}" for flag, axis in AXES.items()
              if flag not in FILTERS and getattr(args, axis.field, None) is not None]  # fmt: skip
    others += ["--budget"] * bool(args.budget) + ["--no-roofline"] * args.no_roofline
    others += ["--dry-run"] * args.dry_run
    if others:
        raise PreconditionError(
            f"{others[0]} does not go with runs to choose from",
            "nothing is measured, and cells are picked by "
            + ", ".join(f"--{flag}" for flag in FILTERS),
            f"drop {others[0]}, or measure: addbench choose --model shapes-turbo",
        )


def measured(args: argparse.Namespace, wants: Wants, arguments: Sequence[str]) -> int:
    """Search: measure what the choice takes, then choose."""
    from bench.run.plan import plan
    from bench.run.request import Request
    from bench.run.resume import open_single, reopen
    from bench.run.search import (
        METHOD,
        asked_of,
        batches_for,
        candidates,
        captions_for,
        describe,
        final,
        search,
    )
    from bench.show import table

    axes = axes_of(args)
    left_out: list[str] = []
    resumed = open_single(args.resume, args.runs) if args.resume else None
    if resumed:
        wants, left_out = asked_of(resumed)
        planned = reopen(resumed, axes)
    else:
        if "backends" not in axes:
            axes["backends"], left_out = candidates(wants)
        axes.setdefault("batches", batches_for(wants))
        planned = plan(Request(**axes, method=METHOD, quality=captions_for(wants)))
    if args.dry_run:
        describe(planned, wants, args.runs, left_out, args.budget)
        return EXIT_OK
    aside = sys.stdout if args.format == "table" else sys.stderr  # what is parsed is alone there
    with contextlib.redirect_stdout(aside):
        run, left_out = search(
            planned,
            wants,
            args.runs,
            ["addbench", "choose", *arguments],
            left_out,
            resumed,
            timeout_s=args.timeout,
            budget_s=args.budget,
            ceilings=not args.no_roofline,
        )
    table.write(run, run.rows())
    stem = args.out or run.path / "choice"
    return conclude(final(run, wants, args.across), args, stem, left_out, run)


def wanted(args: argparse.Namespace) -> Callable[[Cell], bool]:
    """Which cells of a run the axes ask for; every one where none is given."""
    from backends.registry import parse_backend

    axes = axes_of(args)
    folder = os.sep in (args.model or "")  # rows hold a name, and no folder
    backends = {text for given in axes.get("backends", ()) for text in (given, sorted_text(given))}

    def keep(cell: Cell) -> bool:
        return (
            (folder or axes.get("model", cell.model) == cell.model)
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
    choice: Decision, args: argparse.Namespace, stem: Path, left_out: Sequence[str], run: Run
) -> int:
    """Show a choice and write its files; the exit code."""
    from bench.show import choice as shown
    from bench.verdict.choosing.choice import as_json
    from bench.verdict.choosing.lock import recipe_of
    from core.table import print_json

    against = held_against(choice, args, run) if args.against_grid else None
    model = args.model or ""
    files = shown.write(choice, left_out, stem, model)
    if args.save and choice.taken is not None:
        recipe_of(choice, model).write(args.save)
        files.append(args.save)
    elif args.save:
        print(f"nothing is taken, and {args.save} not written", file=sys.stderr)
    if args.format == "json":
        taken = choice.taken and shown.commands(choice.taken.contender, model)
        regret = against and {"share": against.share, "time_share": against.time_share,
                              "misses": against.misses}  # fmt: skip
        print_json(as_json(choice) | {"commands": taken, "left_out": list(left_out),
                                      "against_grid": regret,
                                      "files": [str(file) for file in files]})  # fmt: skip
    elif args.format == "markdown":
        print(shown.markdown(choice, left_out, model), end="")
    else:
        shown.show(choice, left_out, model)
        print(*([against] if against else []), f"files: {', '.join(map(str, files))}", sep="\n")
    return choice.exit_code


def held_against(choice: Decision, args: argparse.Namespace, run: Run) -> Regret:
    """The regret of a choice against the grid that --against-grid names."""
    from bench.rows.store import open_run
    from bench.run.regret import regret

    return regret(choice, run, open_run(args.against_grid, args.runs))


def place(folders: Sequence[Path]) -> Path:
    """Return the folder for what no --out names: the run's, unless it is published or not alone."""
    from core.cli import PUBLISHED
    from core.files import build_root

    if len(folders) == 1 and not folders[0].resolve().is_relative_to(PUBLISHED):
        return folders[0]
    return build_root() / "choose" / "+".join(folder.name for folder in folders)
