"""`addbench harness`: what the toolkit itself costs.

overhead    what pipeline and harness add to a bare loop over the same sessions, in one process and
            in blocks of alternating order; exit code 4 if the harness adds more than 1%
loading     what the artifact cache saves when ONNX Runtime loads a part, in fresh processes:
            cold, uncached, warm (from disk) and again (from memory)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from core.cli import (
    Parser,
    add_backend_argument,
    add_cell_arguments,
    add_model_arguments,
    add_out_argument,
    count,
)
from core.errors import EXIT_FAILED, EXIT_OK, PreconditionError
from core.files import write_json
from export.models import DEFAULT_MODEL


def parser() -> Parser:
    top = Parser(
        prog="addbench harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = top.add_subparsers(dest="what", metavar="overhead|loading", required=True)
    overhead = what.add_parser("overhead", help="against a bare loop over the same sessions")
    add_model_arguments(overhead, DEFAULT_MODEL)
    add_backend_argument(overhead)
    add_cell_arguments(overhead, steps=1, batch=1, decoder="taesd")
    overhead.add_argument("--calls", type=count, default=20, help="calls of a block (20)")
    overhead.add_argument("--repeats", type=count, default=20, help="blocks of each way (20)")
    loading = what.add_parser("loading", help="with and without the artifact cache")
    add_model_arguments(loading, DEFAULT_MODEL)
    loading.add_argument("--part", default="unet", help="(unet)")
    loading.add_argument("--rounds", type=count, default=3, help="(3)")
    for each in (overhead, loading):
        add_out_argument(each, "FILE.json", "write the figures there")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    record = overhead(args) if args.what == "overhead" else loading(args)
    if args.out:
        write_json(args.out, record)
        print(f"written to {args.out}")
    return EXIT_OK if record.get("within", True) else EXIT_FAILED


def overhead(args: argparse.Namespace) -> dict[str, object]:
    for flag, given in (("--calls", args.calls), ("--repeats", args.repeats)):
        if given < 2:
            raise PreconditionError(
                f"{flag} {given} is less than 2",
                "one call is the cold one, and quartiles need two repeats",
                f"use {flag} 20",
            )
    from backends.load import load_pipeline
    from bench.harness.overhead import compare_ways, record_text

    with load_pipeline(
        args.model, args.backend, args.decoder,
        batch=args.batch, weights=args.weights, dtype=args.dtype,
    ) as pipe:  # fmt: skip
        record = compare_ways(pipe, args.batch, args.steps, args.calls, args.repeats)
    print(record_text(record))
    return record


def loading(args: argparse.Namespace) -> dict[str, object]:
    from bench.harness.loading import compare_ways
    from export.bundle import find_bundle

    bundle = find_bundle(args.model, args.weights, args.dtype)
    return compare_ways(bundle, args.part, args.rounds, lambda line: print(line, flush=True))
