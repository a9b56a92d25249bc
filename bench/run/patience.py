"""A noisy minute: what was disturbed, or scatters, is measured again when the machine is quiet."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from bench.rows.cell import Cell
from bench.rows.stats import DISTURBED_CPU
from bench.rows.store import Row, Run, is_noisy, is_timed
from bench.run.estimate import WORKER_START_S
from bench.run.measure import CpuShare
from bench.run.orders import Turn, round_by_round
from bench.run.progress import Display

PATIENCE_S = 60.0
"""Seconds that a sweep waits for a quiet machine and measures again, in all."""
RETRIES = 2
"""Attempts at a cell and round beside the first."""


def usual_patience_s() -> float:
    """60 s for a person; none in CI, where a minute costs money and the neighbours stay."""
    return 0.0 if os.environ.get("CI") else PATIENCE_S


def again(run: Run, patience_s: float, display: Display) -> Iterator[Turn]:
    """The cells of a run that were disturbed, once the machine is quiet, as long as it may take.

    An order that looks at the run's rows: the turns before it must be on disk. An attempt is a
    further row of the same cell and round, and the calm one counts.
    """
    until = time.monotonic() + patience_s
    attempts: Counter[tuple[Cell, int]] = Counter()
    while patience_s > 0:
        noisy = {
            (cell, row["round"]): row
            for row in run.rows()
            if is_noisy(row) and attempts[cell := Cell.of(row), row["round"]] < RETRIES
        }
        turns = round_by_round(noisy)
        left = until - time.monotonic()
        turns = [turn for turn in turns if cost_s(noisy[c, turn.round] for c in turn.cells) < left]
        if not turns:
            return
        count = sum(len(turn.cells) for turn in turns)
        display.say(
            f"{count} cells were disturbed by other programs, or scatter: measuring them again"
            f" once the machine is quiet (--patience, {left:.0f} s left)"
        )
        if not quiet_before(until, display):
            display.say("the machine stayed busy: they keep their flags")
            return
        for turn in turns:
            for cell in turn.cells:
                attempts[cell, turn.round] += 1
            if time.monotonic() + cost_s(noisy[c, turn.round] for c in turn.cells) < until:
                display.more(len(turn.cells))
                yield turn


def cost_s(rows: Iterable[Row]) -> float:
    """Seconds that measuring the cells of some rows in one worker takes once more."""
    seconds = WORKER_START_S
    for row in rows:
        if is_timed(row):
            calls_ms = row["cold_ms"] + (row["warmup_calls"] or 0) * row["median_ms"]
            seconds += (row["load_s"] or 0.0) + (calls_ms + sum(row["samples_ms"])) / 1e3
    return seconds


def quiet_before(until: float, display: Display) -> bool:
    """Wait until other processes leave the cores alone for a second; False if they do not."""
    while time.monotonic() + CpuShare.SHORTEST_S < until:
        share = CpuShare()
        time.sleep(1.05 * CpuShare.SHORTEST_S)
        others = share.others()
        if others is None or others <= DISTURBED_CPU:
            return True
        display.waiting(f"waiting for a quiet machine: others use {others:.0%} of it")
    return False
