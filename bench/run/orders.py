"""Alternating rounds of two sides: the order, the budget, the confirmation and the verdict.

Knows nothing of revisions or processes: `Measure` does the work, and tests replace it.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from bench.rows.cell import Cell
from bench.rows.fields import OK
from bench.rows.store import Row, is_timed
from bench.run.plan import groups
from bench.verdict.outcome import FAILED, FASTER, INCONCLUSIVE, MISSING, SLOWER, Line, decided

BASE, HEAD = 0, 1
Measured = Iterator[tuple[Cell, Row]]
Measure = Callable[[int, Sequence[Cell], int], Measured]
"""(side, cells of one group, round) -> their rows, from one fresh process."""


def order(round_: int) -> tuple[int, int]:
    """ABBA: base first in even rounds, head first in odd ones, so that a steady drift cancels."""
    return (BASE, HEAD) if round_ % 2 == 0 else (HEAD, BASE)


@dataclass
class Trial:
    """Cells, how many rounds of them, and what was measured so far.

    Attributes:
        budget_s: seconds for all rounds and the confirmation. It decides which cells are measured;
            a cell that is measured gets all its rounds.
        cost_s: seconds that one round of a cell took, both sides; the first cell of a group bears
            the start of the processes.
    """

    cells: Sequence[Cell]
    rounds: int
    measure: Measure
    max_slowdown: float
    budget_s: float
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print
    rows: dict[tuple[int, Cell, int], Row] = field(default_factory=dict)
    cost_s: dict[Cell, float] = field(default_factory=lambda: defaultdict(float))

    def run(self) -> list[Line]:
        """Measure, judge, confirm; a line for each cell."""
        self.started = self.clock()
        self.first_round()
        kept = self.fitting()
        for round_ in range(1, self.rounds):
            self.one_round(kept, round_)
        lines = {cell: self.judged(cell, range(self.rounds)) for cell in kept}
        suspects = [cell for cell in kept if lines[cell].verdict == SLOWER]
        lines |= self.confirmed({cell: lines[cell] for cell in suspects})
        cut = f"left out: --budget holds {len(kept)} of {len(self.cells)} cells"
        if all(cell in self.cost_s for cell in self.cells):
            cut += f"; all take about {self.rounds * sum(self.cost_s.values()) / 60:.0f} min"
        return [lines.get(cell) or Line(cell, INCONCLUSIVE, cut) for cell in self.cells]

    @property
    def left_s(self) -> float:
        return self.budget_s - (self.clock() - self.started)

    # ---- measuring

    def first_round(self) -> None:
        """Round 0 says what cells cost. It stops once what it measured fills the budget."""
        for group in groups(self.cells):
            if self.rounds * sum(self.cost_s.values()) > self.budget_s:
                break
            self.one_group(group, 0)

    def one_round(self, cells: Sequence[Cell], round_: int) -> None:
        """Group by group, the two sides of a group one right after the other."""
        for group in groups(cells):
            self.one_group(group, round_)

    def one_group(self, group: Sequence[Cell], round_: int) -> None:
        for side in order(round_):
            self.say(
                f"round {round_ + 1}: {('base', 'head')[side]}: {group[0].backend_text}"
                f" {group[0].decoder} batch {group[0].batch}, {len(group)} cells"
            )
            before = self.clock()
            for cell, row in self.measure(side, group, round_):
                self.rows[side, cell, round_] = row
                if round_ == 0:
                    self.cost_s[cell] += self.clock() - before
                before = self.clock()

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

    def confirmed(self, suspects: dict[Cell, Line]) -> dict[Cell, Line]:
        """Every suspect after as many rounds again; one there was no time for is inconclusive.

        The worst come first, and the worst of all is confirmed whatever the budget says.
        """
        worst_first = sorted(suspects, key=lambda cell: -(suspects[cell].ratio or 0))
        chosen: list[Cell] = []
        left = self.left_s
        for cell in worst_first:
            cost = self.rounds * self.price_s(cell, chosen)
            if not chosen or cost <= left:
                chosen.append(cell)
                left -= cost
        again = range(self.rounds, 2 * self.rounds)
        in_order = [cell for cell in self.cells if cell in chosen]
        if chosen:
            self.say(f"{len(chosen)} cells look slower: measuring them once more")
        for round_ in again:
            self.one_round(in_order, round_)
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

    # ---- judging

    def judged(self, cell: Cell, rounds: range) -> Line:
        """The rule on these rounds of a cell."""
        import numpy as np

        from bench.verdict.rules import PAIR_ROUNDS, pairs

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
