"""`addbench load`: how a pipeline or a server holds under load, by MLPerf's load generator.

single-stream  one request after the other: the latency that one user sees
offline        as many as there are at once: pictures a second
server         requests arrive at random (Poisson) at --rate: latency counts from the arrival that
               was planned, so a server that falls behind cannot hide it
typists        people who type into /live: from key to picture, over a server only

--find-peak looks for the highest rate of `server` whose 99th percentile stays below the limit.
LoadGen runs in a process of its own, which is stopped, not asked, when it hangs. Every request is
kept beside LoadGen's own logs, and the two must agree within 1%.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from core.cli import (
    Parser,
    add_backend_argument,
    add_model_arguments,
    add_runs_argument,
    count,
    duration,
)
from core.errors import EXIT_FAILED, EXIT_OK, PreconditionError
from export.models import DEFAULT_MODEL

SCENARIOS = ("single-stream", "offline", "server", "typists")


def parser() -> Parser:
    top = Parser(
        prog="addbench load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("scenario", choices=SCENARIOS)
    top.add_argument(
        "--sut", default="pipeline", metavar="pipeline|URL",
        help="what is under load: a pipeline in the generator's process, or a server of ours, as"
        " http://127.0.0.1:8000 (pipeline)",
    )  # fmt: skip
    add_model_arguments(top, DEFAULT_MODEL)
    add_backend_argument(top)
    top.add_argument("--decoder", default=None, metavar="vae|taesd", help="(the best there is)")
    top.add_argument("--steps", type=count, default=None, metavar="N", help="(the model's own)")
    top.add_argument("--rate", type=rate, metavar="N", help="requests a second of `server`")
    top.add_argument("--find-peak", action="store_true", help="look for the highest valid rate")
    top.add_argument(
        "--limit", type=milliseconds, metavar="MS",
        help="of the 99th percentile in `server` (5 times the 90th of single-stream)",
    )  # fmt: skip
    top.add_argument(
        "--for", type=duration, default=60.0, dest="seconds", metavar="TIME",
        help="how long one measurement lasts at least; MLPerf's own is 10m (60s)",
    )  # fmt: skip
    top.add_argument("--requests", type=count, default=100, metavar="N", help="at least (100)")
    top.add_argument("--typists", type=count, default=1, metavar="N", help="(1)")
    top.add_argument("--keys", type=count, default=300, metavar="N", help="of each typist (300)")
    top.add_argument(
        "--gap", type=milliseconds, default=0.12, metavar="MS", help="between keys, mean (120)"
    )
    top.add_argument(
        "--remote", action="store_true", help="the server is another machine's, and yours to load"
    )
    add_runs_argument(top)
    return top


def rate(text: str) -> float:
    return positive(text, "a number of requests a second", 1.0)


def milliseconds(text: str) -> float:
    """`120` -> 0.12 seconds."""
    return positive(text, "a number of milliseconds", 1e-3)


def positive(text: str, what: str, unit: float) -> float:
    try:
        value = float(text) * unit
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    over_http = args.sut != "pipeline"
    if args.scenario == "typists" and not over_http:
        raise PreconditionError(
            "typists need a server", "they type into its /live",
            "start one (addbench serve) and pass --sut http://127.0.0.1:8000",
        )  # fmt: skip
    if (args.rate is not None) + args.find_peak != (args.scenario == "server"):
        raise PreconditionError(
            "--rate and --find-peak do not fit" if args.rate or args.find_peak
            else "there is no rate",
            "`server` has a rate, or looks for one with --find-peak; the others have neither",
            "addbench load server --rate 20, or addbench load server --find-peak",
        )  # fmt: skip

    from bench.traffic.run import Load, measure

    done = measure(
        Load(
            scenario=args.scenario,
            sut=args.sut,
            model=args.model,
            weights=args.weights,
            dtype=args.dtype,
            backend=args.backend,
            decoder=args.decoder,
            steps=args.steps,
            rate=args.rate,
            limit_s=args.limit,
            seconds=args.seconds,
            requests=args.requests,
            typists=args.typists,
            keys=args.keys,
            gap_s=args.gap,
        ),
        Path(args.runs),
        ["addbench", "load", *(sys.argv[1:] if argv is None else argv)],
        remote=args.remote,
    )
    return EXIT_OK if done else EXIT_FAILED
