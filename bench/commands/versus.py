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
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench.rows.cell import Cell
from bench.rows.store import LATEST, RUNS, Row, RowWriter, Run, create_run
from bench.run.arguments import calls, count, positive, shown
from bench.run.measure import StopRule
from bench.run.orders import BASE, HEAD
from bench.run.plan import Settings
from bench.sweep import Sweep, duration, interrupt
from bench.verdict.pairs import PAIRS, sweep_arguments
from bench.verdict.ratio import schedule
from core.cli import Parser, add_format_argument, run
from core.errors import EXIT_OK, PreconditionError
from export.models import CONTEXT_PART, MODELS

if TYPE_CHECKING:
    from bench.run.plan import Estimate

NAMES = ("base", "head")
METHOD = {"rounds": 6, "min_samples": 1, "min_time": 2.0, "max_time": 60.0, "warmup": 1}
"""Rounds are independent, samples of one process are not: many rounds of few samples."""
LONG_CALL_S = 100.0
SINGLE = Settings(StopRule(min_samples=1, min_time=0.0, max_time=1e6, warmup=0), rounds=1)
"""How a side is measured whose call takes minutes: one sample after a one-step call."""


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
    how.add_argument("--rounds", type=count, help="fresh processes a side, 5 at least (6)")
    how.add_argument("--min-samples", type=count, help="samples a round, at least (1)")
    how.add_argument("--min-time", type=positive, metavar="S", help="sampling a round (2)")
    how.add_argument("--max-time", type=positive, metavar="S", help="wins from 3 samples on (60)")
    how.add_argument("--warmup", type=calls, metavar="N", help="calls after the cold one (1)")
    how.add_argument(
        "--long-call", type=positive, metavar="S",
        help="a side whose call is expected to take longer is one sample (100)",
    )  # fmt: skip
    how.add_argument(
        "--budget", type=positive, metavar="MINUTES", help="stop measuring then; --resume goes on"
    )
    how.add_argument(
        "--timeout", type=positive, default=7200.0, metavar="S", help="per load and cell (7200)"
    )
    where = top.add_argument_group("where")
    where.add_argument("--out", type=Path, default=RUNS, help="runs land below it (results/runs)")
    where.add_argument(
        "--resume", nargs="?", const=LATEST, metavar="RUN|latest", help="the head's run"
    )
    where.add_argument("--dry-run", action="store_true", help="print the plan and its time")
    add_format_argument(where)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    from bench.verdict.speedup import result, show

    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(arguments)
    check_arguments(args)
    with redirect_stdout(sys.stderr):  # progress: stdout is the result
        versus = reopened(args, arguments) if args.resume else planned(args, arguments)
    if args.dry_run:
        return versus.describe()
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with redirect_stdout(sys.stderr):
            base, head = versus.run(args.timeout, args.budget)
    finally:
        signal.signal(signal.SIGTERM, before)
    found = result(base, head)
    show(found, args.format)
    return found.exit_code


def check_arguments(args: argparse.Namespace) -> None:
    from bench.verdict.rules import PAIR_ROUNDS

    method = [name for name in (*METHOD, "long_call") if getattr(args, name) is not None]
    if args.resume and (method or args.pair):
        flag = f"--{(method or ['pair'])[0].replace('_', '-')}"
        raise PreconditionError(
            f"{flag} with --resume", "a pair keeps the settings it began with", f"drop {flag}"
        )
    if bool(args.base) != bool(args.head) or bool(args.pair) + bool(args.base) > 1:
        raise PreconditionError(
            "it is not said which two cells to compare",
            "--base and --head belong together, and --pair stands for both",
            f"pass --base and --head, or --pair with one of: {', '.join(PAIRS)}",
        )
    if not (args.pair or args.base or args.resume):
        raise PreconditionError(
            "there is nothing to compare",
            "neither --pair nor --base and --head is given",
            f"pass --base and --head, or --pair with one of: {', '.join(PAIRS)}",
        )
    if args.rounds is not None and args.rounds < PAIR_ROUNDS:
        raise PreconditionError(
            f"--rounds {args.rounds} is too few",
            f"an interval needs {PAIR_ROUNDS} alternating rounds",
            f"use --rounds {METHOD['rounds']}",
        )


def specs_of(args: argparse.Namespace) -> tuple[str, str]:
    pair = PAIRS.get(args.pair)
    return (pair.base, pair.head) if pair else (args.base, args.head)


# ---- planning


def side_arguments(spec: str, args: argparse.Namespace) -> list[str]:
    """One side as arguments of `addbench sweep`, the model's own step count where none is given."""
    usual = {name: getattr(args, name) for name in ("backend", "weights", "dtype")}
    usual = {"decoder": "vae", **{name: value for name, value in usual.items() if value}}
    found = sweep_arguments(spec, usual)
    if "--steps" not in found:
        from export.bundle import find_bundle

        model = found[1]
        own = MODELS[model].steps if model in MODELS else find_bundle(model).steps
        found += ["--steps", str(own)]
    return found


def side_plan(
    side: int, words: Sequence[str], args: argparse.Namespace, arguments: Sequence[str]
) -> Sweep:
    """A sweep of one side's cells, as `addbench sweep` plans it from `words`."""
    from bench import sweep
    from bench.run import arguments as options

    try:
        asked = options.parser().parse_args(list(words))
    except PreconditionError as error:
        raise PreconditionError(
            f"--{NAMES[side]}: {error.what.removeprefix('addbench sweep: ')}",
            "its keys are the axes of `addbench sweep`",
            "addbench sweep --help",
        ) from error
    for name, usual in METHOD.items():
        given = getattr(args, name)
        setattr(asked, name, usual if given is None else given)
    asked.out = args.out
    made = sweep.plan_new(asked, [])
    command = ["python", "-m", "bench.commands.versus", *shown(arguments)]
    made.header = replace(made.header, command=command)
    cells = cells_of(made)
    if len({cell.group for cell in cells}) > 1 or (side == BASE and len(cells) > 1):
        raise PreconditionError(
            f"--{NAMES[side]} names {len(cells)} cells",
            "the base is one cell; those of the head may differ in steps only",
            "run bench.commands.versus once for each of them",
        )
    return made


def cells_of(side: Sweep) -> list[Cell]:
    return list(side.header.plan)


def planned(args: argparse.Namespace, arguments: Sequence[str]) -> Versus:
    words = [side_arguments(spec, args) for spec in specs_of(args)]
    sides = [side_plan(side, words[side], args, arguments) for side in (BASE, HEAD)]
    same = set(cells_of(sides[BASE])) & set(cells_of(sides[HEAD]))
    if same:
        raise PreconditionError(
            f"base and head are the same cell: {same.pop()}",
            "a ratio of a cell to itself says nothing",
            "for two revisions of the code use `addbench ab`",
        )
    for side, sweep in enumerate(sides):
        about = {
            "side": NAMES[side],
            "pair": args.pair,
            "arguments": shown(words[side]),
            "gflop": gflop(sweep),
        }
        sweep.header = replace(sweep.header, versus=about)
    made = Versus(sides)
    made.choose(args.long_call or LONG_CALL_S, survey=not args.dry_run)
    return made


def gflop(side: Sweep) -> dict[str, float]:
    """GFLOP of one call: of the text stage, of each UNet evaluation of its images, of decoding.

    Counted in the bundle's graphs, or from the architecture of one that has none, at the batch of
    the side's cells. Guidance encodes an empty prompt too, unless the model takes zeros for it.
    """
    from backends.base import stage_parts
    from backends.pipeline.recipe import MODES
    from export.cost import part_cost, part_cost_at

    cell, bundle = cells_of(side)[0], side.bundle
    prompts = 2 if cell.guidance_mode in MODES and not bundle.force_zeros else 1
    checkpoint = None if bundle.has_graphs else bundle.checkpoint()
    found = {"text": 0.0, "unet": 0.0, "decode": 0.0}
    backend = side.candidates[cell.backend_text].backend
    parts = tuple(bundle.parts) if backend is None else backend.parts(bundle)
    forms = {CONTEXT_PART: "output", "unet": "input"} if CONTEXT_PART in parts else {}
    for part in stage_parts(parts, cell.decoder):
        stage = {"unet": "unet", f"{cell.decoder}_decoder": "decode"}.get(part, "text")
        times = prompts if stage == "text" else 1
        if part == CONTEXT_PART and cell.guidance_mode in MODES:
            times = 2  # of zeros too
        cost = (
            part_cost_at(checkpoint, part, cell.batch, *bundle.size, bundle.dtype)
            if checkpoint
            else part_cost(bundle.source(part).graph, cell.batch, forms.get(part, "inline"))
        )
        found[stage] += times * cost.flops / 1e9
    return {stage: round(value, 3) for stage, value in found.items()}


# ---- resuming


def reopened(args: argparse.Namespace, arguments: Sequence[str]) -> Versus:
    """What is left of an earlier pair, if nothing that its rows share has changed since."""
    from bench.run.resume import open_pair, refuse_changes, unfinished

    runs = open_pair(args.resume, args.out)
    left = [unfinished(target) for target in runs]
    if not any(left):
        return Versus([], runs)
    words = [(target.header.versus or {})["arguments"] for target in runs]
    if args.base:
        words = [side_arguments(spec, args) for spec in specs_of(args)]
    try:
        sides = [side_plan(side, words[side], args, arguments) for side in (BASE, HEAD)]
    except PreconditionError as error:
        if args.base:
            raise
        again = "pass --base and --head as before: a run keeps no path of a bundle"
        raise PreconditionError(error.what, error.why, again) from error
    for side, target, work in zip(sides, runs, left, strict=True):
        was, now = target.header, side.header
        refuse_changes(
            target.name,
            [
                ("the bundle's hash", was.bundle["hash"][:12], now.bundle["hash"][:12]),
                ("the plan", was.plan, now.plan),
                *(
                    (f"the {name}", was.environment[name], now.environment[name])
                    for name in ("machine", "versions")
                ),
            ],
        )
        side.header, side.settings = was, Settings.of(was.settings)
        side.work = work
    return Versus(sides, runs)


# ---- measuring


class Versus:
    """Two sweeps of a group of cells each, and the runs that their rows go to."""

    def __init__(self, sides: Sequence[Sweep], runs: Sequence[Run] = ()) -> None:
        self.sides, self.runs = sides, list(runs)
        self.history: Mapping[Cell, Row] = {}
        if sides:
            from bench.run.plan import past_rows

            self.history = past_rows(sides[0].out, sides[0].header.environment["machine"])

    def choose(self, long_call_s: float, *, survey: bool) -> None:
        """Measure the ceilings, and make a side one sample whose longest call is expected to take
        longer than `long_call_s`. `survey`: even where earlier rows say how long it takes."""
        for side in self.sides:
            cells = cells_of(side)
            if survey or any(cell not in self.history for cell in cells):
                side.header = replace(side.header, roofline=side.survey())
            if max(self.call_s(side, cell) for cell in cells) > long_call_s:
                side.settings, side.work = SINGLE, [(cell, 0) for cell in cells]
                side.header = replace(side.header, settings=SINGLE.columns())

    def call_s(self, side: Sweep, cell: Cell) -> float:
        """Seconds of a call, expected."""
        if cell in self.history:
            return float(self.history[cell]["median_ms"]) / 1e3
        return self.guess(side, cell, SINGLE).seconds / 2  # cold call and sample

    def guess(self, side: Sweep, cell: Cell, settings: Settings) -> Estimate:
        from bench.run.plan import estimate

        return estimate(cell, settings.rule, self.history, side.header.roofline)

    def order(self) -> list[tuple[int, int, list[Cell]]]:
        """(side, round, its cells) of what is left, in the order of measurement."""
        rounds = [side.settings.rounds for side in self.sides]
        found = [
            (side, round_, [cell for cell, one in self.sides[side].work if one == round_])
            for side, round_ in (schedule(*rounds) if rounds else [])
        ]
        return [(side, round_, cells) for side, round_, cells in found if cells]

    def describe(self) -> int:
        """What would be measured and how long that takes."""
        from bench.run.plan import load_s

        total, least = 0.0, "about"
        for side, round_, cells in self.order():
            sweep = self.sides[side]
            total += load_s(cells, self.history)
            for cell in cells:
                found = self.guess(sweep, cell, sweep.settings)
                seconds, kind = found.seconds, ""
                if sweep.settings == SINGLE:  # its first call has one step
                    seconds, kind = seconds * (1 + 1 / cell.steps) / 2, ", one sample"
                total += seconds
                least = "at least" if found.bound else least
                print(
                    f"  {NAMES[side]} round {round_ + 1}{kind}: {cell.model} {cell}:"
                    f" {'at least' if found.bound else 'about'} {duration(seconds)}"
                    f" ({found.source})"
                )
        print(f"{least} {duration(total)} in all, not measured now")
        return EXIT_OK

    def run(self, timeout_s: float, budget_min: float | None) -> list[Run]:
        """Measure what is left, every row on disk as it comes; the two runs."""
        from bench.run.progress import Display
        from bench.run.spawn import BudgetSpentError, Limits

        order = self.order()
        if not order:
            return self.runs
        if not self.runs:
            self.create()
        deadline = None if budget_min is None else time.monotonic() + 60 * budget_min
        limits = Limits(timeout_s, deadline)
        with ExitStack() as stack:
            writers = [stack.enter_context(RowWriter(target.path)) for target in self.runs]
            display = stack.enter_context(Display(sum(len(cells) for *_, cells in order), 1))
            go_on = f"go on with --resume {self.runs[HEAD].name}"
            try:
                for side, round_, cells in order:
                    display.say(f"{NAMES[side]}, round {round_ + 1}: {cells[0].model}")
                    self.sides[side].measure(
                        self.runs[side], round_, cells, limits, writers[side], display
                    )
            except BudgetSpentError:
                display.say(f"the budget of {budget_min:g} min is spent; {go_on}")
            except KeyboardInterrupt:
                display.say(f"interrupted: {display.done} rows are kept; {go_on}")
                raise
        return self.runs

    def create(self) -> None:
        """A run for each side; the head's, which names the base's, is the latest."""
        base, head = self.sides
        self.runs = [create_run(base.out, base.header)]
        about = {**(head.header.versus or {}), "base": self.runs[BASE].name}
        self.runs.append(create_run(head.out, replace(head.header, versus=about)))


if __name__ == "__main__":
    raise SystemExit(run(main))
