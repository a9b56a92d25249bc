"""A run beside its machine's earlier ones: a panel for each cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.rows.cell import Cell
from bench.rows.store import Run
from bench.show.canvas import STYLE, hue, save
from bench.verdict.history import FEWEST_RUNS, Band
from bench.verdict.outcome import FASTER, SLOWER, Line, Outcome

ALARM = "#B00020"
"""The colour of what is slower or faster than its past."""


def draw(target: Run, outcome: Outcome, bands: Mapping[Cell, Band]) -> list[Path]:
    """Draw `history.svg` and `.png` into the run's folder; nothing where no cell has a past."""
    drawable = {
        line.cell: line for line in outcome.lines if line.head_ms and bands[line.cell].values
    }
    return save(figure(target, drawable, bands), target.path / "history") if drawable else []


def figure(target: Run, lines: Mapping[Cell, Line], bands: Mapping[Cell, Band]) -> Figure:
    """A panel for each cell: its earlier medians, the range, and this run at the right end."""
    across = min(3, len(lines))
    down = math.ceil(len(lines) / across)
    with style.context(STYLE):
        drawn = Figure(figsize=(4.2 * across + 0.4, 2.5 * down + 0.7), layout="constrained")
        drawn.suptitle(f"{target.name} against earlier runs: median latency (ms)", fontsize=12)
        axes = drawn.subplots(down, across, squeeze=False).ravel()
        for panel, (cell, line) in zip(axes, lines.items(), strict=False):
            band = bands[cell]
            count = len(band.values)
            panel.plot(range(-count, 0), band.values, "o-", color=hue(cell.backend), markersize=4)
            flagged = line.verdict in (SLOWER, FASTER)
            colour = ALARM if flagged else hue(cell.backend)
            panel.plot([0], [line.head_ms], "D", color=colour, markersize=8)
            if count >= FEWEST_RUNS:
                limit = 1 + band.limit
                panel.axhspan(band.centre / limit, band.centre * limit, color="#E8E8E8", zorder=0)
            panel.set_title(f"{cell}: {line.verdict}", fontsize=8.5, loc="left")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.margins(y=0.15)
        for panel in axes[len(lines) :]:
            panel.set_visible(False)
        drawn.supxlabel("runs ago (this one: 0); grey: not flagged; the axes do not start at 0")
    return drawn
