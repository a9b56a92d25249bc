"""How long a plan takes, from earlier rows of this machine, from floors, or at least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.limits.floors import call_floor_s, survey_apart
from bench.rows.cell import Cell
from bench.rows.store import Row, is_timed, open_run, run_names
from bench.run.measure import FEWEST_SAMPLES, LONG_CALL_S, StopRule
from bench.run.plan import Plan, groups
from bench.run.request import BY_TIME
from core.amounts import count_text
from core.errors import AddbenchError

WORKER_START_S = 5.0
"""Python, torch, diffusers and scikit-image, imported on two cores."""
TYPICAL_FRACTION = 0.6
"""The share of the floor that a CPU backend reaches over a whole call, roughly."""
JUDGE_S = 0.01
"""What the judge and the network of the FID take for a picture, roughly."""
SHORT_ROUND_S = 60.0
"""Where one round of all cells takes no longer, SEVERAL are measured unless told otherwise."""
SEVERAL = 5
"""Rounds that an order of two cells can be told from: so many `compare` asks for, too."""


def survey(plan: Plan) -> Mapping[str, Any] | None:
    """This machine's ceilings and the parts' costs, or None where no cell computes here."""
    here = [cell for cell in plan.cells if cell.backend != "null" and cell.device in HERE]
    if not here:
        return None
    print("measuring this machine's ceilings", flush=True)
    return survey_apart(plan.bundle.path, here)


HERE = ("cpu", "cuda")
"""Devices whose ceilings can be measured."""


@dataclass(frozen=True)
class Estimate:
    """Seconds for a cell and where they come from. `bound`: at least so long, no more is known."""

    seconds: float
    source: str
    bound: bool = False

    @property
    def words(self) -> str:
        return f"{'at least' if self.bound else 'about'} {duration_text(self.seconds)}"


def estimate(
    cell: Cell, rule: StopRule, history: Mapping[Cell, Row], surveyed: Mapping[str, Any] | None
) -> Estimate:
    """How long one round of `cell` takes: by an earlier row, else its floor, else a bound."""
    if cell in history:
        row = history[cell]
        call_s, cold_s = row["median_ms"] / 1e3, row["cold_ms"] / 1e3
        judging_s = quality_s(cell, call_s, rule)
        return Estimate(sampling_s(call_s, cold_s, rule) + judging_s, f"run {row['run']}")
    least = call_floor_s(cell, surveyed) if surveyed and cell.backend != "null" else None
    if least is not None:
        call_s = least / TYPICAL_FRACTION
        seconds = sampling_s(call_s, call_s, rule) + quality_s(cell, call_s, rule)
        return Estimate(seconds, f"floor / {TYPICAL_FRACTION}")
    return Estimate(rule.min_time + quality_s(cell, 0.0, rule), "no figure yet", bound=True)


def sampling_s(call_s: float, cold_s: float, rule: StopRule) -> float:
    """Seconds of a cell whose calls take `call_s`: cold call, warm-up and samples."""
    samples = max(rule.min_samples, math.ceil(rule.min_time / call_s))
    if samples * call_s > rule.max_time:
        samples = min(samples, max(FEWEST_SAMPLES, math.ceil(rule.max_time / call_s)))
    warmup = 0 if cold_s > LONG_CALL_S else rule.warmup
    return cold_s + (warmup + samples) * call_s


@dataclass(frozen=True)
class Past:
    """What earlier runs of this machine say: good rows by cell, and the newest ceilings."""

    rows: Mapping[Cell, Row]
    roofline: Mapping[str, Any] | None = None


def past(runs: Path, plan: Plan, newest: int = 20) -> Past:
    """What the newest runs below `runs` that were made on this machine say.

    The ceilings are those of a run of the same bundle: they hold what its parts cost too.
    """
    rows: dict[Cell, Row] = {}
    roofline = None
    for name in run_names(runs)[-newest:]:
        try:
            run = open_run(name, runs)
            if run.header.machine != plan.environment["machine"]:
                continue
            rows |= {Cell.of(row): row for row in run.rows() if is_timed(row)}
            if run.header.bundle["hash"] == plan.bundle.hash:
                roofline = run.header.roofline or roofline
        except (AddbenchError, KeyError):
            continue  # a damaged old run costs its estimates, not this sweep
    return Past(rows, roofline)


def quality_s(cell: Cell, call_s: float, rule: StopRule) -> float:
    """Seconds of drawing and judging the pictures of the rule's captions."""
    return math.ceil(rule.quality / cell.batch) * call_s + rule.quality * JUDGE_S


def load_s(group: Sequence[Cell], history: Mapping[Cell, Row]) -> float:
    """Seconds before a worker's first call: start, compile and load as an earlier row has them."""
    rows = [history[cell] for cell in group if cell in history]
    loads = [(row["load_s"] or 0.0) + (row["compile_s"] or 0.0) for row in rows]
    return WORKER_START_S + max(loads, default=0.0)


def total(plan: Plan, known: Past, work: Iterable[tuple[Cell, int]]) -> Estimate:
    """Seconds of some work of a plan, the start of its workers included."""
    seconds, bound = 0.0, False
    by_round: dict[int, list[Cell]] = {}
    for cell, round_ in work:
        by_round.setdefault(round_, []).append(cell)
    for round_, cells in by_round.items():
        for group in groups(cells):
            candidate = plan.candidate(group[0])
            if candidate.modelled or not candidate.found.usable:
                continue
            seconds += load_s(group, known.rows)
            for cell in group:
                rule = plan.method.rule.of_round(round_)
                each = estimate(cell, rule, known.rows, plan.roofline or known.roofline)
                seconds, bound = seconds + each.seconds, bound or each.bound
    return Estimate(seconds, "", bound)


def with_rounds(plan: Plan, known: Past) -> Plan:
    """The plan with as many rounds as its method says, or as the length of one suggests.

    Without a figure for a cell, one: what is not known to be short may take an hour.
    """
    if plan.method.rounds != BY_TIME:
        return plan
    once = total(plan, known, [(cell, 0) for cell in plan.cells])
    short = not once.bound and 0 < once.seconds <= SHORT_ROUND_S
    rounds = SEVERAL if short else 1
    if rounds > 1:
        print(
            f"{rounds} rounds, each cell in {rounds} fresh processes: one takes about"
            f" {once.seconds:.0f} s (--rounds 1 for one)",
            flush=True,
        )
    return replace(plan, method=plan.method.but(rounds=rounds))


def describe(plan: Plan, known: Past) -> None:
    """Print what would be measured and how long that takes."""
    by_time = plan.method.rounds == BY_TIME
    if by_time:
        plan = with_rounds(plan, known)
    by_round = sorted({round_ for _, round_ in plan.work})
    turns = [
        (round_, group)
        for round_ in by_round
        for group in groups(cell for cell, other in plan.work if other == round_)
    ]
    print(
        f"{count_text(len(plan.work), 'cell')} in {count_text(len(turns), 'process', 'processes')},"
        " not measured now:"
    )
    lines: dict[str, list[int]] = {}  # of the same words -> its rounds
    for round_, group in turns:
        candidate = plan.candidate(group[0])
        rule = plan.method.rule.of_round(round_)
        for cell in group:
            line = f"{cell}, {cell.numerics}: "
            if not candidate.found.usable:
                line += f"not on this machine: {candidate.found.what}"
            elif candidate.modelled:
                line += f"modelled{', its images made on this CPU' * plan.images}"
            else:
                guess = estimate(cell, rule, known.rows, plan.roofline or known.roofline)
                judged = f", {rule.quality} captions judged" if rule.quality else ""
                line += f"{guess.words} ({guess.source}{judged})"
            lines.setdefault(line, []).append(round_ + 1)
    for line, rounds in lines.items():
        first, last = rounds[0], rounds[-1]
        when = f"round {first}" if first == last else f"rounds {first} to {last}, each"
        print(f"  {when}  {line}")
    whole = total(plan, known, plan.work)
    print(f"{whole.words} in all")
    if whole.bound and not (plan.roofline or known.roofline):
        print("for an estimate by this machine's ceilings: --dry-run ceilings (half a minute)")
    if by_time and whole.bound:
        print(f"{SEVERAL} rounds where one turns out to take less than {SHORT_ROUND_S:.0f} s")
    for candidate in plan.candidates:
        if not candidate.found.usable:
            print(f"{candidate.key} cannot be measured here: {candidate.found.next}")


def duration_text(seconds: float) -> str:
    if seconds < 1:
        return "less than a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
