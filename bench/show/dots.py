"""Latencies at one step count, as SVG and PNG: a line a series, its name and figures in words.

A panel per batch, in the order of the latency: with one step count there is no line to draw, and
names beside the points need no legend. Thin bars span all samples, a cross lies over what the
machine disturbed, short dashes are single rounds; of modelled times bars span the likely, thinner
where programs are switched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from bench.rows.store import is_timed
from bench.show.canvas import digits, scale_of
from bench.show.series import AXES, Series, places_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_IN, PANEL_IN, CHARACTER_IN = 0.22, 0.75, 0.078
"""Inches of a line, of a panel's title and axis, of a character of a name."""
FIGURES_IN, DOTS_IN = 1.9, 4.6
"""Inches of the words at the right, of the least width of the dots."""


def one_place(columns: Mapping[int, Sequence[Series]]) -> bool:
    """Whether each batch has a single step count, and series enough to be told apart by name."""
    several = max(len(each) for each in columns.values()) > 1
    return several and all(
        len(places_of(each)) == 1 and all(len(series.lines) == 1 for series in each)
        for each in columns.values()
    )


def panels(columns: Mapping[int, Sequence[Series]], head_in: float) -> Figure:
    """The figure below a heading of `head_in` inches, which is left free."""
    names_in = 0.3 + CHARACTER_IN * max(len(s.label) for each in columns.values() for s in each)
    heights = [PANEL_IN + ROW_IN * len(each) for each in columns.values()]
    width, height = names_in + DOTS_IN + FIGURES_IN, head_in + sum(heights) + 0.3
    drawn = Figure(figsize=(width, height))
    top = height - head_in
    for (batch, found), panel_in in zip(columns.items(), heights, strict=True):
        bottom = top - panel_in
        rows_in = ROW_IN * len(found)
        box = (names_in / width, (bottom + 0.45) / height, DOTS_IN / width, rows_in / height)
        panel(drawn.add_axes(box), found, batch)
        top = bottom
    drawn.text(0.12 / width, 0.1 / height, marks_text(columns), color="#555555", fontsize=8.5)
    return drawn


def panel(axes: Axes, found: Sequence[Series], batch: int) -> None:
    ordered = sorted(found, key=lambda series: -series.points("median_ms")[0][1])
    unit_ms, unit = scale_of(max(series.points("median_ms")[0][1] for series in found))
    for y, series in enumerate(ordered):
        (line,) = series.lines
        median = series.points("median_ms")[0][1]
        axes.plot([median / unit_ms], [y], markersize=6.5, zorder=3, clip_on=False,
                  linestyle="none", **series.look)  # fmt: skip
        samples = [ms / unit_ms for row in line.good for ms in row["samples_ms"]]
        rounds = [row["median_ms"] / unit_ms for row in line.good if is_timed(row)]
        if len(samples) > 1:
            ends = [min(samples), max(samples)]
            axes.plot(ends, [y, y], color=series.colour, linewidth=1.0, alpha=0.6, zorder=2)
        if len(rounds) > 1:
            axes.plot(rounds, [y] * len(rounds), "|", color=series.colour)
        low, high, switching = line.median("low_ms"), line.median("high_ms"), line.switching_high_ms
        if low is not None and high is not None:
            axes.plot([low / unit_ms, high / unit_ms], [y, y], color=series.colour, linewidth=2.2)
            if switching is not None:
                ends = [high / unit_ms, switching / unit_ms]
                axes.plot(ends, [y, y], color=series.colour, linewidth=0.7)
        if series.doubted:
            axes.plot([median / unit_ms], [y], "x", color="#222222", markersize=8,
                      markeredgewidth=1.3, zorder=4, clip_on=False)  # fmt: skip
        pace = f"{digits(1e3 * batch / median)} images/s"
        axes.annotate(f"{digits(median / unit_ms)} {unit}, {pace}", (1, y), (8, 0),
                      xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="center", fontsize=9, annotation_clip=False)  # fmt: skip
    (place,) = places_of(found)
    what = AXES[found[0].axis] if place != 1 else AXES[found[0].axis].replace("steps", "step", 1)
    modelled = ", modelled" if all(series.modelled for series in found) else ""
    axes.set_title(f"Latency ({unit}), {place} {what}, batch {batch}{modelled}", loc="left")
    axes.set_yticks(range(len(ordered)), [series.label for series in ordered])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.set_xlim(0, 1.02 * axes.get_xlim()[1])


def marks_text(columns: Mapping[int, Sequence[Series]]) -> str:
    """What the marks are that this figure has."""
    every = [series for each in columns.values() for series in each]
    rows = [row for series in every for line in series.lines for row in line.good]
    rounds = max(len(line.good) for series in every for line in series.lines)
    said = (
        ("bars: all samples", any(len(row["samples_ms"]) > 1 for row in rows)),
        ("crosses: disturbed", any(series.doubted for series in every)),
        ("dashes: single rounds", rounds > 1),
        ("thick bars: 8 of 10 draws, thin: switching", any(s.modelled for s in every)),
    )
    return "; ".join(words for words, there in said if there)
