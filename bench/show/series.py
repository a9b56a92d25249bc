"""The series of a plot against steps: their cells, what they look like, where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.rows.stats import Fit, fit_steps
from bench.rows.store import MODELLED
from bench.rows.summary import CellRounds

# Okabe and Ito's palette: tells apart for all common forms of colour blindness. Yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SHAPES = {"vae": ("o", "-"), "taesd": ("^", (0, (5, 2)))}
AXES = {"steps": "denoising steps", "nfe": "UNet evaluations of an image (NFE)"}
"""What `--x` takes -> the label of the axis."""


@dataclass(frozen=True)
class Series:
    """The points of one line: cells that differ in steps only, ok ones. `axis`: a key of AXES."""

    label: str
    colour: str
    marker: str
    dash: Any
    lines: Sequence[CellRounds]
    axis: str = "steps"
    hollow: bool = False

    @property
    def look(self) -> dict[str, Any]:
        """Of its points."""
        face, edge = ("white", self.colour) if self.hollow else (self.colour, "white")
        return {
            "marker": self.marker,
            "color": self.colour,
            "markerfacecolor": face,
            "markeredgecolor": edge,
            "markeredgewidth": 1.4 if self.hollow else 0.8,
        }

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
    def fit(self) -> Fit | None:
        return fit_steps(self.points("median_ms"))


def series_of(lines: Sequence[CellRounds], axis: str = "steps") -> dict[int, list[Series]]:
    """Batch -> its series, backends in the order of the run, so that colours agree over columns."""

    def key_of(line: CellRounds) -> tuple[str, str, str]:
        return line.cell.backend_text, line.cell.numerics, line.cell.recipe_text

    good = [line for line in lines if line.median("median_ms") is not None]
    mixed = len({line.cell.numerics for line in good}) > 1
    recipes = len({line.cell.recipe_text for line in good}) > 1
    backends = list(dict.fromkeys(map(key_of, good)))
    found: dict[int, list[Series]] = {}
    for batch in sorted({line.cell.batch for line in good}):
        for place, key in enumerate(backends):
            for decoder in dict.fromkeys(line.cell.decoder for line in good):
                mine = [
                    line
                    for line in good
                    if key_of(line) == key
                    and line.cell.decoder == decoder
                    and line.cell.batch == batch
                ]
                if not mine:
                    continue
                cell = mine[0].cell
                numerics = f" ({cell.storage} weights, {cell.precision})" if mixed else ""
                recipe = f", {cell.recipe_text}" if recipes and cell.recipe_text else ""
                if any(MODELLED in line.provenance for line in mine):
                    numerics += ", modelled"
                marker, dash = SHAPES.get(decoder, ("s", ":"))
                found.setdefault(batch, []).append(
                    Series(
                        f"{cell.backend_text}, {decoder}{recipe}{numerics}",
                        COLOURS[place % len(COLOURS)],
                        marker,
                        dash,
                        mine,
                        axis,
                        hollow=place >= len(COLOURS),
                    )
                )
    return found


def places_of(found: Sequence[Series]) -> list[int]:
    return sorted({series.place(line) for series in found for line in series.lines})


def side_by_side(found: Sequence[Series]) -> bool:
    """Whether the x axis tells series apart: there is one step count, and no bars beside points."""
    return len(places_of(found)) == 1 < len(found) and not any(s.modelled for s in found)


def shift(series: Series, found: Sequence[Series]) -> float:
    """How far beside its place a series lies, in the order of the legend."""
    return 0.8 * ((found.index(series) + 0.5) / len(found) - 0.5) if side_by_side(found) else 0.0
