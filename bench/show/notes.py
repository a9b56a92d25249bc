"""What a reader of a table should know about its times, once below it, in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from bench.rows.summary import CellRounds


def notes(lines: Sequence[CellRounds]) -> list[str]:
    """Sentences about disturbed times, open medians, and an order that one process cannot tell."""
    timed = [line for line in lines if line.provenance == "measured" and line.median("median_ms")]
    rows = [row for line in timed for row in line.good]
    disturbed = sum("disturbed" in row["flags"] for row in rows)
    unstable = sum("unstable" in row["flags"] for row in rows)
    texts = []
    if disturbed:
        texts.append(
            f"disturbed: {disturbed} of {len(rows)} times were taken while other programs used this"
            " machine; they may be too long."
        )
    if unstable:
        texts.append(
            f"unstable: of {unstable} of {len(rows)} times the samples leave the median open by"
            " more than 2.5%; more samples (--min-samples, --min-time) settle it."
        )
    if one_process(lines):
        texts.append(
            "one process a cell: which of two close cells is the faster is not established;"
            " --rounds 5 tells."
        )
    return texts


def one_process(lines: Sequence[CellRounds]) -> bool:
    """Whether cells were timed once each, so that close ones have no order."""
    timed = [line for line in lines if line.provenance == "measured" and line.median("median_ms")]
    return len(timed) > 1 and all(len(line.good) == 1 for line in timed)
