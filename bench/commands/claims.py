"""`addbench claims`: published figures of few-step models against ours and against physics.

Each figure (bench/limits/data/published_figures.csv) with its conditions, the nearest cell that we
measured, what a model of that hardware allows, and a verdict:

    reproduced          measured on that hardware under those conditions, within the tolerance
    contradicted        below the floor of that hardware, or measured slower there
    beaten              slower than somebody else's published figure, or than ours, there
    consistent          the model's range contains it, or ends before it (time to spare)
    not testable here   none of these can be said; the reason is given

Models are no measurements: a floor says what cannot be, a range what would be no surprise.
--coverage says how often the ranges hold what others published, by hardware and by software.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from core.cli import Parser, add_format_argument, add_published_argument, add_runs_argument
from core.errors import EXIT_FAILED, EXIT_OK, PreconditionError


def requirement(text: str) -> tuple[str, str]:
    """`VERDICT:ID` -> both."""
    from bench.limits.claims import VERDICTS

    verdict, colon, name = text.partition(":")
    if not colon or verdict not in VERDICTS or not name:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not VERDICT:ID with a verdict of {', '.join(VERDICTS)}"
        )
    return verdict, name


def parser() -> Parser:
    top = Parser(
        prog="addbench claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_format_argument(top)
    top.add_argument(
        "--require", action="append", type=requirement, default=[], metavar="VERDICT:ID",
        help="repeatable; exit code 4 when the verdict on ID is another",
    )  # fmt: skip
    top.add_argument(
        "--run", action="append", default=[], metavar="RUN|latest", help="count this run too"
    )
    top.add_argument(
        "--coverage",
        action="store_true",
        help="how often the modelled ranges hold what is published",
    )
    top.add_argument(
        "--out", type=Path, metavar="STEM", help="with --coverage: draw it as STEM.svg and STEM.png"
    )
    add_published_argument(top)
    add_runs_argument(top)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.out and not args.coverage:
        raise PreconditionError(
            "--out draws what --coverage says", "there is no picture of the verdicts",
            "add --coverage, or drop --out",
        )  # fmt: skip
    if args.coverage:
        if args.require or args.run:
            raise PreconditionError(
                "--coverage is about published figures alone",
                "--require and --run are about verdicts",
                "drop --coverage, or drop the other two",
            )
        return coverage(args.format, args.out)
    from bench.limits.claims import findings, impossible, markdown, show
    from bench.limits.ledger import measured, read_claims
    from bench.rows.store import open_run, run_names

    claims = read_claims()
    for _, name in args.require:
        if name not in {claim.id for claim in claims}:
            raise PreconditionError(
                f"there is no claim called {name!r}",
                f"claims: {', '.join(claim.id for claim in claims)}",
                "pass one of these to --require",
            )
    targets = [open_run(name, args.published) for name in run_names(args.published)]
    targets += [open_run(name, args.runs) for name in args.run]
    ours = measured(targets)
    judged = findings(claims, ours)
    for one in impossible(ours):
        print(
            f"not counted, faster than its hardware can be: {one} (run {one.run})", file=sys.stderr
        )
    if args.format == "json":
        json.dump([finding.columns() for finding in judged], sys.stdout, indent=2)
        print()
    elif args.format == "markdown":
        print(markdown(judged), end="")
    else:
        show(judged)
    verdicts = {finding.claim.id: finding.verdict for finding in judged}
    missed = [(wanted, name) for wanted, name in args.require if verdicts[name] != wanted]
    for wanted, name in missed:
        print(f"required {wanted}: {name}, but it is {verdicts[name]}", file=sys.stderr)
    return EXIT_FAILED if missed else EXIT_OK


def coverage(form: str, out: Path | None) -> int:
    """How often the modelled ranges hold what is published; exit code 4 if a floor does not."""
    from bench.limits import coverage as library

    claims = library.published()
    lines = library.held(claims)
    if form == "json":
        json.dump(library.as_json(claims, lines), sys.stdout, indent=2)
        print()
    elif form == "markdown":
        print(library.markdown(claims, lines), end="")
    else:
        library.show(claims, lines)
    if out is not None:
        from bench.show.canvas import save
        from bench.show.coverage import figure

        for file in save(figure(lines), out):
            print(file, file=sys.stderr)
    below = any(line.state == library.BELOW for line in lines)
    return EXIT_FAILED if below else EXIT_OK
