"""Regret: what a choice lost against the best of a full grid, and its share of the grid's time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from bench.rows.cell import Cell
from bench.rows.store import Row, Run
from bench.run.patience import cost_s
from bench.verdict.choosing.choice import Decision, cost
from bench.verdict.choosing.contenders import Contender, contenders_of
from bench.verdict.choosing.wants import Wants
from core.errors import PreconditionError


@dataclass(frozen=True)
class Regret:
    """A choice held against a grid's medians.

    Attributes:
        share: how much worse it is than the best of the grid that meets the limits; 0 where it is
            that one. A factor less one, or points and dB.
        best: the best of the grid.
        misses: the limits that the choice does not meet by the grid's medians.
        time_share: seconds that were measured for the choice over those of the grid.
    """

    share: float
    best: Contender
    chosen: Contender
    misses: tuple[str, ...]
    time_share: float

    def __str__(self) -> str:
        misses = f"; by the grid it misses {', '.join(self.misses)}" if self.misses else ""
        return (
            f"against the grid of {self.best.run}: regret {self.share:.1%} to"
            f" {self.best.cell}, in {self.time_share:.0%} of the grid's time{misses}"
        )


def regret(choice: Decision, run: Run, grid: Run) -> Regret:
    """The regret of a choice that was made from `run`.

    The grid's medians are taken for the truth. Its own noise makes the regret larger than it is:
    the best of many is partly luck.

    Raises:
        PreconditionError: nothing was chosen, or the grid has not what was, or is elsewhere.
    """
    if choice.taken is None:
        raise PreconditionError(
            "there is no choice to hold against a grid", "nothing was taken", "loosen --within"
        )
    if grid.header.machine != run.header.machine:
        raise PreconditionError(
            f"run {grid.name} is of another machine", "a regret is of one machine",
            "measure the grid on this one with addbench sweep",
        )  # fmt: skip
    name = choice.objective.name
    grid_cells = [each for each in contenders_of([grid], choice.wants)
                  if not each.fault and name in each.spans]  # fmt: skip
    fit = [each for each in grid_cells if not missed(each, choice.wants)]
    chosen = next((each for each in grid_cells
                   if each.cell == choice.taken.contender.cell), None)  # fmt: skip
    if chosen is None or not fit:
        raise PreconditionError(
            f"run {grid.name} does not hold what was chosen" if chosen is None
            else f"nothing in run {grid.name} meets the limits",
            "the grid is to hold every candidate of the search",
            "measure it with addbench sweep over the same backends, steps, batches and decoders",
        )  # fmt: skip
    best = min(fit, key=lambda each: (cost(each, choice.objective), each.key))
    mine, theirs = cost(chosen, choice.objective), cost(best, choice.objective)
    if choice.objective.unit in ("%", "dB"):
        share = mine - theirs
    else:
        share = math.expm1(abs(math.log(abs(mine) / abs(theirs)))) * (1 if mine > theirs else -1)
    return Regret(max(0.0, share), best, chosen, missed(chosen, choice.wants),
                  spent_s(run.rows()) / spent_s(grid.rows()))  # fmt: skip


def missed(contender: Contender, wants: Wants) -> tuple[str, ...]:
    """The limits that a contender does not meet by its medians."""
    return tuple(
        str(limit)
        for limit in wants.limits
        if limit.name not in contender.spans
        or (
            (contender.spans[limit.name].mid > limit.value) == limit.quantity.less
            and contender.spans[limit.name].mid != limit.value
        )
    )


def spent_s(rows: Sequence[Row]) -> float:
    """Seconds that measuring some rows took: starts, loads and calls, compiling left out."""

    def worker(row: Row) -> tuple[int, Cell]:
        return row["round"], Cell.of(row).group

    ordered = sorted(rows, key=worker)
    return sum(cost_s(list(group)) for _, group in groupby(ordered, key=worker))
