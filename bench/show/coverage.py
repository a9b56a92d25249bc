"""The picture of `addbench claims --coverage`: published against modelled, a point a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.limits.coverage import BELOW, INSIDE, Held, groups
from bench.show.canvas import COLOURS, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(lines: Sequence[Held]) -> Figure:
    """Each figure's time against the middle of its range, with the range as a bar."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(STYLE):
        drawn = Figure(figsize=(9.6, 7.6))
        axes = drawn.subplots()
        drawn.subplots_adjust(left=0.085, right=0.74, top=0.875, bottom=0.085)
        inside = sum(line.state == INSIDE for line in lines)
        drawn.text(0.012, 0.98, "Published against modelled", va="top", fontsize=13,
                   fontweight="bold")  # fmt: skip
        drawn.text(
            0.012, 0.94,
            f"{len(lines)} published figures with a range, {inside} inside (bar); hollow: outside."
            "\nMilliseconds of a call, or between two; modelled: the middle of the range, on a log"
            " scale.",
            va="top", color="#555555",
        )  # fmt: skip
        ends = [value for line in lines for value in (line.model.fast, line.slow_ms, line.call_ms)]
        span = (min(ends) / 1.4, max(ends) * 1.4)
        axes.plot(span, span, color="#999999", linewidth=1, zorder=1)
        axes.text(span[1] / 1.3, span[1] / 2.6, "as modelled", color="#777777", ha="right",
                  rotation=45, rotation_mode="anchor")  # fmt: skip
        for place, group in enumerate(groups(lines, lambda line: line.claim.hardware)):
            colour, mark = COLOURS[place % len(COLOURS)], "os^Dv"[place // len(COLOURS)]
            for line in group.lines:
                axes.plot([line.call_ms] * 2, [line.model.fast, line.slow_ms], color=colour,
                          alpha=0.35, linewidth=1.6, zorder=2)  # fmt: skip
            for state, fill in ((True, colour), (False, "white")):
                some = [line for line in group.lines if (line.state == INSIDE) == state]
                axes.plot(
                    [line.call_ms for line in some],
                    [math.sqrt(line.model.fast * line.slow_ms) for line in some],
                    mark, color=colour, markerfacecolor=fill, markersize=5.5, zorder=3,
                    label=f"{group.name} ({group.count(INSIDE)} of {len(group.lines)})"
                    if state else None,
                )  # fmt: skip
        for line in lines:
            if line.state == BELOW:
                axes.annotate(f"{line.claim.id}: below its floor", (line.call_ms, line.model.fast))
        axes.set(xscale="log", yscale="log", xlim=span, ylim=span)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        axes.set_xlabel("published (ms)")
        axes.set_ylabel("modelled (ms)")
        axes.grid(True, which="major", color="#e4e4e4")
        drawn.legend(loc="upper left", bbox_to_anchor=(0.745, 0.885), title="inside, by hardware",
                     frameon=False, fontsize=9, alignment="left")  # fmt: skip
    return drawn
