"""`addbench harness`: what the toolkit itself costs.

overhead    what pipeline and harness add to a bare loop over the same sessions, in one process and
            in blocks of alternating order; exit code 4 if the harness adds more than 1%
loading     what the artifact cache saves when ONNX Runtime loads a part, in fresh processes:
            cold, uncached, warm (from disk) and again (from memory)
fleet       whether cells measured through a fleet's engine are those of a process of this machine,
            in alternating rounds, and what a group takes longer; exit code 4 for more than 2 s, or
            where the samples differ
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench.commands.arguments import (
    add_axis_arguments,
    add_method_arguments,
    positive,
    request_of,
)
from bench.run.request import AB
from core.cli import (
    Parser,
    add_backend_argument,
    add_cell_arguments,
    add_model_arguments,
    add_out_argument,
    add_runs_argument,
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
    what = top.add_subparsers(dest="what", metavar="overhead|loading|fleet", required=True)
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
    fleet = what.add_parser("fleet", help="through a fleet's engine and without")
    add_axis_arguments(fleet)
    add_method_arguments(fleet.add_argument_group("how to measure"), AB, f"{AB.rounds}")
    fleet.add_argument("--fleet", default="auto", metavar="ADDRESS", help="(auto)")
    fleet.add_argument("--on", metavar="KEY=VALUE,...", help="this machine, in the fleet")
    fleet.add_argument("--timeout", type=positive, default=1800.0, metavar="S", help="(1800)")
    add_runs_argument(fleet)
    for each in (overhead, loading, fleet):
        add_out_argument(each, "FILE.json", "write the figures there")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    record = {"overhead": overhead, "loading": loading, "fleet": fleet}[args.what](args)
    if args.out:
        write_json(args.out, record)
        print(f"written to {args.out}")
    return EXIT_OK if record.get("within", True) else EXIT_FAILED


def fleet(args: argparse.Namespace) -> dict[str, object]:
    from bench.fleet.engines import fleet_at
    from bench.fleet.protocol import select
    from bench.harness.through_fleet import compare_ways
    from bench.verdict.outcome import show
    from bench.verdict.rules import PAIR_SLOWDOWN

    engine = fleet_at(args.fleet)
    try:
        machines = select(engine.machines(), args.on)
        if len(machines) > 1:
            raise PreconditionError(
                f"{len(machines)} machines fit, and one is this one",
                f"they are {', '.join(machine.name for machine in machines)}",
                "choose it with --on",
            )
        outcome, record = compare_ways(
            engine, machines[0], request_of(args, AB), args.runs, ["addbench", "harness", "fleet"],
            max_slowdown=PAIR_SLOWDOWN, timeout_s=args.timeout,
        )  # fmt: skip
    finally:
        engine.close()
    show(outcome, "table")
    return record


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
