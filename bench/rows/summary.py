"""A cell over its rounds: what tables, plots and verdicts show of a run's rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from backends.modelled import VERSION
from bench.rows.cell import Cell
from bench.rows.fields import FLAGS, MODELLED, OK
from bench.rows.stats import median_or_none
from bench.rows.store import Row

SUPERSEDED = "superseded"
"""What a row is whose card has a newer model by now: no flag of its own, for it cannot know."""
UNKNOWN = 0.10
"""The error of a latency whose spread nobody saw, or that others disturbed in every round."""


@dataclass(frozen=True)
class CellRounds:
    """One cell over its rounds. Figures are medians over the rounds that are ok, None without."""

    cell: Cell
    rows: Sequence[Row]

    @property
    def good(self) -> list[Row]:
        """The rows that are ok."""
        return [row for row in self.rows if row["status"] == OK]

    @property
    def status(self) -> str:
        """`ok`, or every other status with the number of rounds it came up in."""
        counts = Counter(row["status"] for row in self.rows)
        if set(counts) == {OK}:
            return OK
        return ", ".join(
            f"{status} ({number} of {len(self.rows)})" if len(self.rows) > 1 else status
            for status, number in sorted(counts.items())
        )

    @property
    def flags(self) -> str:
        """Each flag, with the share of rounds that carry it where that is not all; and whether a
        newer model of the card says otherwise than the row does."""
        counts = Counter(flag for row in self.good for flag in row["flags"])
        counts[SUPERSEDED] = sum(
            row["modelled"].get("version", 1) < VERSION for row in self.good if row["modelled"]
        )
        total = len(self.good)
        return ", ".join(
            flag if counts[flag] == total else f"{flag} ({counts[flag]} of {total})"
            for flag in (*FLAGS, SUPERSEDED)
            if counts[flag]
        )

    @property
    def image(self) -> str:
        """The worst image check of its rounds, as PSNR; "" where none was made."""
        checks = [row["image_check"] for row in self.rows if row["image_check"]]
        if not checks:
            return ""
        worst = min(checks, key=lambda check: (check["psnr_db"] is None, check["psnr_db"] or 0.0))
        return "no reference" if worst["psnr_db"] is None else f"{worst['psnr_db']:.1f} dB"

    @property
    def provenance(self) -> str:
        return ", ".join(sorted({row["provenance"] for row in self.rows}))

    def median(self, column: str) -> float | None:
        """The median over rounds of a figure."""
        return median_or_none([row[column] for row in self.good])

    @property
    def error_ms(self) -> float:
        """How far the median latency may be off: half of what its rounds differ by, of one round
        what its samples differ by, and of one sample `UNKNOWN`; 0 of what is modelled."""
        good = [row for row in self.good if row["median_ms"] is not None]
        middle = self.median("median_ms")
        if middle is None or all(row["provenance"] == MODELLED for row in good):
            return 0.0
        medians = [row["median_ms"] for row in good]
        if len(medians) > 1:
            spread = (max(medians) - min(medians)) / 2
        else:
            spread = good[0]["sd_ms"] if good[0]["sd_ms"] is not None else UNKNOWN * middle
        return float(max(spread, UNKNOWN * middle) if self.disturbed else spread)

    @property
    def disturbed(self) -> bool:
        """Whether other programs disturbed every round that there is a time of."""
        return bool(self.good) and all("disturbed" in row["flags"] for row in self.good)

    def stage(self, name: str) -> float | None:
        """The median over rounds of a stage's milliseconds."""
        return median_or_none([(row["stages_ms"] or {}).get(name) for row in self.good])

    def frames(self, name: str) -> float | None:
        """The median over rounds of a figure of frames."""
        return median_or_none([(row["frames"] or {}).get(name) for row in self.good])

    def quality(self, name: str) -> float | None:
        """The same in every round: pictures do not depend on the clock."""
        return median_or_none([(row["quality"] or {}).get(name) for row in self.good])

    @property
    def switching_high_ms(self) -> float | None:
        """The upper end of a modelled latency where each program of a turn is switched to.

        Rows of older models have the end of one switch a turn.
        """
        models = [row["modelled"] for row in self.good if row["modelled"]]
        paces = [each.get("switching_each") or each["switching"] for each in models]
        return median_or_none([pace["latency"]["high_ms"] for pace in paces])


def by_cell(rows: Sequence[Row]) -> list[CellRounds]:
    """Rows gathered by cell, in the order in which the cells first appear."""
    gathered: dict[Cell, list[Row]] = {}
    for row in rows:
        gathered.setdefault(Cell.of(row), []).append(row)
    return [CellRounds(cell, rounds) for cell, rounds in gathered.items()]
