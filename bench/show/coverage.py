"""The picture of `addbench claims --coverage`: published against modelled, a point a figure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.limits.coverage import BELOW, INSIDE, Group, Held, groups, held, published
from bench.show.canvas import COLOURS, STYLE, image_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "published-against-modelled.svg"
"""What pages call it that show it; it lies beside them."""
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
NEAR = 0.7
"""Points of the drawing by which a number may differ: the last digits of a fit depend on the
machine that makes it. A digit that is written is one more or less, and does not."""


def fresh_pictures(pages: Sequence[Path]) -> dict[Path, bytes]:
    """The picture beside each page that shows it, where it is not as it should be."""
    files = {page.with_name(PICTURE) for page in pages if PICTURE in page.read_text()}
    if not files:
        return {}
    drawn = image_bytes(figure(held(published())), "svg")
    return {
        file: drawn for file in files if not file.exists() or not is_same(file.read_bytes(), drawn)
    }


def is_same(one: bytes, other: bytes) -> bool:
    """Whether two drawings are the same but for the last digits of their numbers."""
    if NUMBER.sub(b"#", one) != NUMBER.sub(b"#", other):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    return all(abs(float(a) - float(b)) <= NEAR for a, b in pairs)


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
            f"{len(lines)} figures of {len(Group('all', lines).sources)} sources with a range,"
            f" {inside} inside (bar); hollow: outside."
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
