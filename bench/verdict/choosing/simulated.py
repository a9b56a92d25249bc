"""How often `addbench choose` takes a wrong one: a simulation through the functions that decide.

A job has a few contenders, each in a worker of its own, under the noise model of the verdicts
(`bench.verdict.noise`). One is the best and the least simple; all others are slower by the same
share, so that every tie, and every accident, costs as much. What is wrong is to take one of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np

from bench.rows.cell import Cell
from bench.verdict.choosing.choice import MOST_ROUNDS, Decision, decide, still_open
from bench.verdict.choosing.contenders import Contender, timed_span
from bench.verdict.choosing.wants import Wants
from bench.verdict.noise import CELLS_PER_WORKER, HARSH, TYPICAL, Levels, Rate, simulate
from bench.verdict.rules import Array
from core.amounts import count_text
from core.table import Column

WRONG_GOAL = 0.05
"""The most wrong choices for a difference of 10%, under typical noise."""
DIFFERENCE = 0.10
CONTENDERS = (2, 6)
FIXED = (1, 5, 10, 20)
"""Rounds of a run that is chosen from."""
BASE = Cell("model", "random", "ort", "", "cpu", "fp32", "fp16", "512x512", 1, "vae", 1, "Euler")


def contender_of(place: int, logs: Array) -> Contender:
    """A contender with its rounds' log latencies; the higher its place, the less simple it is."""
    values = {("run", round_): float(np.exp(value)) for round_, value in enumerate(logs)}
    options = ",".join(repeat("a=1", place))
    return Contender(
        replace(BASE, options=options), "machine", "here", "run", "measured", len(logs),
        {"latency": values}, {"latency": timed_span(list(values.values()), True)},
    )  # fmt: skip


def job_logs(
    levels: Levels, contenders: int, rounds: int, difference: float, rng: np.random.Generator
) -> Array:
    """Log latencies of one job, [contender, round]; the last one is the best."""
    turns = simulate(levels, 1, rounds, rng, CELLS_PER_WORKER * contenders)
    logs = turns[0, :, ::CELLS_PER_WORKER].T
    slower = np.full(contenders, np.log1p(difference))
    slower[-1] = 0.0
    return np.asarray(logs + slower[:, None])


def chosen(logs: Array) -> Decision:
    """The decision by all rounds of some contenders."""
    return decide([contender_of(place, own) for place, own in enumerate(logs)], Wants())


def searched(logs: Array) -> tuple[Decision, int]:
    """The decision of a search that drops and stops as `addbench choose --model NAME` does, and how
    many (contender, round) pairs it measured."""
    alive = {*range(len(logs))}
    rounds = {place: 0 for place in alive}
    for round_ in range(1, logs.shape[1] + 1):
        for place in alive:
            rounds[place] = round_
        choice = decide(
            [contender_of(place, logs[place, : rounds[place]]) for place in rounds], Wants()
        )
        kept = {each.cell.options for each in still_open(choice)}
        alive = {place for place in alive if ",".join(repeat("a=1", place)) in kept}
        if choice.settled or not alive:
            break
    return choice, sum(rounds.values())


@dataclass(frozen=True)
class WrongRate:
    """How often one way to choose is wrong.

    Attributes:
        measured: (contender, round) pairs for each contender, on average.
    """

    levels: str
    way: str
    contenders: int
    wrong: Rate
    unsettled: Rate
    measured: float
    goal: bool

    @property
    def met(self) -> bool:
        """Whether the goal is met, where it is held to one."""
        return not self.goal or self.wrong.share <= WRONG_GOAL


def wrong_rate(
    levels: Levels, contenders: int, rounds: int, jobs: int, seed: int, *, search: bool = False,
    difference: float = DIFFERENCE,
) -> WrongRate:  # fmt: skip
    """Wrong choices among simulated jobs: of a run of `rounds`, or a search of at most as many."""
    rng = np.random.default_rng(seed)
    wrong = unsettled = measured = 0
    for _ in range(jobs):
        logs = job_logs(levels, contenders, rounds, difference, rng)
        choice, pairs = searched(logs) if search else (chosen(logs), logs.size)
        assert choice.taken is not None
        best = choice.taken.contender.cell.options.count("a") == contenders - 1
        wrong += not best
        unsettled += not choice.settled
        measured += pairs
    way = f"search, at most {rounds} rounds" if search else f"run of {count_text(rounds, 'round')}"
    return WrongRate(
        levels.name, way, contenders, Rate(wrong, jobs), Rate(unsettled, jobs),
        measured / jobs / contenders, search and levels is TYPICAL,
    )  # fmt: skip


def table(jobs: int, seed: int, fixed: Sequence[int] = FIXED) -> list[WrongRate]:
    """Every way to choose under both levels."""
    return [
        wrong_rate(levels, contenders, rounds, jobs, seed, search=search)
        for levels in (TYPICAL, HARSH)
        for contenders in CONTENDERS
        for rounds, search in [*((rounds, False) for rounds in fixed), (MOST_ROUNDS, True)]
    ]


COLUMNS = (
    Column("levels", lambda line: line.levels),
    Column("chosen from", lambda line: line.way),
    Column("contenders", lambda line: line.contenders, 0),
    Column("wrong", lambda line: f"{line.wrong.share:.1%}"),
    Column("upper 95% bound", lambda line: f"{line.wrong.upper:.1%}"),
    Column("not settled", lambda line: f"{line.unsettled.share:.1%}"),
    Column("rounds measured", lambda line: line.measured, 1),
)
