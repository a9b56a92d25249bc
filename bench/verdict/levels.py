"""The noise model's levels, estimated from repeated runs of an unchanged program.

Medians and median absolute deviations throughout, so that bursts do not pass for jitter; a level
that the data cannot separate is None and is contained in the one above it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.rows.cell import Cell
from bench.rows.store import Row, Run, is_timed
from bench.verdict.noise import CELLS, HARSH, TYPICAL, Levels, abba, false_alarms, rule_trials
from bench.verdict.rules import Array, Judgement, deviation, pairs
from core.errors import PreconditionError

FEWEST_ROUNDS = 5
LAGS = (1, 2, 3, 4)
"""Turns apart, whose differences tell a random walk from jitter."""
BURST_SPREADS, BURST_LEAST = 4.0, 0.05
"""A worker process this many spreads, and this much, above its neighbours has met a burst."""


@dataclass(frozen=True)
class Panel:
    """One run: log of the median latency, [rounds, cells], and each cell's worker [cells]."""

    name: str
    log_ms: Array
    workers: Sequence[int]
    cells: Sequence[Cell]


def panel(name: str, rows: Sequence[Row]) -> Panel:
    """The rows of one run; cells and rounds that are not complete are left out.

    Raises:
        PreconditionError: fewer than FEWEST_ROUNDS rounds remain.
    """
    good = {(Cell.of(row), row["round"]): row["median_ms"] for row in rows if is_timed(row)}
    rounds = sorted({round_ for _, round_ in good})
    ordered = dict.fromkeys(cell for cell, _ in good)
    cells = [cell for cell in ordered if all((cell, round_) in good for round_ in rounds)]
    if len(rounds) < FEWEST_ROUNDS or not cells:
        raise PreconditionError(
            f"run {name} has {len(rounds)} rounds with {len(cells)} complete cells",
            f"levels are spreads between rounds: at least {FEWEST_ROUNDS} are needed",
            "measure it again with --rounds 20",
        )
    groups = {group: place for place, group in enumerate(dict.fromkeys(c.group for c in cells))}
    table = [[math.log(good[cell, round_]) for cell in cells] for round_ in rounds]
    return Panel(name, np.array(table), [groups[cell.group] for cell in cells], cells)


def estimate(panels: Sequence[Panel]) -> dict[str, float | None]:
    """Levels by the names of `Levels`' fields, averaged over the runs as variances."""
    each = [_of_one(one) for one in panels]
    levels: dict[str, float | None] = {"machine": _between(panels)}
    for name in ("drift", "process", "cell"):
        known = [level for one in each if (level := one[name]) is not None]
        levels[name] = math.sqrt(float(np.mean(np.square(known)))) if known else None
    # What an exponential has above a threshold is that exponential again: its mean is the bursts'
    # mean, and the share of bursts that reach so high follows.
    above = np.concatenate([one["above"] for one in each])
    slots = sum(one["slots"] for one in each)
    levels["burst_rate"], levels["burst_mean"] = 0.0, None
    if above.size:
        mean = float(above.mean())
        threshold = float(np.mean([one["threshold"] for one in each]))
        levels["burst_rate"] = min(1.0, above.size / slots * math.exp(threshold / mean))
        levels["burst_mean"] = mean
    return levels


def _between(panels: Sequence[Panel]) -> float | None:
    """Standard deviation between runs, of the change that their common cells share."""
    common = [cell for cell in panels[0].cells if all(cell in one.cells for one in panels)]
    if len(panels) < 2 or not common:
        return None
    medians = np.array(
        [[np.median(one.log_ms[:, one.cells.index(cell)]) for cell in common] for one in panels]
    )
    return float(np.median(medians - medians.mean(axis=0), axis=1).std(ddof=1))


def _of_one(one: Panel) -> dict[str, Any]:
    residual = one.log_ms - np.median(one.log_ms, axis=0)
    workers = sorted(set(one.workers))
    members = [[c for c, worker in enumerate(one.workers) if worker == w] for w in workers]
    by_worker = np.stack([np.median(residual[:, m], axis=1) for m in members], axis=1)
    turn = np.median(by_worker, axis=1)

    inside = [
        deviation((residual[:, m] - residual[:, m].mean(axis=1, keepdims=True)).ravel())
        * math.sqrt(len(m) / (len(m) - 1))
        for m in members
        if len(m) > 1
    ]
    cell = float(np.sqrt(np.mean(np.square(inside)))) if inside else None
    process = None
    if len(workers) > 1:
        spread = deviation((by_worker - turn[:, None]).ravel()) * math.sqrt(
            len(workers) / (len(workers) - 1)
        )
        own = 0.0 if cell is None else cell**2 / np.mean([len(m) for m in members])
        process = math.sqrt(max(0.0, float(spread) ** 2 - own))
    lags = [lag for lag in LAGS if lag < len(turn) - 1]
    variances = [float(deviation(turn[lag:] - turn[:-lag])) ** 2 for lag in lags]
    slope = np.polyfit(lags, variances, 1)[0] if len(lags) > 1 else math.nan
    excess = by_worker - _neighbours(by_worker)
    threshold = max(BURST_LEAST, BURST_SPREADS * float(deviation(excess.ravel())))
    return {
        "drift": math.sqrt(max(0.0, float(slope))),
        "process": process,
        "cell": cell,
        "above": excess[excess > threshold] - threshold,
        "threshold": threshold,
        "slots": excess.size,
    }


def _neighbours(by_worker: Array) -> Array:
    """Median of the two turns before and the two after, for each turn and worker."""
    turns = len(by_worker)
    near = [
        [t for t in range(max(0, now - 2), min(turns, now + 3)) if t != now] for now in range(turns)
    ]
    return np.array([np.median(by_worker[few], axis=0) for few in near])


def self_test(one: Panel) -> Judgement | None:
    """The rule of `addbench ab` on a run against itself: its rounds taken as base head head base.

    None for fewer than 10 rounds. Pessimistic: these rounds lie a whole turn apart.
    """
    rounds = len(one.log_ms) // 2
    if rounds < FEWEST_ROUNDS:
        return None
    return pairs(abba(one.log_ms[None, : 2 * rounds])[0])


def compared(level: float | None, name: str) -> str:
    """Where a level stands against the model's two."""
    typical, harsh = getattr(TYPICAL, name), getattr(HARSH, name)
    if level is None:
        return "not to be told from these runs"
    if level <= typical:
        return "within typical"
    return "within harsh" if level <= harsh else "beyond harsh"


def errors_at(levels: Mapping[str, float | None], jobs: int, seed: int) -> list[dict[str, Any]]:
    """False alarms of a job under these levels, for each rule that is held to a goal."""
    # What cannot be told is contained in another level.
    here = Levels("here", **{name: level or 0.0 for name, level in levels.items()})
    lines = []
    for trial in rule_trials():
        if trial.goal:
            alarm, undecided = false_alarms(trial.rule, here, jobs, seed)
            lines.append({"rule": trial.name, "false_alarm": alarm.columns(),
                          "inconclusive": undecided.columns()})  # fmt: skip
    return lines


def report(targets: Sequence[Run], jobs: int, seed: int) -> dict[str, Any]:
    """The estimated levels against the model's, and how often the rules would be wrong there."""
    panels = [panel(target.name, target.rows()) for target in targets]
    levels = estimate(panels)
    judged = {each.name: verdicts for each in panels if (verdicts := self_test(each)) is not None}
    return {
        "runs": [target.name for target in targets],
        "environment": targets[0].header.environment,
        "rounds": [len(each.log_ms) for each in panels],
        "cells": [asdict(cell) for cell in panels[0].cells],
        "jobs": jobs,
        "levels": levels,
        "against_the_model": {
            name: compared(levels[name], name) for name in asdict(TYPICAL) if name != "name"
        },
        "rules_under_these_levels": errors_at(levels, jobs, seed),
        "against_themselves": {
            name: {
                "cells": verdicts.slower.size,
                "slower": int(verdicts.slower.sum()),
                "faster": int(verdicts.faster.sum()),
                "widest_interval": float(np.expm1((verdicts.high - verdicts.low).max() / 2)),
            }
            for name, verdicts in judged.items()
        },
    }


def report_text(described: Mapping[str, Any]) -> str:
    """A report for a terminal."""
    lines = [f"{'level':<12}{'here':>9}{'typical':>9}{'harsh':>9}"]
    for name, place in described["against_the_model"].items():
        level = described["levels"][name]
        value = "-" if level is None else f"{level:.2%}"
        model = "".join(f"{getattr(each, name):9.1%}" for each in (TYPICAL, HARSH))
        lines.append(f"{name:<12}{value:>9}{model}   {place}")
    for name, verdicts in described["against_themselves"].items():
        lines.append(
            f"run {name} against itself, by the rule of `addbench ab`: {verdicts['slower']}"
            f" of {verdicts['cells']} cells slower, {verdicts['faster']} faster, the widest"
            f" interval {verdicts['widest_interval']:.1%} to each side"
        )
    lines.append(f"\nunder these levels, {described['jobs']} jobs of {CELLS} cells:")
    for line in described["rules_under_these_levels"]:
        alarm, undecided = line["false_alarm"], line["inconclusive"]
        lines.append(
            f"{line['rule']:<36} false alarms {alarm['share']:.3%} (95% bound"
            f" {alarm['upper']:.3%}), inconclusive {undecided['share']:.1%}"
        )
    return "\n".join(lines)
