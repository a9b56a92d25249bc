"""What is drawn from a picture, over strength: how right, how far moved, how fast; SVG and PNG.

From rows that `addbench sweep --strength 0.5 --quality` wrote: another shape or colour is asked for
of a drawn picture, whose place is to be kept. The more strength, the more of it can change, and the
less of it stays; one line per backend, precision, encoder, decoder and number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib import style
from matplotlib.figure import Figure

from bench.rows.cell import Cell
from bench.rows.store import Row, is_timed
from bench.rows.summary import CellRounds, by_cell
from bench.show.canvas import RUN_MARKERS, SHAPES, STYLE, Look, look_of, scale_of, shade
from core.errors import PreconditionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

Key = tuple[str, str, str, str, str, int, int]
"""Model, backend, numerics, encoder, decoder, batch, steps: what a line's points share."""


@dataclass(frozen=True)
class Facet:
    """One of the pictures side by side.

    Attributes:
        value: what of a cell it shows; None where the cell does not say.
        top: of its axis, None where the values say it.
    """

    title: str
    label: str
    value: Callable[[CellRounds], float | None]
    top: float | None = None


def is_judged(row: Row) -> bool:
    """Whether a row says how right its changes of pictures are."""
    return bool(is_timed(row) and row["quality"] and Cell.of(row).encoder)


def has_curve(rows: Sequence[Row]) -> bool:
    """Whether judged rows have strengths enough for a line."""
    return len({row["strength"] for row in rows if is_judged(row)}) > 1


def series_of(rows: Sequence[Row]) -> dict[Key, list[CellRounds]]:
    """The judged cells that start from a picture, by everything but strength.

    Raises:
        PreconditionError: there is none.
    """
    gathered: dict[Key, list[CellRounds]] = {}
    for line in by_cell([row for row in rows if is_timed(row)]):
        if not line.cell.encoder or line.quality("all") is None:
            continue
        cell = line.cell
        key = (cell.model, cell.backend_text, cell.numerics, cell.encoder, cell.decoder,
               cell.batch, cell.steps)  # fmt: skip
        gathered.setdefault(key, []).append(line)
    if not gathered:
        raise PreconditionError(
            "no row says anything of changed pictures",
            "the sweep was run without --strength or --quality, or no cell was ok",
            "addbench sweep --steps 4 --strength 0.25,0.5,0.75 --encoder vae,taesd --quality",
        )
    return {
        key: sorted(lines, key=lambda line: line.cell.strength) for key, lines in gathered.items()
    }


def figure(rows: Sequence[Row], machine: str) -> Figure:
    """The trade-off of strength.

    Raises:
        PreconditionError: no row says anything of it.
    """
    series = series_of(rows)
    looks: dict[str, Look] = {}
    for key in series:
        backend, _, options = key[1].partition(":")
        if key[1] not in looks:
            looks[key[1]] = look_of(backend, options, looks.values())
    lines = [line for of in series.values() for line in of]
    unit_ms, unit = scale_of(max(latency_ms(line) for line in lines))
    panels = (
        Facet("Changes right", "captions with every attribute right (%)",
              lambda line: 100 * (line.quality("all") or 0.0), 105),
        Facet("Shift of the object", "median of pictures with one object (px)",
              lambda line: line.quality("shift_px")),
        Facet("Latency", f"of one image, end to end, warm ({unit})",
              lambda line: latency_ms(line) / unit_ms),
    )  # fmt: skip
    columns = 2 if len(series) > 4 else 1
    deep = 0.2 * -(-len(series) // columns)
    with style.context(STYLE):
        drawn = Figure(figsize=(10.8, 4.7 + deep))
        height = drawn.get_figheight()
        captions = max(int(line.quality("captions") or 0) for line in lines)
        drawn.text(0.012, 1 - 0.14 / height, "From a picture: what strength changes, and costs",
                   va="top", fontsize=13, fontweight="bold")  # fmt: skip
        drawn.text(0.012, 1 - 0.42 / height, f"{machine}; {captions} drawn pictures a point, of"
                   " which another shape or colour is asked for in the same place.\nStrength is the"
            " share of the steps that run, of those in the legend", va="top", color="#555555",
                   linespacing=1.4)  # fmt: skip
        drawn.subplots_adjust(left=0.062, right=0.985, top=1 - 1.2 / height, wspace=0.24,
                              bottom=(0.72 + deep) / height)  # fmt: skip
        every = drawn.subplots(1, len(panels))
        for axes, panel in zip(every, panels, strict=True):
            draw_panel(axes, panel, series, looks)
        handles, labels = every[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.052, 0.01), ncols=columns,
                     frameon=False, fontsize=8.5, handlelength=3.2)  # fmt: skip
    return drawn


def latency_ms(line: CellRounds) -> float:
    """What one image of a call takes."""
    return (line.median("median_ms") or 0.0) / line.cell.batch


def draw_panel(
    axes: Axes, panel: Facet, series: dict[Key, list[CellRounds]], looks: dict[str, Look]
) -> None:
    """Draw a line for each series, its points over strength."""
    steps = sorted({key[-1] for key in series}, reverse=True)
    for key, lines in series.items():
        points = [(line.cell.strength, value) for line in lines
                  if (value := panel.value(line)) is not None]  # fmt: skip
        axes.plot([point[0] for point in points], [point[1] for point in points],
                  label=label_of(key, series),
                  **look_for(key, looks[key[1]], steps.index(key[-1])))  # fmt: skip
    places = sorted({line.cell.strength for lines in series.values() for line in lines})
    axes.set_xlim(0, 1)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_ylim(0, panel.top or 1.18 * axes.get_ylim()[1])
    axes.set_xlabel("strength")
    axes.set_ylabel(panel.label)
    axes.set_title(panel.title, loc="left")


def look_for(key: Key, look: Look, place: int) -> dict[str, Any]:
    """How a line is drawn: colour by backend, marker by encoder and steps, the tiny encoder in a
    lighter shade, dash by decoder."""
    marker = SHAPES.get(key[3], ("s", ":"))[0]
    colour = shade(look.colour, 0.45) if key[3] == "taesd" else look.colour
    return {
        "color": colour,
        "marker": RUN_MARKERS[place % len(RUN_MARKERS)].get(marker, marker),
        "linestyle": SHAPES.get(key[4], ("s", ":"))[1],
        "linewidth": 1.5,
        "markersize": 6.5,
        "zorder": 3,
        "markerfacecolor": "white" if look.hollow else colour,
        "markeredgecolor": colour if look.hollow else "white",
    }


def label_of(key: Key, series: dict[Key, list[CellRounds]]) -> str:
    """What a line is called: encoder and decoder, and of the rest what differs between lines."""
    model, backend, numerics, encoder, decoder, batch, steps = key
    differ = [len({other[place] for other in series}) > 1 for place in range(len(key))]
    words = [f"{model}: {backend}" if differ[0] else backend]
    words += [numerics] if differ[2] else []
    words += [f"encoder {encoder}, decoder {decoder}"]
    words += [f"batch {batch}"] if differ[5] else []
    return ", ".join([*words, f"{steps} steps"])
