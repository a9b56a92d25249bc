"""A run against all earlier ones of its machine: for a machine of one's own that measures nightly.

A cell is flagged when it leaves the median of at least ten earlier runs by more than
max(8%, 4 x 1.4826 x MAD): the second is what the machine's own unrest asks for. The rule sees no
more than one run at a time, so it is slow to accept a new normal, and a slow creep stays below it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.rows.cell import Cell
from bench.rows.store import Run, open_run, run_names
from bench.verdict.compare import Cells, gather, on_one_machine
from bench.verdict.outcome import FAILED, FASTER, INCONCLUSIVE, MISSING, SAME, SLOWER, Line, Outcome
from core.errors import AddbenchError

if TYPE_CHECKING:
    pass

FEWEST_RUNS = 10
LEAST = 0.08
SPREADS = 4.0
"""How many times 1.4826 x MAD a run may be off.

That is the standard deviation where the earlier runs scatter normally.
"""
RULE = (
    f"slower: above the median of at least {FEWEST_RUNS} earlier runs by more than"
    f" max({LEAST:.0%}, {SPREADS:g} x 1.4826 x MAD)."
)


@dataclass(frozen=True)
class Band:
    """What earlier runs say of a cell: their medians [ms], by age, and the range around them."""

    values: Sequence[float]

    @property
    def centre(self) -> float:
        return statistics.median(self.values)

    @property
    def limit(self) -> float:
        """How far a run may be off, as a share of the centre."""
        mad = statistics.median(abs(value - self.centre) for value in self.values)
        return max(LEAST, SPREADS * 1.4826 * mad / self.centre)


def earlier_runs(target: Run, out: Path) -> Sequence[tuple[str, Mapping[Cell, Cells]]]:
    """Runs of the same machine made before `target`, oldest first; revisions under test are none.

    A damaged run is left out and said on stderr: it must not stop tonight's judgement.
    """
    earlier = []
    for name in run_names(out):
        if name >= target.name:
            continue
        try:
            run = open_run(name, out)
            if on_one_machine(run, target) and run.header.ab is None:
                earlier.append((name, gather(run.all_rows(), name)))
        except AddbenchError as error:
            print(f"left out: {name}: {error.what} ({error.why})", file=sys.stderr)
    return earlier


def against_history(target: Run, out: Path) -> tuple[Outcome, dict[Cell, Band]]:
    """The judgement of every cell of `target`, and what its earlier runs say of each."""
    past = earlier_runs(target, out)
    mine = gather(target.all_rows(), target.name)
    bands: dict[Cell, Band] = {}
    lines = []
    for cell in dict.fromkeys([*target.plan, *mine]):
        own = mine.get(cell, Cells())
        values = [
            statistics.median(cells[cell].medians)
            for _, cells in past
            if cell in cells
            and cells[cell].medians
            and cells[cell].provenances == own.provenances  # no ratio mixes two
        ]
        bands[cell] = Band(values)
        lines.append(judge(cell, own, bands[cell]))
    notes = [f"{len(past)} earlier runs of this machine in {out.name}"]
    return Outcome(f"{len(past)} earlier runs", target.name, RULE, lines, notes), bands


def judge(cell: Cell, mine: Cells, band: Band) -> Line:
    """The rule on one cell."""
    if not mine.statuses:
        return Line(cell, MISSING, "the run has no row of it")
    if mine.bad:
        return Line(cell, FAILED, mine.bad)
    if not mine.medians:
        return Line(cell, INCONCLUSIVE, "an emulation has no speed to compare")
    value = statistics.median(mine.medians)
    rounds = {"base_rounds": len(band.values), "head_rounds": len(mine.medians)}
    if len(band.values) < FEWEST_RUNS:
        why = f"{len(band.values)} earlier runs have it, {FEWEST_RUNS} are needed"
        return Line(cell, INCONCLUSIVE, why, head_ms=value, **rounds)
    ratio, limit = value / band.centre, band.limit
    verdict = SLOWER if ratio > 1 + limit else FASTER if ratio < 1 / (1 + limit) else SAME
    return Line(
        cell,
        verdict,
        f"{len(band.values)} earlier runs, limit {limit:+.1%}",
        ratio=ratio,
        base_ms=band.centre,
        head_ms=value,
        **rounds,
    )
