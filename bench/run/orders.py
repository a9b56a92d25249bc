"""In which order sides, rounds and cells are measured: nothing here runs anything.

A sweep goes round by round, so that a drift of the machine meets every cell; two sides alternate,
so that it cancels; `Trial` decides from the rows so far what two revisions still need.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bench.rows.cell import Cell
from bench.rows.fields import OK
from bench.rows.store import Row, is_timed
from bench.run.plan import groups
from bench.verdict.outcome import FAILED, FASTER, INCONCLUSIVE, MISSING, SLOWER, Line, decided
from bench.verdict.rules import PAIR_ROUNDS, pairs

BASE, HEAD = 0, 1
SIDES = ("base", "head")


@dataclass(frozen=True)
class Turn:
    """What one fresh worker measures: cells of one group, of one side, in one round."""

    side: int
    round: int
    cells: tuple[Cell, ...]


def round_by_round(work: Iterable[tuple[Cell, int]], side: int = 0) -> list[Turn]:
    """All groups of (cell, round) pairs once, then the next round."""
    by_round: dict[int, list[Cell]] = {}
    for cell, round_ in work:
        by_round.setdefault(round_, []).append(cell)
    return [
        Turn(side, round_, tuple(group))
        for round_ in sorted(by_round)
        for group in groups(by_round[round_])
    ]


def order(round_: int) -> tuple[int, int]:
    """ABBA: base first in even rounds, head first in odd ones, so that a steady drift cancels."""
    return (BASE, HEAD) if round_ % 2 == 0 else (HEAD, BASE)


def schedule(base_rounds: int, head_rounds: int) -> list[tuple[int, int]]:
    """(side, round) of a pair in the order of measurement.

    As many rounds a side: ABBA. If one has fewer: in the middle of the other's, so that a steady
    drift cancels too.
    """
    if base_rounds == head_rounds:
        return [(side, round_) for round_ in range(base_rounds) for side in order(round_)]
    few, many = (BASE, HEAD) if base_rounds < head_rounds else (HEAD, BASE)
    rare = [(few, round_) for round_ in range(min(base_rounds, head_rounds))]
    rest = [(many, round_) for round_ in range(max(base_rounds, head_rounds))]
    half = len(rest) // 2
    return [*rest[:half], *rare, *rest[half:]]


def alternating(rounds: Sequence[int], work: Sequence[Sequence[tuple[Cell, int]]]) -> list[Turn]:
    """The turns of a pair whose sides have so many rounds, of the work that each has left."""
    turns = (
        Turn(side, round_, tuple(cell for cell, left in work[side] if left == round_))
        for side, round_ in schedule(*rounds)
    )
    return [turn for turn in turns if turn.cells]


@dataclass
class Trial:
    """Two revisions: cells, how many rounds of them, and the rows so far.

    `turns` is an order that looks at what came of it: whoever measures a turn hands every row to
    `note` before the next turn is asked for. At its end `lines` holds the verdicts.

    Attributes:
        budget_s: seconds for all rounds and the confirmation. It decides which cells are measured;
            a cell that is measured gets all its rounds.
        cost_s: seconds that one round of a cell took, both sides; the first cell of a group bears
            the start of the processes.
        more: is told how many cells are measured beyond the plan.
    """

    cells: Sequence[Cell]
    rounds: int
    max_slowdown: float
    budget_s: float
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print
    more: Callable[[int], None] = lambda cells: None
    rows: dict[tuple[int, Cell, int], Row] = field(default_factory=dict)
    cost_s: dict[Cell, float] = field(default_factory=lambda: defaultdict(float))
    lines: list[Line] = field(default_factory=list)

    def turns(self) -> Iterator[Turn]:
        """Measure, judge, confirm; then `lines` has a line for each cell."""
        self.started = self.before = self.clock()
        yield from self.first_round()
        kept = self.fitting()
        for round_ in range(1, self.rounds):
            yield from self.one_round(kept, round_)
        lines = {cell: self.judged(cell, range(self.rounds)) for cell in kept}
        suspects = {cell: lines[cell] for cell in kept if lines[cell].verdict == SLOWER}
        chosen = self.affordable(suspects)
        again = range(self.rounds, 2 * self.rounds)
        if chosen:
            self.say(f"{len(chosen)} cells look slower: measuring them once more")
            self.more(len(SIDES) * self.rounds * len(chosen))
        for round_ in again:
            yield from self.one_round(chosen, round_)
        lines |= self.confirmed(suspects, chosen, again)
        cut = f"left out: --budget holds {len(kept)} of {len(self.cells)} cells"
        if all(cell in self.cost_s for cell in self.cells):
            cut += f"; all take about {self.rounds * sum(self.cost_s.values()) / 60:.0f} min"
        self.lines = [lines.get(cell) or Line(cell, INCONCLUSIVE, cut) for cell in self.cells]

    def note(self, turn: Turn, cell: Cell, row: Row) -> None:
        """Keep a row, and what a cell of the first round took."""
        self.rows[turn.side, cell, turn.round] = row
        now = self.clock()
        if turn.round == 0:
            self.cost_s[cell] += now - self.before
        self.before = now

    @property
    def left_s(self) -> float:
        return self.budget_s - (self.clock() - self.started)

    # ---- what is measured

    def first_round(self) -> Iterator[Turn]:
        """Round 0 says what cells cost. It stops once what it measured fills the budget."""
        for group in groups(self.cells):
            if self.rounds * sum(self.cost_s.values()) > self.budget_s:
                break
            yield from self.one_group(group, 0)

    def one_round(self, cells: Sequence[Cell], round_: int) -> Iterator[Turn]:
        """Group by group, the two sides of a group one right after the other."""
        for group in groups(cells):
            yield from self.one_group(group, round_)

    def one_group(self, group: Sequence[Cell], round_: int) -> Iterator[Turn]:
        for side in order(round_):
            self.before = self.clock()
            yield Turn(side, round_, tuple(group))

    def fitting(self) -> list[Cell]:
        """The cells whose rounds fit the budget, in the order of the plan.

        Room is kept to confirm the most expensive of them: a gate that has no time left to
        confirm could never fail.
        """
        kept: list[Cell] = []
        total = dearest = 0.0
        for cell in self.cells:
            if cell not in self.cost_s:
                continue
            cost, alone = self.price_s(cell, kept), self.price_s(cell, ())
            if self.rounds * (total + cost + max(dearest, alone)) <= self.budget_s:
                kept.append(cell)
                total, dearest = total + cost, max(dearest, alone)
        return kept

    def price_s(self, cell: Cell, beside: Sequence[Cell]) -> float:
        """What a round costs more with `cell` than with the cells `beside` it alone."""
        if any(other.group == cell.group for other in beside):
            return self.cost_s[cell]
        first = next(other for other in self.cells if other.group == cell.group)
        return max(self.cost_s[cell], self.cost_s[first])  # the processes must start for it

    def affordable(self, suspects: Mapping[Cell, Line]) -> list[Cell]:
        """The suspects that there is time to confirm, in the order of the plan.

        The worst come first, and the worst of all is confirmed whatever the budget says.
        """
        chosen: list[Cell] = []
        left = self.left_s
        for cell in sorted(suspects, key=lambda cell: -(suspects[cell].ratio or 0)):
            cost = self.rounds * self.price_s(cell, chosen)
            if not chosen or cost <= left:
                chosen.append(cell)
                left -= cost
        return [cell for cell in self.cells if cell in chosen]

    # ---- judging

    def confirmed(
        self, suspects: Mapping[Cell, Line], chosen: Sequence[Cell], again: range
    ) -> dict[Cell, Line]:
        """Every suspect after as many rounds again; one there was no time for is inconclusive."""
        result = {}
        for cell, line in suspects.items():
            first = f"{(line.ratio or 1) - 1:+.1%} at first"
            if cell not in chosen:
                why = f"{first}, and --budget leaves no time to confirm it"
                result[cell] = replace(line, verdict=INCONCLUSIVE, reason=why)
                continue
            second = self.judged(cell, again)
            verdict = INCONCLUSIVE if second.verdict == FASTER else second.verdict
            words = "confirmed" if verdict == SLOWER else "not confirmed"
            result[cell] = replace(
                second, verdict=verdict, reason="; ".join(filter(None, (first, words,
                                                                        second.reason))),
            )  # fmt: skip
        return result

    def judged(self, cell: Cell, rounds: range) -> Line:
        """The rule on these rounds of a cell."""
        found = [[self.rows.get((side, cell, r)) for r in rounds] for side in (BASE, HEAD)]
        good = [[row["median_ms"] for row in side if row and is_timed(row)] for side in found]
        line = Line(
            cell,
            INCONCLUSIVE,
            base_ms=float(np.median(good[BASE])) if good[BASE] else None,
            head_ms=float(np.median(good[HEAD])) if good[HEAD] else None,
            base_rounds=len(good[BASE]),
            head_rounds=len(good[HEAD]),
        )
        for side, name in ((HEAD, "HEAD"), (BASE, "BASE")):
            bad = Counter(row["status"] for row in found[side] if row and row["status"] != OK)
            if not any(found[side]):
                return replace(line, verdict=MISSING, reason=f"{name} gave no row of it")
            if bad and (side == HEAD or not good[side]):
                words = ", ".join(f"{status} in {n} rounds" for status, n in bad.items())
                return replace(line, verdict=FAILED, reason=f"{name}: {words}")
        ratios = [
            math.log(head["median_ms"] / base["median_ms"])
            for base, head in zip(*found, strict=True)
            if base and head and is_timed(base) and is_timed(head)
        ]
        if len(ratios) < PAIR_ROUNDS:
            why = f"{len(ratios)} rounds have both sides, {PAIR_ROUNDS} are needed"
            return replace(line, reason=why)
        judged = pairs(np.array([ratios]), self.max_slowdown)
        return decided(line, judged, 0, self.max_slowdown)
