"""What a pair of runs says: ratio of latencies, what FLOPs predict, what was published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.limits.ledger import Claim, hardware_of, read_claims
from bench.rows.fields import KEY_COLUMNS, LATER, OK
from bench.rows.store import Run
from bench.rows.summary import CellRounds, by_cell
from bench.verdict.pairs import PAIRS
from bench.verdict.ratio import (
    CONFIDENCE,
    Level,
    Ratio,
    level_of_call,
    level_of_rounds,
    of_levels,
    of_pairs,
)
from core.errors import EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_OK
from core.table import Column, draw, markdown_lines, print_json

SCHEMA = 1
SINGLE_SAMPLE = "single_sample"
MEASURED, FLOPS, PUBLISHED = "latency", "flops", "published"


@dataclass(frozen=True)
class PairSide:
    """One cell of the pair.

    Attributes:
        name: `base` or `head`.
        gflop: of one call at the NFE that was counted; None where nothing was measured.
        left: how many of its rounds have no row yet.
    """

    name: str
    line: CellRounds
    gflop: float | None
    left: int

    def __str__(self) -> str:
        cell = self.line.cell
        return f"{cell.model}, {cell.steps} step{'s' * (cell.steps != 1)}"

    @property
    def nfe(self) -> float | None:
        return self.line.median("nfe")

    @property
    def unet_ms(self) -> float | None:
        """Milliseconds of a UNet evaluation of all images, the mean of everything timed."""
        evaluation_ms = [
            sum(steps) / row["nfe"]
            for row in self.line.good
            for steps in (row["stages_samples_ms"] or {}).get("unet", ())
        ]
        return sum(evaluation_ms) / len(evaluation_ms) if evaluation_ms else None

    @property
    def single(self) -> bool:
        return any(SINGLE_SAMPLE in row["flags"] for row in self.line.good)

    @property
    def bad(self) -> str:
        """Why it has not all its figures, or ""."""
        text = "" if self.line.status == OK or not self.line.rows else self.line.status
        left = f"{self.left} rounds are missing" if self.left else ""
        return ", ".join(filter(None, (text, left)))

    def level(self) -> Level:
        if not self.single:
            return level_of_rounds([row["median_ms"] for row in self.line.good])
        row = self.line.good[0]
        steps = (row["stages_samples_ms"] or {}).get("unet") or [[]]
        return level_of_call(row["samples_ms"][0], steps[0])

    def columns(self) -> dict[str, Any]:
        return {
            "side": self.name,
            **self.line.cell.columns(),
            "median_ms": self.line.median("median_ms"),
            "nfe": self.nfe,
            "unet_evaluation_ms": self.unet_ms,
            "gflop": self.gflop,
            "rounds": len(self.line.good),
            "samples": sum(len(row["samples_ms"]) for row in self.line.good),
            "single_sample": self.single,
            "status": self.line.status,
            "missing_rounds": self.left,
            "flags": self.line.flags,
            "provenance": self.line.provenance,
        }


@dataclass(frozen=True)
class Figure:
    """One ratio base / head, and what it is worth.

    Attributes:
        kind: MEASURED (of latencies, ours), FLOPS or PUBLISHED.
        head: which of the head's cells, or what was published.
        provenance, hardware: of both sides; hardware "" where it does not matter or is not said.
        base, headed: the two that were divided, in `unit`; None where only the ratio is known.
        note: what the interval comes from, why there is none, or the source.
    """

    kind: str
    head: str
    provenance: str
    hardware: str
    base: float | None
    headed: float | None
    unit: str
    ratio: float | None
    low: float | None
    high: float | None
    note: str


@dataclass(frozen=True)
class Speedup:
    """Everything a pair says."""

    title: str
    runs: tuple[str, str]
    base: PairSide
    heads: Sequence[PairSide]
    figures: Sequence[Figure]
    notes: Sequence[str]

    @property
    def exit_code(self) -> int:
        if any(side.bad for side in (self.base, *self.heads)):
            return EXIT_FAILED
        known = [each for each in self.figures if each.kind == MEASURED and each.low is not None]
        return EXIT_OK if len(known) == len(self.heads) else EXIT_INCONCLUSIVE

    def columns(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "runs": {"base": self.runs[0], "head": self.runs[1]},
            "cells": [side.columns() for side in (self.base, *self.heads)],
            "ratios": [asdict(figure) for figure in self.figures],
            "confidence": 2 * CONFIDENCE - 1,
            "notes": list(self.notes),
            "exit_code": self.exit_code,
        }


def hardware_words(target: Run, side: PairSide) -> str:
    """What a side ran on."""
    environment, device = target.header.environment, side.line.cell.device
    words = str(hardware_of(environment, device))
    return f"{words}, {environment['cores_allowed']} cores" if device == "cpu" else words


def result(base: Run, head: Run) -> Speedup:
    """The result from the headers and rows of the two runs alone."""
    (first,), heads = sides_of(base), sides_of(head)
    said = head.header.versus or {}
    pair = PAIRS.get(said["pair"])
    places = [hardware_words(base, first), *(hardware_words(head, side) for side in heads)]
    hardware = " / ".join(dict.fromkeys(places))
    figures = [
        figure
        for side in heads
        for figure in (latencies(first, side, hardware), flops(first, side))
        if figure is not None
    ]
    if pair:
        figures += published(pair.published)
    return Speedup(
        pair.title if pair else " against ".join(map(str, (first, heads[0]))),
        (base.name, head.name),
        first,
        heads,
        figures,
        notes_on(first, heads),
    )


def sides_of(target: Run) -> list[PairSide]:
    """A side for each planned cell, with the rows it has."""
    rows, said = target.rows(), target.header.versus or {}
    lines = {line.cell: line for line in by_cell(rows)}
    missing = [cell for cell, _ in target.missing(rows)]
    sides = []
    for cell in target.plan:
        line = lines.get(cell, CellRounds(cell, []))
        nfe = line.median("nfe")
        cost = said["gflop"]
        total = None if nfe is None else cost["text"] + nfe * cost["unet"] + cost["decode"]
        sides.append(PairSide(said["side"], line, total, missing.count(cell)))
    return sides


def latencies(base: PairSide, head: PairSide, hardware: str) -> Figure | None:
    """The ratio of what was measured; None where a side has nothing."""
    if base.line.median("median_ms") is None or head.line.median("median_ms") is None:
        return None
    kinds = {base.line.provenance, head.line.provenance}
    ratio = ratio_of(base, head) if len(kinds) == 1 else None
    return Figure(
        MEASURED,
        str(head),
        " and ".join(sorted(kinds)),
        hardware,
        base.line.median("median_ms"),
        head.line.median("median_ms"),
        "ms",
        None if ratio is None else ratio.value,
        None if ratio is None else ratio.low,
        None if ratio is None else ratio.high,
        ratio.why if ratio else "no ratio mixes figures of different provenance",
    )


def ratio_of(base: PairSide, head: PairSide) -> Ratio:
    if not base.single and not head.single:
        medians = [{row["round"]: row["median_ms"] for row in each.line.good}
                   for each in (base, head)]  # fmt: skip
        both = sorted(set(medians[0]) & set(medians[1]))
        if both:
            return of_pairs(*([side[round_] for round_ in both] for side in medians))
    single = [side.name for side in (base, head) if side.single]
    why = f"t interval; one sample of {' and '.join(single)}, by its steps"
    return of_levels(base.level(), head.level(), why)


def flops(base: PairSide, head: PairSide) -> Figure | None:
    """What FLOPs alone predict, at the NFE that was counted."""
    if base.gflop is None or head.gflop is None:
        return None
    return Figure(
        FLOPS, str(head), "modelled", "", base.gflop, head.gflop, "GFLOP",
        base.gflop / head.gflop, None, None,
        f"FLOPs alone, at {base.nfe:g} and {head.nfe:g} UNet evaluations",
    )  # fmt: skip


def published(names: Sequence[str]) -> list[Figure]:
    """The published ratio, with the two latencies where they are known."""
    claims = {claim.id: claim for claim in read_claims()}
    ratio, *times = [claims[name] for name in names]
    base, head = [claim.value for claim in times] or (None, None)
    what = "" if ratio.metric == "speedup" else f" ({ratio.metric})"
    return [
        Figure(
            PUBLISHED, f"{ratio.model}{what}", "published", ratio.hardware, base, head,
            "ms", ratio.value, None, None, source_of(ratio),
        )
    ]  # fmt: skip


def source_of(claim: Claim) -> str:
    return f"{claim.qualifier}; {claim.source}"


def notes_on(base: PairSide, heads: Sequence[PairSide]) -> list[str]:
    notes = [
        "latency of a warm call, end to end; NFE: UNet evaluations of an image, counted; intervals"
        " are 90%, two one-sided 95% bounds"
    ]
    if base.line.cell.batch != heads[0].line.cell.batch:
        notes.append("the batches differ: these are ratios of calls, not of images")
    if any(side.single for side in (base, *heads)):
        notes.append(
            "one sample: its interval comes from the spread of its steps, in ten means of"
            " neighbours; what differs from process to process is not in it"
        )
    for side in (base, *heads):
        if side.bad:
            notes.append(f"{side.name} {side}: {side.bad}")
    if any("disturbed" in row["flags"] for side in (base, *heads) for row in side.line.good):
        notes.append("other processes disturbed some rows")
    return notes


# ---- shown


ALWAYS = ("model", "steps")


def key(name: str) -> Column:
    return Column(name, lambda side: getattr(side.line.cell, name))


def cell_columns(sides: Sequence[PairSide]) -> tuple[list[Column], str]:
    """(columns of the cells' table, what all cells share in a sentence)."""
    cells = [side.line.cell for side in sides]
    same = [
        name
        for name in KEY_COLUMNS
        if name not in ALWAYS and len({getattr(cell, name) for cell in cells}) == 1
    ]
    shared = [(name, getattr(cells[0], name)) for name in same]
    above = ", ".join(f"{name} {value}" for name, value in shared if LATER.get(name, "") != value)
    columns = [
        Column("side", lambda side: side.name),
        *(key(name) for name in KEY_COLUMNS if name not in same),
        Column("NFE", lambda side: side.nfe, 0),
        Column("latency (ms)", lambda side: side.line.median("median_ms"), 1),
        Column("UNet evaluation (ms)", lambda side: side.unet_ms, 1),
        Column("GFLOP", lambda side: side.gflop, 1),
        Column("rounds", lambda side: len(side.line.good), 0),
        Column("samples", lambda side: sum(len(row["samples_ms"]) for row in side.line.good), 0),
        Column("status", lambda side: side.bad or OK),
        Column("flags", lambda side: side.line.flags),
    ]
    return [column for column in columns if {column.text(side) for side in sides} != {"-"}], above


def quantity(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{figure.low:.2f} to {figure.high:.2f}"


RATIOS = (
    Column("of", lambda figure: figure.head),
    Column("provenance", lambda figure: figure.provenance),
    Column("hardware", lambda figure: figure.hardware),
    Column("base", lambda figure: quantity(figure.base, figure.unit)),
    Column("head", lambda figure: quantity(figure.headed, figure.unit)),
    Column("base / head", lambda figure: figure.ratio, 2),
    Column("90% interval", interval),
    Column("note", lambda figure: figure.note),
)


def markdown(speedup: Speedup) -> str:
    """Both tables and the notes; for a README too."""
    sides = [speedup.base, *speedup.heads]
    columns, above = cell_columns(sides)
    text = [f"### {speedup.title}", "", f"{above}.", "", *markdown_lines(columns, sides), ""]
    if speedup.figures:
        text += [*markdown_lines(RATIOS, speedup.figures), ""]
    text += [f"- {note}" for note in (*speedup.notes, rows_note(speedup))]
    return "\n".join(text) + "\n"


def rows_note(speedup: Speedup) -> str:
    return f"rows: {speedup.runs[0]} (base), {speedup.runs[1]} (head)"


def show(speedup: Speedup, form: str) -> None:
    """Print to stdout as `table`, `markdown` or `json`."""
    if form == "json":
        print_json(speedup.columns())
        return
    if form == "markdown":
        print(markdown(speedup), end="")
        return
    sides = [speedup.base, *speedup.heads]
    columns, above = cell_columns(sides)
    draw(columns, sides, f"{speedup.title}\n{above}")
    if speedup.figures:
        draw(RATIOS, speedup.figures, "How many times faster: base / head")
    for note in (*speedup.notes, rows_note(speedup)):
        print(f"note: {note}")
