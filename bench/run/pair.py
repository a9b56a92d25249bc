"""Two cells, interleaved, for the ratio of their latencies: planned, gone on with, measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.base import stage_parts
from backends.pipeline.recipe import MODES
from bench.rows.cell import Cell
from bench.rows.store import Run, create_run, open_run
from bench.run.estimate import Estimate, Past, duration_text, estimate, load_s, past, survey
from bench.run.orders import BASE, HEAD, SIDES, alternating
from bench.run.plan import Plan, plan
from bench.run.progress import Display
from bench.run.request import SINGLE, Request
from bench.run.resume import open_pair, refuse_changes, reopen, unfinished
from bench.run.runner import Runner, Side, sigterm_as_ctrl_c
from core.errors import PreconditionError
from export.cost import part_cost, part_cost_at
from export.models import CONTEXT_PART


@dataclass(frozen=True)
class PairPlan:
    """The plans of base and head, what their headers say of the pair, and their runs.

    Attributes:
        said: the header's `versus` of each side.
        runs: of a pair that is gone on with; empty for a new one.
    """

    plans: tuple[Plan, ...]
    said: tuple[Mapping[str, Any], ...]
    runs: tuple[Run, ...] = ()


def planned(requests: Sequence[Request], said: Sequence[Mapping[str, Any]]) -> PairPlan:
    """The plans of base and head.

    Args:
        said: what else the header of each side says of the pair.

    Raises:
        PreconditionError: a side is more than one cell where it must not be, or both are the same.
    """
    plans = tuple(plan(request) for request in requests)
    for side, chosen in enumerate(plans):
        cells = chosen.cells
        if len({cell.group for cell in cells}) > 1 or (side == BASE and len(cells) > 1):
            raise PreconditionError(
                f"--{SIDES[side]} names {len(cells)} cells",
                "the base is one cell; those of the head may differ in steps only",
                "run `addbench versus` once for each of them",
            )
    same = {*plans[BASE].cells} & {*plans[HEAD].cells}
    if same:
        raise PreconditionError(
            f"base and head are the same cell: {same.pop()}",
            "a ratio of a cell to itself says nothing",
            "for two revisions of the code use `addbench ab`",
        )
    words = tuple(
        {"side": SIDES[side], **said[side], "gflop": gflop(chosen)}
        for side, chosen in enumerate(plans)
    )
    return PairPlan(plans, words)


def gflop(side: Plan) -> dict[str, float]:
    """GFLOP of one call: of the text stage, of each UNet evaluation of its images, of decoding and,
    with it, of encoding the picture that they start from.

    Counted in the bundle's graphs, or from the architecture of one that has none, at the batch of
    the side's cells. Guidance encodes an empty prompt too, unless the model takes zeros for it.
    """
    cell, bundle = side.cells[0], side.bundle
    prompts = 2 if cell.guidance_mode in MODES and not bundle.force_zeros else 1
    checkpoint = None if bundle.has_graphs else bundle.checkpoint()
    costs = {"text": 0.0, "unet": 0.0, "decode": 0.0}
    backend = side.candidate(cell).backend
    parts = tuple(bundle.parts) if backend is None else backend.parts(bundle)
    forms = {CONTEXT_PART: "output", "unet": "input"} if CONTEXT_PART in parts else {}
    for part in stage_parts(parts, cell.decoder, cell.encoder or None):
        once = dict.fromkeys((f"{cell.decoder}_decoder", f"{cell.encoder}_encoder"), "decode")
        stage = {"unet": "unet", **once}.get(part, "text")
        times = prompts if stage == "text" else 1
        if part == CONTEXT_PART and cell.guidance_mode in MODES:
            times = 2  # of zeros too
        cost = (
            part_cost_at(checkpoint, part, cell.batch, *bundle.size, bundle.dtype)
            if checkpoint
            else part_cost(bundle.source(part).graph, cell.batch, forms.get(part, "inline"))
        )
        costs[stage] += times * cost.flops / 1e9
    return {stage: round(value, 3) for stage, value in costs.items()}


def reopened(name: str, runs: Path, given: Sequence[Mapping[str, Any]]) -> PairPlan:
    """What is left of an earlier pair, if nothing that its rows share has changed since.

    Args:
        given: the axes of each side that are asked for now; empty where they are not.
    """
    pair = open_pair(name, runs)
    left = [unfinished(run) for run in pair]
    plans: list[Plan] = []
    for run, work, asked in zip(pair, left, given, strict=True):
        if not any(left):
            break
        try:
            rest = reopen(run, asked)
        except PreconditionError as error:
            if asked:
                raise
            again = "pass --base and --head as before: a run keeps no path of a bundle"
            raise PreconditionError(error.what, error.why, again) from error
        refuse_changes(run.name, [("the plan", tuple(run.plan), rest.cells)])
        plans.append(replace(rest, rest=tuple(work)))
    return PairPlan(tuple(plans), tuple(run.header.versus or {} for run in pair), tuple(pair))


def with_methods(pair: PairPlan, known: Past, long_call_s: float) -> PairPlan:
    """The pair with a side as one sample whose longest call is expected to take so long."""

    def call_s(side: Plan, cell: Cell) -> float:
        if cell in known.rows:
            return float(known.rows[cell]["median_ms"]) / 1e3
        return guess(side, cell, known, single=True).seconds / 2  # cold call and sample

    plans = tuple(
        replace(side, method=SINGLE)
        if max(call_s(side, cell) for cell in side.cells) > long_call_s
        else side
        for side in pair.plans
    )
    return replace(pair, plans=plans)


def guess(side: Plan, cell: Cell, known: Past, *, single: bool = False) -> Estimate:
    rule = SINGLE.rule if single else side.method.rule
    return estimate(cell, rule, known.rows, side.roofline or known.roofline)


def describe(pair: PairPlan, runs: Path, long_call_s: float) -> None:
    """Print what would be measured and how long that takes."""
    if not pair.plans:
        print("nothing is left to measure")
        return
    known = past(runs, pair.plans[HEAD])
    if not pair.runs:
        pair = with_methods(pair, known, long_call_s)
    seconds, bound = 0.0, False
    for turn in order(pair):
        side = pair.plans[turn.side]
        seconds += load_s(turn.cells, known.rows)
        for cell in turn.cells:
            each, kind = guess(side, cell, known), ""
            if side.method == SINGLE:  # its first call has one step
                each = replace(each, seconds=each.seconds * (1 + 1 / cell.steps) / 2)
                kind = ", one sample"
            seconds, bound = seconds + each.seconds, bound or each.bound
            print(
                f"  {SIDES[turn.side]} round {turn.round + 1}{kind}: {cell.model} {cell}:"
                f" {each.words} ({each.source})"
            )
    least = "at least" if bound else "about"
    print(f"{least} {duration_text(seconds)} in all, not measured now")


def order(pair: PairPlan) -> list[Any]:
    """The turns that are left, in the order of measurement."""
    return alternating(
        [side.method.rounds for side in pair.plans], [side.work for side in pair.plans]
    )


def measure(
    pair: PairPlan,
    runs: Path,
    command: Sequence[str],
    *,
    long_call_s: float,
    timeout_s: float,
    budget_s: float | None = None,
) -> list[Run]:
    """Measure what is left, every row on disk as it comes; the two runs.

    Args:
        runs: the folder that new runs are made in.
        command: what was typed, for the headers.
        long_call_s: a side whose call is expected to take longer is one sample.
    """
    if not pair.plans:
        return list(pair.runs)
    with sigterm_as_ctrl_c():
        started = time.monotonic()
        if not pair.runs:
            plans = tuple(replace(side, roofline=survey(side)) for side in pair.plans)
            pair = with_methods(replace(pair, plans=plans), past(runs, plans[HEAD]), long_call_s)
            base = create_run(runs, pair.plans[BASE].header(command, versus=pair.said[BASE]))
            said = {**pair.said[HEAD], "base": base.name}
            # The head's run, which names the base's, is the latest.
            head = create_run(runs, pair.plans[HEAD].header(command, versus=said))
            pair = replace(pair, runs=(base, head))
        turns = order(pair)
        sides = [Side(*both) for both in zip(pair.plans, pair.runs, SIDES, strict=True)]
        go_on = f"go on with addbench versus --resume {pair.runs[HEAD].argument}"
        left_s = None if budget_s is None else budget_s - (time.monotonic() - started)
        display = Display(sum(len(turn.cells) for turn in turns), 1)
        with Runner(sides, display, timeout_s=timeout_s, budget_s=left_s, go_on=go_on) as runner:
            if runner.measure(turns):
                display.say(f"the budget of {duration_text(budget_s or 0)} is spent; {go_on}")
        return [open_run(run.name, run.path.parent) for run in pair.runs]
