"""`addbench gates`: what a change must not alter unseen, and no clock is needed for.

UNet evaluations of an image, ONNX operators of every part, bytes of the bundle, parity with torch,
columns of the rows: counted on the default model's bundle and held against a small golden file. A
change that means to alter one of them regenerates the file with --update and shows the difference
in review. Exit code 4 if something differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from core.cli import Parser, add_model_arguments
from core.errors import EXIT_FAILED, EXIT_OK, PreconditionError
from core.files import ROOT, read_json, write_json
from export.models import DEFAULT_MODEL

GOLDEN = ROOT / "tests" / "golden" / "gates.json"
UPDATE = "addbench gates --update"


def parser() -> Parser:
    top = Parser(
        prog="addbench gates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(top, DEFAULT_MODEL)
    what = top.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="the default: 4 if something differs")
    what.add_argument("--update", action="store_true", help="write the golden file anew")
    top.add_argument(
        "--golden", type=Path, default=GOLDEN, metavar="FILE", help="(tests/golden/gates.json)"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not args.update and not args.golden.exists():
        raise PreconditionError(
            f"there is no golden file {args.golden.name}",
            f"{args.golden} is what the gates are held against",
            UPDATE,
        )
    from bench.verdict.gates import differences, facts, flat
    from export.bundle import find_bundle

    golden = read_json(args.golden) if args.golden.exists() else {}
    counted = facts(find_bundle(args.model, args.weights, args.dtype))
    lines = differences(golden, counted)
    for line in lines:
        print(line)
    if args.update:
        write_json(args.golden, counted)
        print(f"written: {args.golden}, {len(lines)} differences")
        return EXIT_OK
    if lines:
        print(f"{len(lines)} differences; if they are meant: {UPDATE}")
        return EXIT_FAILED
    print(f"gates hold: {len(list(flat(counted)))} figures as in {args.golden.name}")
    return EXIT_OK
