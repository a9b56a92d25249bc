"""`addbench versus --base "sd15 steps=20" --head "sdxl-turbo steps=1"`: how many times faster?

Measures two cells, of two models or of one, interleaved in fresh processes, and gives the ratio of
their latencies with its interval; beside it what their FLOPs alone would predict (modelled), and
for a ready-made --pair what was published, with its hardware. A side whose call takes minutes is
one sample, warmed up by a one-step call; the spread of its steps gives the interval.

Each side is a run of its own; --resume the head's finishes what was killed or failed, and shows
the figures of a finished pair again.

Exit code 0: every ratio has an interval. 4: cells failed or are missing. 5: a ratio has none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from bench.commands.arguments import (
    METHOD,
    add_limit_arguments,
    add_method_arguments,
    add_runs_arguments,
    axes_of_keys,
    keys_of,
    method_of,
    positive,
)
from bench.rows.store import LATEST, portable
from bench.run.request import PAIR, Request
from bench.verdict.pairs import PAIRS
from core.cli import Parser, add_format_argument
from core.errors import EXIT_OK, PreconditionError
from export.models import MODELS

SIDES = ("base", "head")
LONG_CALL_S = 100.0
COMMAND = ("addbench", "versus")


def parser() -> Parser:
    top = Parser(
        prog="addbench versus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = top.add_argument_group("what to compare")
    what.add_argument(
        "--pair", choices=tuple(PAIRS),
        help="; ".join(f"{name}: {pair.title}" for name, pair in PAIRS.items()),
    )  # fmt: skip
    what.add_argument(
        "--base", metavar='"MODEL key=value ..."',
        help="one cell; keys are the axes of `sweep`: steps (the model's own), decoder (vae),"
        " batch, size, backend, weights, ...",
    )  # fmt: skip
    what.add_argument("--head", metavar='"MODEL key=value ..."', help="the same; steps=1,2,4 too")
    what.add_argument("--backend", metavar="NAME[:KEY=VALUE,...]", help="of both sides (ort)")
    what.add_argument("--weights", metavar="hub|random|folder", help="of both sides")
    what.add_argument("--dtype", choices=("fp16", "fp32"), help="of both sides")
    how = top.add_argument_group("how to measure")
    add_method_arguments(how, PAIR, f"{PAIR.rounds}, of each side; 5 at least")
    how.add_argument(
        "--long-call", type=positive, metavar="S",
        help="a side whose call is expected to take longer is one sample (100)",
    )  # fmt: skip
    add_limit_arguments(how, bare="m", usual=None, timeout_s=7200.0)
    where = add_runs_arguments(top)
    where.add_argument(
        "--resume", nargs="?", const=LATEST, metavar="RUN|latest", help="the head's run"
    )
    where.add_argument("--dry-run", action="store_true", help="print the plan and its time")
    add_format_argument(where)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(arguments)
    check_arguments(args)

    from bench.run import pair
    from bench.verdict.speedup import result, show

    long_call_s = args.long_call or LONG_CALL_S
    with redirect_stdout(sys.stderr):  # progress: stdout is the result
        keys = keys_of_sides(args)
        if args.resume:
            both = pair.reopened(args.resume, args.runs, [axes_of_keys(each) for each in keys])
        else:
            method = PAIR.but(**method_of(args))
            requests = [Request(**axes_of_keys(each), method=method) for each in keys]
            both = pair.planned(requests, [said(args, each) for each in keys])
    if args.dry_run:
        pair.describe(both, args.runs, long_call_s)
        return EXIT_OK
    with redirect_stdout(sys.stderr):
        base, head = pair.measure(
            both,
            args.runs,
            [*COMMAND, *arguments],
            long_call_s=long_call_s,
            timeout_s=args.timeout,
            budget_s=args.budget,
        )
    speedup = result(base, head)
    show(speedup, args.format)
    return speedup.exit_code


def check_arguments(args: argparse.Namespace) -> None:
    from bench.verdict.rules import PAIR_ROUNDS

    given = [name for name in (*METHOD, "long_call") if getattr(args, name) is not None]
    if args.resume and (given or args.pair):
        flag = f"--{(given or ['pair'])[0].replace('_', '-')}"
        raise PreconditionError(
            f"{flag} with --resume", "a pair keeps the settings it began with", f"drop {flag}"
        )
    choices = f"pass --base and --head, or --pair with one of: {', '.join(PAIRS)}"
    if bool(args.base) != bool(args.head) or bool(args.pair) + bool(args.base) > 1:
        raise PreconditionError(
            "it is not said which two cells to compare",
            "--base and --head belong together, and --pair stands for both",
            choices,
        )
    if not (args.pair or args.base or args.resume):
        raise PreconditionError(
            "there is nothing to compare", "neither --pair nor --base and --head is given", choices
        )
    if args.rounds is not None and args.rounds < PAIR_ROUNDS:
        raise PreconditionError(
            f"--rounds {args.rounds} is too few",
            f"an interval needs {PAIR_ROUNDS} alternating rounds",
            f"use --rounds {PAIR.rounds}",
        )


def keys_of_sides(args: argparse.Namespace) -> list[dict[str, str]]:
    """The axes of base and head as texts; empty where a run is gone on with as it is.

    The model's own step count stands where none is given.
    """
    ready = PAIRS.get(args.pair)
    specs = (ready.base, ready.head) if ready else (args.base, args.head)
    usual = {"decoder": "vae"} | {
        name: value
        for name in ("backend", "weights", "dtype")
        if (value := getattr(args, name)) is not None
    }
    sides = []
    for side, spec in zip(SIDES, specs, strict=True):
        try:
            keys = keys_of(spec, usual) if spec else {}
        except PreconditionError as error:
            raise PreconditionError(f"--{side}: {error.what}", error.why, error.next) from error
        if keys:
            keys.setdefault("steps", str(own_steps(keys["model"])))
        sides.append(keys)
    return sides


def own_steps(model: str) -> int:
    """The step count that a model is made for."""
    from export.bundle import find_bundle

    return MODELS[model].steps if model in MODELS else find_bundle(model).steps


def said(args: argparse.Namespace, keys: dict[str, str]) -> dict[str, Any]:
    """What a side's header says of the pair: its name if it has one, and the flags of the cell."""
    flags = [piece for key, value in keys.items() for piece in (f"--{key}", portable(value))]
    return {"pair": args.pair, "arguments": flags}
