"""The series of a plot against steps: their cells, what they look like, where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.rows.fields import MODELLED
from bench.rows.stats import StepFit, fit_steps
from bench.rows.summary import CellRounds
from bench.show.canvas import RUN_MARKERS, SHAPES, Look, look_of

AXES = {"steps": "denoising steps", "nfe": "UNet evaluations of an image (NFE)"}
"""What `--x` takes -> the label of the axis."""


DOUBTFUL = ("disturbed", "throttled")
"""Flags of a time that is the machine's fault: it would be another on a calm one."""


def doubts(line: CellRounds) -> list[str]:
    """Which of DOUBTFUL at least half of a cell's rounds carry, and so perhaps its median."""
    return [
        flag
        for flag in DOUBTFUL
        if 2 * sum(flag in row["flags"] for row in line.good) >= len(line.good) > 0
    ]


@dataclass(frozen=True)
class Series:
    """The points of one line: cells that differ in steps only, ok ones. `axis`: a key of AXES."""

    label: str
    drawn: Look
    marker: str
    dash: Any
    lines: Sequence[CellRounds]
    axis: str = "steps"

    @property
    def colour(self) -> str:
        return self.drawn.colour

    @property
    def look(self) -> dict[str, Any]:
        """What its points look like, as matplotlib takes it."""
        hollow = self.drawn.hollow
        face, edge = ("white", self.colour) if hollow else (self.colour, "white")
        return {
            "marker": self.marker,
            "color": self.colour,
            "markerfacecolor": face,
            "markeredgecolor": edge,
            "markeredgewidth": 1.4 if hollow else 0.8,
        }

    @property
    def doubted(self) -> list[CellRounds]:
        """The cells whose time is that of a busy or hot machine."""
        return [line for line in self.lines if doubts(line)]

    @property
    def modelled(self) -> bool:
        return all(MODELLED in line.provenance for line in self.lines)

    def place(self, line: CellRounds) -> int:
        """Where a cell lies on the x axis."""
        nfe = line.median("nfe")
        return line.cell.steps if self.axis == "steps" or nfe is None else int(nfe)

    def points(self, column: str) -> list[tuple[int, float]]:
        values = [(self.place(line), line.median(column)) for line in self.lines]
        return sorted((place, value) for place, value in values if value is not None)

    @property
    def line(self) -> StepFit | None:
        """The line through its points, whatever it is worth; None at one step count."""
        timed = [line for line in self.lines if line.median("median_ms") is not None]
        ordered = sorted(timed, key=self.place)
        points = [(self.place(line), line.median("median_ms") or 0.0) for line in ordered]
        return fit_steps(points, [line.error_ms for line in ordered])

    @property
    def fit(self) -> StepFit | None:
        """The line where its points support it: what a plot draws and a page says."""
        line = self.line
        return None if line is None or line.refused else line


def series_of(
    runs: Mapping[str, Sequence[CellRounds]], axis: str = "steps"
) -> dict[int, list[Series]]:
    """Batch -> its series, backends in the order of the runs, so that colours agree over columns.

    `runs`: what each run is called -> its cells; names stand in the legend where there are several.
    """
    keys: dict[tuple[str, str, str, str], list[CellRounds]] = {}
    for name, lines in runs.items():
        for line in lines:
            if line.median("median_ms") is not None:
                cell = line.cell
                key = (name, cell.backend_text, cell.numerics, cell.recipe_text)
                keys.setdefault(key, []).append(line)
    good = [line for lines in keys.values() for line in lines]
    mixed = len({line.cell.numerics for line in good}) > 1
    recipes = len({line.cell.recipe_text for line in good}) > 1
    looks: dict[tuple[str, str, str, str], Look] = {}
    for key, lines in keys.items():
        cell = lines[0].cell
        # The same backend looks alike in every run: runs are told apart by markers.
        taken = [look for other, look in looks.items() if other[0] == key[0]]
        looks[key] = look_of(cell.backend, cell.options, taken)
    found: dict[int, list[Series]] = {}
    for batch in sorted({line.cell.batch for line in good}):
        for key, lines in keys.items():
            for decoder in dict.fromkeys(line.cell.decoder for line in good):
                mine = [
                    line
                    for line in lines
                    if line.cell.decoder == decoder and line.cell.batch == batch
                ]
                if not mine:
                    continue
                cell = mine[0].cell
                numerics = f" ({cell.storage} weights, {cell.precision})" if mixed else ""
                recipe = f", {cell.recipe_text}" if recipes and cell.recipe_text else ""
                if any(MODELLED in line.provenance for line in mine):
                    numerics += ", modelled"
                run = f"{key[0]}: " if len(runs) > 1 else ""
                marker, dash = SHAPES.get(decoder, ("h", ":"))
                markers = RUN_MARKERS[list(runs).index(key[0]) % len(RUN_MARKERS)]
                found.setdefault(batch, []).append(
                    Series(
                        f"{run}{cell.backend_text}, {decoder}{recipe}{numerics}",
                        looks[key],
                        markers.get(marker, marker),
                        dash,
                        mine,
                        axis,
                    )
                )
    return found


def places_of(found: Sequence[Series]) -> list[int]:
    return sorted({series.place(line) for series in found for line in series.lines})
