"""The chart of `addbench frontier`: FID-5k against latency, each point with a label of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from bench.limits.frontier import MEASURED, MODELLED, SIZE, Chart, Point, markdown, table_csv
from bench.show.canvas import NEUTRAL, STYLE, plain_log, save, scale_of
from core.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOOK: dict[str, dict[str, Any]] = {
    MEASURED: {"color": NEUTRAL, "markerfacecolor": NEUTRAL},
    MODELLED: {"color": NEUTRAL, "markerfacecolor": "white"},
}
WORDS = {MEASURED: "measured", MODELLED: "modelled"}
ROOM = 2.5
"""Points of air around a label."""
NEAR = 10.0
"""Points from a mark's middle to a label that needs no line to it."""


def figure(chart: Chart) -> Figure:
    unit_ms, unit = scale_of(max(point.latency_ms for point in chart.points))
    with style.context(STYLE):
        drawn = Figure(figsize=(9.6, 6.0))
        axes = drawn.subplots()
        drawn.subplots_adjust(left=0.075, right=0.985, top=0.81, bottom=0.095)
        drawn.text(0.012, 0.975, "Quality against latency: one base model, ways to fewer steps",
                   va="top", fontsize=13, fontweight="bold")  # fmt: skip
        drawn.text(
            0.012, 0.93,
            f"{chart.hardware}; {SIZE[0]} px, one image; {chart.conditions}.\n"
            f"{chart.model}.\n"
            "FID-5k: zero-shot on COCO, published (ADD paper, Table 2; its own Fig. 5 has ELO).",
            va="top", color="#555555",
        )  # fmt: skip
        for point in chart.points:
            mark(axes, point, unit_ms)
        axes.set_xscale("log")
        axes.set_xlabel(f"latency ({unit})")
        axes.set_ylabel("FID-5k (lower is better; axis inverted)")
        fids = [point.method.fid for point in chart.points]
        axes.set_ylim(max(fids) + 1.5, min(fids) - 2.0)
        latencies = [point.latency_ms / unit_ms for point in chart.points]
        axes.set_xlim(min(latencies) / 1.25, max(latencies) * 1.6)
        plain_log(axes.xaxis)
        key(drawn, chart)
        label_all(drawn, axes, chart.points, unit_ms)
    return drawn


def write(chart: Chart, table: Path, plot: Path) -> list[Path]:
    """Write `table.md`, `table.csv`, `plot.svg` and `plot.png`."""
    files = [table.with_name(f"{table.name}.{kind}") for kind in ("md", "csv")]
    write_atomic(files[0], f"# Quality against latency\n\n{markdown(chart)}")
    write_atomic(files[1], table_csv(chart))
    return [*files, *save(figure(chart), plot)]


def mark(axes: Axes, point: Point, unit_ms: float) -> None:
    axes.plot([point.latency_ms / unit_ms], [point.method.fid], "o", markersize=8,
              markeredgewidth=1.8, zorder=3, **LOOK[point.provenance])  # fmt: skip


def key(drawn: Figure, chart: Chart) -> None:
    """What the marks mean, above the axes: among the points it would look like one."""
    kinds = [kind for kind in LOOK if any(p.provenance == kind for p in chart.points)]
    handles = [
        Line2D([], [], marker="o", linestyle="none", markersize=8, markeredgewidth=1.8,
               label=f"latency {WORDS[kind]}", **LOOK[kind])
        for kind in kinds
    ]  # fmt: skip
    drawn.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(0.985, 0.985), borderaxespad=0,
        frameon=False,
    )  # fmt: skip


# ---- labels


def offsets() -> Iterator[tuple[float, float, str, str]]:
    """(right, up, horizontal and vertical alignment) in points, nearest first."""
    for radius in (NEAR, 18, 26, 36, 48, 62):
        for degrees in (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240):
            angle = math.radians(degrees)
            right, up = radius * math.cos(angle), radius * math.sin(angle)
            across = "center" if abs(right) < 1 else ("left" if right > 0 else "right")
            yield right, up, across, "center" if abs(up) < 1 else ("bottom" if up > 0 else "top")


def label_all(drawn: Figure, axes: Axes, points: Sequence[Point], unit_ms: float) -> None:
    """A label beside each point, at the nearest place that is free."""
    renderer = FigureCanvasAgg(drawn).get_renderer()
    dot = drawn.dpi / 72
    taken: list[Bbox] = []
    for point in points:
        x, y = axes.transData.transform((point.latency_ms / unit_ms, point.method.fid))
        taken.append(Bbox.from_extents(x - 6 * dot, y - 6 * dot, x + 6 * dot, y + 6 * dot))
    inside = axes.get_window_extent(renderer)
    for point in sorted(points, key=lambda one: one.method.fid):
        taken.append(label(axes, point, unit_ms, taken, inside, renderer, dot))


def label(
    axes: Axes, point: Point, unit_ms: float, taken: Sequence[Bbox], inside: Bbox,
    renderer: Any, dot: float,
) -> Bbox:  # fmt: skip
    """Write one label; its box on the canvas. Where no place is free it takes the farthest."""
    where = (point.latency_ms / unit_ms, point.method.fid)
    mark_x, mark_y = axes.transData.transform(where)
    others = [box for box in taken if not box.contains(mark_x, mark_y)]
    places = list(offsets())
    for place, (right, up, across, along) in enumerate(places):
        far = math.hypot(right, up) > NEAR + 0.5
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 6}
        written = axes.annotate(
            point.method.label, where, xytext=(right, up), textcoords="offset points",
            ha=across, va=along, fontsize=9, arrowprops=line if far else None,
        )  # fmt: skip
        written.update_positions(renderer)
        # An annotation's own extent holds its line too: only the words must be alone.
        box = Text.get_window_extent(written, renderer).padded(ROOM * dot)
        crossed = far and any(
            other.contains(mark_x + share * right * dot, mark_y + share * up * dot)
            for other in others
            for share in (0.2, 0.4, 0.6, 0.8, 1.0)
        )
        free = contains(inside, box) and not any(box.overlaps(other) for other in taken)
        if (free and not crossed) or place == len(places) - 1:
            break
        written.remove()
    return box


def contains(outer: Bbox, inner: Bbox) -> bool:
    return (
        outer.x0 <= inner.x0 and inner.x1 <= outer.x1
        and outer.y0 <= inner.y0 and inner.y1 <= outer.y1
    )  # fmt: skip
