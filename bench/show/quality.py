"""Prompt following against latency, as SVG and PNG.

After Fig. 5 of the ADD paper (Sauer et al., arXiv 2311.17042), with prompt following in place of
its ELO score and latencies measured here. From rows that `addbench sweep --quality` wrote; one line
per model, backend, options, precision and decoder, one point per step count.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.rows.store import Row, Run, is_timed
from bench.show.canvas import SHAPES, STYLE, Look, look_of, scale_of
from core.errors import PreconditionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[int, float, float]
"""Steps, median latency of one image in ms, share of captions all right."""


def series_of(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Point]]:
    """What is judged and ok, by everything but steps; a point per step count over all rounds.

    Raises:
        PreconditionError: no row was judged, or runs of several machines are mixed.
    """
    judged: dict[tuple[str, ...], dict[int, list[Row]]] = {}
    for row in rows:
        if not is_timed(row) or not row["quality"] or row.get("encoder"):
            continue  # a change of a picture is another task: bench.show.strength
        backend = row["backend"] + (f":{row['options']}" if row["options"] else "")
        key = (row["model"], backend, row["precision"], row["decoder"])
        judged.setdefault(key, {}).setdefault(row["steps"], []).append(row)
    if not judged:
        raise PreconditionError(
            "no row says anything of quality",
            "the sweep was run without --quality, no cell was ok, or all start from a picture",
            "addbench sweep --quality; of pictures: addbench show --as strength",
        )
    return {
        key: [
            (
                steps,
                median(row["median_ms"] / row["batch"] for row in rounds),
                median(row["quality"]["all"] for row in rounds),
            )
            for steps, rounds in sorted(by_steps.items())
        ]
        for key, by_steps in judged.items()
    }


def machine_of(targets: Sequence[Run]) -> str:
    """The machine that all of some runs were measured on.

    Raises:
        PreconditionError: they come from several.
    """
    machines = {
        f"{said['cpu']}, {said['cores_allowed']} cores"
        for said in (target.header.environment for target in targets)
    }
    if len(machines) > 1:
        raise PreconditionError(
            "these runs come from different machines",
            "; ".join(sorted(machines)),
            "draw one plot for each machine",
        )
    return machines.pop()


def figure(rows: Sequence[Row], machine: str) -> Figure:
    found = series_of(rows)
    looks: dict[tuple[str, ...], Look] = {}
    for kind in dict.fromkeys(key[:2] for key in found):
        backend, _, options = kind[1].partition(":")
        looks[kind] = look_of(backend, options, looks.values())
    unit_ms, unit = scale_of(max(point[1] for points in found.values() for point in points))
    with style.context(STYLE):
        drawn = Figure(figsize=(9.6, 4.6 + 0.2 * len(found)))
        captions = max(row["quality"]["captions"] for row in rows if row["quality"])
        height = drawn.get_figheight()
        drawn.text(0.012, 1 - 0.14 / height, "Quality against speed", va="top", fontsize=13,
                   fontweight="bold")  # fmt: skip
        drawn.text(0.012, 1 - 0.42 / height, f"{machine}; latency of one image, end to end, warm;"
                   f" {captions} held-out captions a point", va="top", color="#555555")  # fmt: skip
        left, right = drawn.subplots(1, 2)
        drawn.subplots_adjust(left=0.07, right=0.98, top=1 - 1.0 / height, wspace=0.2,
                              bottom=(0.75 + 0.2 * len(found)) / height)  # fmt: skip
        for key, points in found.items():
            drawn_as = looks[key[:2]]
            colour = drawn_as.colour
            lower = list(looks).index(key[:2]) % 2 == 0
            marker, dash = SHAPES.get(key[3], ("s", ":"))
            look: dict[str, Any] = {
                "color": colour, "marker": marker, "linestyle": dash, "linewidth": 1.5,
                "markersize": 6.5, "zorder": 3,
                "markerfacecolor": "white" if drawn_as.hollow else colour,
                "markeredgecolor": colour if drawn_as.hollow else "white",
            }  # fmt: skip
            label = f"{key[0]}: {key[1]}, {key[2]}, {key[3]}"
            shares = [100 * point[2] for point in points]
            left.plot([point[1] / unit_ms for point in points], shares, label=label, **look)
            right.plot([point[0] for point in points], shares, **look)
            for steps, latency, share in points:
                above = not lower or share < 0.1
                left.annotate(f"{steps}", (latency / unit_ms, 100 * share),
                              xytext=(4, 5 if above else -12),
                              textcoords="offset points", fontsize=8, color=colour)  # fmt: skip
        frame(left, f"latency of one image ({unit})", "Against latency; numbers: steps")
        frame(right, "denoising steps", "Against steps")
        counts = sorted({point[0] for points in found.values() for point in points})
        right.set_xticks(counts, [str(count) for count in counts])
        drawn.legend(loc="lower left", bbox_to_anchor=(0.06, 0.01), frameon=False, fontsize=8.5,
                     handlelength=3.2)  # fmt: skip
    return drawn


def frame(axes: Axes, label: str, title: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(label)
    axes.set_ylabel("captions with every attribute right (%)")
    axes.set_title(title, loc="left")
    axes.set_ylim(0, 105)
