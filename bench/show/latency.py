"""Latency and images/s against steps, as SVG and PNG.

A column per batch. Colour says the backend, its shade (or a hollow mark) the options and recipe,
marker and dash the decoder; one step count makes another picture (`dots`). Thin bars span all
samples, a cross lies over what the machine disturbed. The line through the points is the fit
`fixed cost + steps x cost per step`, drawn to zero steps, where it meets the fixed cost; dotted
where it fits badly or through too little, and the legend says how far the worst point is off.
Against NFE UNet evaluations take the place of steps: guidance takes two a step, and some schedulers
run a timestep more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.rows.fields import MODELLED
from bench.rows.stats import OFF_THE_LINE
from bench.rows.store import Row, Run, is_timed
from bench.rows.summary import CellRounds, by_cell
from bench.show.canvas import STYLE, digits, save, scale_of
from bench.show.dots import one_place, panels
from bench.show.notes import one_process
from bench.show.series import AXES, Series, doubts, places_of, series_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Shown = tuple[Run, Sequence[Row]]
"""A run, and which of its rows are drawn."""


def figure(shown: Sequence[Shown], axis: str = "steps") -> Figure | None:
    """The figure of one run or several, or None where no cell is ok."""
    lines = {target.label: by_cell(rows) for target, rows in shown}
    columns = series_of(lines, axis)
    if not columns:
        return None
    with style.context(STYLE):
        cautious = any(series.doubted for found in columns.values() for series in found)
        cautious |= one_process([line for found in lines.values() for line in found])
        head_in = 0.95 if cautious else 0.75
        if one_place(columns):
            drawn = panels(columns, head_in)
            heading(drawn, shown, drawn.get_figheight())
            return drawn
        entries = max(len(found) for found in columns.values())
        single = len(columns) == 1
        longest = max(len(legend_text(series)) for found in columns.values() for series in found)
        legend_width = 0.9 + 0.08 * longest  # a column is as wide as its legend wants
        width = 9.6 if single else max(9.6, max(4.8, legend_width) * len(columns))
        legend_in = 0.205 * (entries + 1) + 0.25
        panel_in = 3.3
        height = head_in + (panel_in if single else 2 * panel_in) + legend_in
        drawn = Figure(figsize=(width, height))
        heading(drawn, shown, height)
        shape = (1, 2) if single else (2, len(columns))
        axes = drawn.subplots(*shape, squeeze=False)
        drawn.subplots_adjust(
            left=0.75 / width,
            right=1 - 0.2 / width,
            top=1 - (head_in + 0.3) / height,
            bottom=(legend_in + 0.5) / height,
            wspace=0.24,
            hspace=0.34,
        )
        for place, (batch, found) in enumerate(columns.items()):
            above, below = (axes[0][0], axes[0][1]) if single else (axes[0][place], axes[1][place])
            latency(above, found, batch)
            throughput(below, found, batch)
            box = (above if single else below).get_position()
            legend(drawn, found, box.x0, (legend_in - 0.05) / height)
    return drawn


def heading(drawn: Figure, shown: Sequence[Shown], height: float) -> None:
    rows = [row for _, some in shown for row in some]
    models = dict.fromkeys(
        f"{row['model']} ({row['weights']} weights), {row['size'].replace('x', '×')} px"
        for row in rows
    )
    machines = dict.fromkeys(
        f"{said['cpu']}, {said['cores_allowed']} cores"
        for said in (target.header.environment for target, _ in shown)
    )
    labels = ", ".join(target.label for target, _ in shown)
    below = f"{' / '.join(machines)}; end to end, warm; {labels}"
    if all(row["provenance"] == MODELLED for row in rows):
        cards = ", ".join(dict.fromkeys(row["device"] for row in rows))
        below = f"{cards}: modelled, not measured; end to end; {labels}"
    drawn.text(
        0.12 / drawn.get_figwidth(),
        1 - 0.14 / height,
        " / ".join(models),
        va="top",
        fontsize=13,
        fontweight="bold",
    )
    drawn.text(
        0.12 / drawn.get_figwidth(),
        1 - 0.42 / height,
        below,
        va="top",
        color="#555555",
    )
    lines = [line for _, some in shown for line in by_cell(some) if line.good]
    doubted = sum(bool(doubts(line)) for line in lines)
    cautions = []
    if doubted:
        cautions.append(
            f"{doubted} of {len(lines)} cells: other processes ran, or the clock was low; a calm"
            " machine is faster"
        )
    if one_process(lines):
        cautions.append("one process a cell: close cells have no order")
    drawn.text(
        0.12 / drawn.get_figwidth(),
        1 - 0.62 / height,
        "; ".join(cautions),
        va="top",
        color="#B00020" if doubted else "#555555",
    )


def latency(axes: Axes, found: Sequence[Series], batch: int) -> None:
    largest = max(value for series in found for _, value in series.points("median_ms"))
    unit_ms, unit = scale_of(largest)
    for series in found:
        points = series.points("median_ms")
        steps = [x for x, _ in points]
        axes.plot(
            steps,
            [y / unit_ms for _, y in points],
            linestyle="none",
            markersize=6.5,
            zorder=3,
            clip_on=False,
            **series.look,
        )
        for line in series.lines:
            at = series.place(line)
            rounds = [row["median_ms"] / unit_ms for row in line.good if is_timed(row)]
            samples = [ms / unit_ms for row in line.good for ms in row["samples_ms"]]
            if len(samples) > 1:  # every call
                ends = [min(samples), max(samples)]
                axes.plot([at, at], ends, color=series.colour, linewidth=1.0, alpha=0.6, zorder=2)
            if len(rounds) > 1:  # every round beside its median
                axes.plot([at] * len(rounds), rounds, "_", color=series.colour)
        crosses(axes, series, "median_ms", unit_ms)
        intervals(axes, series, found, lambda line, ms: ms / unit_ms)
        if series.fit:
            reach = np.array([0, max(steps)])
            sound = validity(series) == SOUND
            axes.plot(
                reach,
                np.maximum(series.fit.fixed_ms + series.fit.per_step_ms * reach, 0) / unit_ms,
                linestyle=series.dash if sound else ":",
                color=series.colour,
                linewidth=1.5 if sound else 1.1,
                alpha=0.75 if sound else 0.5,
            )
    frame(axes, found, f"Latency, batch {batch}", f"latency ({unit})", from_zero=True)


def crosses(axes: Axes, series: Series, column: str, unit: float) -> None:
    """A cross over each point whose time is that of a disturbed machine."""
    for line in series.doubted:
        value = line.median(column)
        if value is not None:
            axes.plot([series.place(line)], [value / unit], "x", color="#222222",
                      markersize=8, markeredgewidth=1.3, zorder=4, clip_on=False)  # fmt: skip


def intervals(
    axes: Axes, series: Series, found: Sequence[Series], y: Callable[[CellRounds, float], float]
) -> None:
    """Bars of modelled times: all parts resident, and thinner where programs are switched.

    Beside the points, each series in a place of its own. `y`: of a latency in milliseconds.
    """
    width = 0.012 * max(other.place(line) for other in found for line in other.lines)
    for line in series.lines:
        low, high, switching = line.median("low_ms"), line.median("high_ms"), line.switching_high_ms
        if low is None or high is None:
            continue
        x = series.place(line) + width * (1 + found.index(series))
        axes.plot([x, x], [y(line, low), y(line, high)], color=series.colour, linewidth=2.2)
        if switching is not None:
            ends = [y(line, high), y(line, switching)]
            axes.plot([x, x], ends, color=series.colour, linewidth=0.7)


def throughput(axes: Axes, found: Sequence[Series], batch: int) -> None:
    for series in found:
        points = series.points("images_per_s")
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            linestyle=series.dash,
            linewidth=1.5,
            markersize=6.5,
            clip_on=False,
            zorder=3,
            **series.look,
        )
        crosses(axes, series, "images_per_s", 1.0)
        intervals(axes, series, found, lambda line, ms: 1e3 * line.cell.batch / ms)
    frame(axes, found, f"Images per second, batch {batch}", "images/s", from_zero=False)


def frame(axes: Axes, found: Sequence[Series], title: str, label: str, *, from_zero: bool) -> None:
    """Titles, ticks at the measured steps, axes from zero: lengths can be compared by eye."""
    steps = places_of(found)
    modelled = ", modelled" if all(series.modelled for series in found) else ""
    axes.set_title(f"{title}{modelled}", loc="left")
    axes.set_ylabel(label)
    axes.set_xlabel(AXES[found[0].axis])
    places = [0, *steps] if from_zero else steps
    axes.set_xticks(places, spread(places))
    margin = 0.06 * max(steps)
    axes.set_xlim(0 if from_zero else min(steps) - margin, max(steps) + margin)
    axes.set_ylim(0, 1.04 * axes.get_ylim()[1])


def spread(places: Sequence[int]) -> list[str]:
    """Labels for ticks, the most steps and 1 first; empty where one would touch another."""
    digit = 0.025 * max(places)  # of an axis 3.5 inches long, with some air
    labelled: list[int] = []
    for place in sorted(places, key=lambda each: (each != max(places), each != 1, -each)):
        if all(
            abs(place - other) >= digit * (len(str(place)) + len(str(other))) / 2
            for other in labelled
        ):
            labelled.append(place)
    return [str(place) if place in labelled else "" for place in places]


def legend(drawn: Figure, found: Sequence[Series], left: float, top: float) -> None:
    """The series of one column with their fits, below it."""
    rounds = max(len(line.good) for series in found for line in series.lines)
    rows = [row for series in found for line in series.lines for row in line.good]
    handles = [
        Line2D(
            [],
            [],
            linestyle=series.dash if len(series.points("median_ms")) > 1 else "none",
            markersize=7,
            label=legend_text(series),
            **series.look | {"markeredgewidth": 1.0},
        )
        for series in found
    ]
    drawn.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left, top),
        borderaxespad=0,
        frameon=False,
        handlelength=3.2,
        alignment="left",
        title="; ".join(
            words
            for words, there in (
                ("bars: all samples", any(len(r["samples_ms"]) > 1 for r in rows)),
                ("crosses: disturbed", any(series.doubted for series in found)),
                ("one step count: no fit", all(series.line is None for series in found)),
                ("lines: fit through the medians", any(series.fit for series in found)),
                ("dotted: not to be relied on", any(unsound(series) for series in found)),
                ("dashes: single rounds", rounds > 1),
                ("thick bars: 8 of 10 draws, thin: switching", any(s.modelled for s in found)),
            )
            if there
        ),
        title_fontproperties={"size": 9},
    )


def legend_text(series: Series) -> str:
    return f"{series.label}: {fit_text(series)}"


def fit_text(series: Series) -> str:
    """The fitted cost of a step and of all else, and what that is worth."""
    fit, line = series.fit, series.line
    largest = max(value for _, value in series.points("median_ms"))
    unit_ms, unit = scale_of(largest)
    if line is None:
        return f"{digits(largest / unit_ms)} {unit}"
    if fit is None:
        return f"no line: {line.refused}"
    per_step, fixed = fit.per_step_ms / unit_ms, fit.fixed_ms / unit_ms
    each = "step" if series.axis == "steps" else "evaluation"
    worth = validity(series)
    worst = f"at most {100 * fit.worst:.1f}% off"
    more = f"+ {digits(fixed)} {unit} fixed" if fixed >= 0 else "and nothing fixed"
    return f"{digits(per_step)} {unit}/{each} {more}, {worst if worth == SOUND else worth}"


SOUND = "fits"


def validity(series: Series) -> str:
    """What a series' fit is worth in a few words; SOUND where nothing speaks against it."""
    fit = series.fit
    assert fit is not None
    if fit.worst > OFF_THE_LINE:
        return f"a point is {100 * fit.worst:.0f}% off, within its error"
    if series.doubted:
        return f"through {len(series.doubted)} disturbed of {fit.points} points"
    if fit.points < 3:
        return "two points, not tested"
    return SOUND


def unsound(series: Series) -> bool:
    return series.fit is not None and validity(series) != SOUND


def draw(shown: Sequence[Shown], stem: Path) -> list[Path]:
    """Draw `stem.svg` and `stem.png`; nothing where no cell is ok."""
    drawn = figure(shown)
    return [] if drawn is None else save(drawn, stem)


def write(target: Run, rows: Sequence[Row]) -> list[Path]:
    """Write `plot.svg` and `plot.png` into the run folder."""
    return draw([(target, rows)], target.path / "plot")
