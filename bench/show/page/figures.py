"""The plots that only the page has, and any plot as markup."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.rows.fields import MODELLED
from bench.rows.summary import CellRounds
from bench.show.canvas import COLOURS, NEUTRAL, STYLE, digits, hue, image_bytes, scale_of

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 5.4
SLOT_IN = 0.38
"""Height of a cell's slot: its label and, below it, its mark."""
STAGES = (
    ("text", "text encoders", COLOURS[4]),
    ("encode", "encoder of the picture", COLOURS[3]),
    ("unet_first", "first UNet step", COLOURS[0]),
    ("unet_later", "later UNet steps", "#5E9BC6"),
    ("decode", "decoder", COLOURS[5]),
    ("rest", "rest", "#8A8A8A"),
    ("load", "loading parts (low memory)", COLOURS[1]),
)


def stage_ms(line: CellRounds, stage: str) -> float:
    """Milliseconds of a stage in one call, medians; all later UNet steps together."""
    if stage == "unet_later":
        evaluations = 2 if line.cell.guidance_mode in ("batch", "calls") else 1
        timesteps = (line.median("nfe") or line.cell.kept) / evaluations  # PNDM's are one more
        return (line.stage("unet_step") or 0.0) * (timesteps - 1)
    return line.stage(stage) or 0.0


def labels(lines: Sequence[CellRounds]) -> list[str]:
    """A name for each cell; with the numerics where it would not be the only one of that name."""
    names = [str(line.cell) for line in lines]
    return [
        name if names.count(name) == 1 else f"{name}, {line.cell.numerics}"
        for name, line in zip(names, lines, strict=True)
    ]


Panel = Callable[["Axes", Sequence[CellRounds], float], None]


def slotted(
    lines: Sequence[CellRounds], largest: Callable[[CellRounds], float], draw: Panel
) -> Figure:
    """A panel per batch, a slot per cell. `draw` gets the axes, its lines, and ms per unit."""
    from matplotlib import style
    from matplotlib.figure import Figure

    panels = [
        [line for line in lines if line.cell.batch == batch]
        for batch in sorted({line.cell.batch for line in lines})
    ]
    slots = [len(found) + 2.2 for found in panels]
    # A `$` in an option is a dollar, no formula.
    with style.context([STYLE, {"text.parse_math": False}]):
        size = (WIDTH_IN, SLOT_IN * (sum(slots) + 1.2))
        drawn = Figure(figsize=size, layout="constrained")
        for axes, found in zip(
            drawn.subplots(len(panels), 1, height_ratios=slots, squeeze=False)[:, 0],
            panels,
            strict=True,
        ):
            unit_ms, unit = scale_of(max(largest(line) for line in found))
            for place, label in enumerate(labels(found)):
                axes.text(
                    0,
                    place - 0.24,
                    label,
                    fontsize=8,
                    va="bottom",
                    transform=axes.get_yaxis_transform(),
                )
            draw(axes, found, unit_ms)
            modelled = ", modelled" * all(line.provenance == MODELLED for line in found)
            axes.set_title(f"batch {found[0].cell.batch}{modelled}", loc="left")
            axes.set_xlabel(f"latency of a call ({unit})")
            axes.set_xlim(0, 1.16 * max(largest(line) for line in found) / unit_ms)
            axes.set_ylim(len(found) - 0.4, -0.85)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        handles, names = drawn.axes[0].get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside lower left", frameon=False, ncols=3, fontsize=8)
    return drawn


def stages(lines: Sequence[CellRounds]) -> Figure:
    """Where a call's time goes: a stacked bar per cell."""

    def total(line: CellRounds) -> float:
        return sum(stage_ms(line, stage) for stage, _, _ in STAGES)

    def draw(axes: Axes, found: Sequence[CellRounds], unit_ms: float) -> None:
        left = [0.0] * len(found)
        for stage, name, colour in STAGES:
            widths = [stage_ms(line, stage) / unit_ms for line in found]
            if stage == "load" and not any(widths):
                continue
            places = [place + 0.03 for place in range(len(found))]
            axes.barh(places, widths, 0.46, left=left, color=colour, label=name)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for place, end in enumerate(left):
            beside(axes, end, place, digits(end))

    return slotted(lines, total, draw)


def cold(lines: Sequence[CellRounds]) -> Figure:
    """The first call of each cell beside its median; hollow where the process was warm already."""

    def largest(line: CellRounds) -> float:
        return max(line.median("cold_ms") or 0.0, line.median("median_ms") or 0.0)

    def draw(axes: Axes, found: Sequence[CellRounds], unit_ms: float) -> None:
        for place, line in enumerate(found):
            warm_ms, cold_ms = line.median("median_ms") or 0.0, line.median("cold_ms") or 0.0
            first = all(row["process_cold"] for row in line.good)
            ends = [warm_ms / unit_ms, cold_ms / unit_ms]
            axes.plot(ends, [place + 0.03] * 2, color="#B5B5B5", linewidth=2, zorder=2)
            axes.plot(ends[:1], [place + 0.03], "o", color=hue(line.cell.backend), markersize=7,
                      zorder=3)  # fmt: skip
            axes.plot(
                ends[1:],
                [place + 0.03],
                "D",
                color=hue(line.cell.backend),
                markerfacecolor=hue(line.cell.backend) if first else "white",
                markersize=6.5,
                zorder=3,
            )
            beside(axes, max(ends), place, f"{cold_ms / warm_ms:.2f}×")
        blank: tuple[list[float], list[float]] = ([], [])
        axes.plot(*blank, "o", color=NEUTRAL, markersize=7, label="warm (median)")
        axes.plot(*blank, "D", color=NEUTRAL, markersize=6.5, label="process's first call")
        axes.plot(*blank, "D", color=NEUTRAL, markerfacecolor="white", label="cell's first call")

    return slotted(lines, largest, draw)


def beside(axes: Axes, x: float, place: int, text: str) -> None:
    """A small text right of a mark."""
    axes.annotate(
        text,
        (x, place + 0.03),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color="#333333",
    )


def duration(value_ms: float) -> tuple[str, str]:
    """Three digits and the unit."""
    unit_ms, unit = scale_of(value_ms)
    return digits(value_ms / unit_ms), unit


# ---- as markup


def inline(drawn: Figure, prefix: str, words: str) -> Markup:
    """The figure as an <svg> element. `words` say what it shows to those who do not see it.

    Ids get `prefix`: several SVGs share one document, and each counts its ids from the start.
    """
    from markupsafe import Markup, escape

    text = image_bytes(drawn, "svg").decode()
    text = re.sub(
        r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S
    )
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1))


@dataclass(frozen=True)
class Trace:
    """The samples of a cell, round after round, in a box of 100 x 40.

    Attributes:
        rounds, samples: how many of each.
        median: of the rounds, with its unit.
        low, high: how far the samples go below and above it, as fractions.
        lines: the points of each round's polyline.
        middle: height of the median in the box.
    """

    rounds: int
    samples: int
    median: str
    low: float
    high: float
    lines: Sequence[str]
    middle: float


LEAST_SPAN = 0.02
"""A trace's box is at least this share of the median high: quiet samples look quiet."""
GAP = 2
"""Samples' widths between two rounds."""


def trace(line: CellRounds) -> Trace:
    """Every sample of the rounds that are ok, in the order they were taken."""
    median = line.median("median_ms") or 1.0
    rounds = [[sample / median - 1 for sample in row["samples_ms"]] for row in line.good]
    every = [value for values in rounds for value in values]
    low, high = min(every), max(every)
    slack = max(0.0, LEAST_SPAN - (high - low)) / 2
    bottom, span = low - slack, high - low + 2 * slack
    step = 100 / max(1, len(every) - 1 + (GAP - 1) * (len(rounds) - 1))

    def y(value: float) -> float:
        return round(38 - 36 * (value - bottom) / span, 2)

    lines, start = [], 0
    for values in rounds:
        points = [f"{(start + place) * step:.2f},{y(value)}" for place, value in enumerate(values)]
        lines.append(" ".join(points if len(points) > 1 else points * 2))  # no length: a dot
        start += len(values) - 1 + GAP
    text = " ".join(duration(median))
    return Trace(len(rounds), len(every), text, low, high, lines, y(0.0))
