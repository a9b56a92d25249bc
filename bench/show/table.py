"""A run's table: one line per cell, in the terminal, as Markdown and CSV."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from backends.check.gate import QUANTISED, RANDOM_WORDS
from bench.rows.cell import Cell
from bench.rows.fields import EMULATED, MODELLED, OK
from bench.rows.store import Row, Run
from bench.rows.summary import CellRounds, by_cell
from bench.show import stages
from bench.show.columns import (
    COLUMNS,
    LEAST_NEEDED,
    SINCE,
    brief_columns,
    columns_for,
    terminal_columns,
)
from bench.show.notes import notes
from core.files import write_atomic
from core.table import as_json, csv_text, draw, markdown_lines

MODELLED_WORDS = (
    "modelled: the card was not here and nothing was timed. The median is what the model says under"
    " its central assumptions, with all parts resident; low and high hold 8 of 10 draws of its"
    " assumptions and of its fit's errors, `high, switching` is theirs where every program is"
    " switched to."
    " period: between the ends of two calls while every SoC is busy. images/J at TDP: the card at"
    " its power limit all the while, so at least that many. superseded: an older model of the card;"
    " model it again."
)
EMULATED_WORDS = (
    "emulated: numerics of a device that this CPU emulates, from one call a cell. It has no speed,"
    " and an emulated NPU is no stand-in for the accuracy of a Cloud AI 100."
)


def conditions(target: Run, lines: Sequence[CellRounds]) -> list[str]:
    """Paragraphs: what all lines share, the machine, the method."""
    _, above = columns_for(lines)
    shared = [f"{column.header} {column.text(lines[0])}" for column in above]
    if all(line.provenance == MODELLED for line in lines):
        made = [f"Images: {target.header.environment['cpu']}, FP16 between the parts."]
        return [f"{'; '.join(shared)}.", "", MODELLED_WORDS] + (
            ["", *made] if target.header.images else []
        )
    machine, rule = target.header.environment, target.header.settings
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    rounds = rule["rounds"]
    sampled = (
        f"{rounds} round{'s' * (rounds != 1)} of at least {rule['min_samples']} samples and"
        f" {rule['min_time']:g} s, at most {rule['max_time']:g} s from 3 samples on."
    )
    if rule["min_time"] == 0:
        sampled = "One sample a cell, after a call of one step or as few as the model takes."
    return [
        f"{'; '.join(shared)}.",
        "",
        f"{machine['cpu']}, {machine['cores_allowed']} cores of {machine['cores_physical']},"
        f" {machine['memory_gb']:g} GB; {machine['os']}; Python {machine['python']}, {versions}.",
        "",
        f"{sampled} Medians over rounds of each round's median; end to end: prompt strings in,"
        " uint8 images out.",
        *(["", quality_words(lines)] if any(line.quality("captions") for line in lines) else []),
        *(["", EMULATED_WORDS] if any(EMULATED in line.provenance for line in lines) else []),
        *(["", MODELLED_WORDS] if any(MODELLED in line.provenance for line in lines) else []),
        *(["", f"{RANDOM_WORDS}."] if any(map(says_little, lines)) else []),
    ]


def quality_words(lines: Sequence[CellRounds]) -> str:
    """What the judge's columns are of: two tasks, of which a run may have either or both."""
    texts: list[str] = []
    for pictured, text in (
        (False, "captions right: of {} held-out captions, those whose every attribute is read back"
                " right from the cell's own pixels; own FID: over a network of this project,"
                " comparable only with itself."),
        (True, "changes right: of {} drawn pictures, each with a held-out caption that asks for"
               " another shape or colour and names no place, those whose every attribute is read"
               " back right; shift: how far the object moved, the median; kept place: those whose"
               " object moved by at most 4 pixels."),
    ):  # fmt: skip
        counts = {int(line.quality("captions") or 0) for line in lines
                  if bool(line.cell.encoder) == pictured} - {0}  # fmt: skip
        if counts:
            texts.append(text.format(" or ".join(map(str, sorted(counts)))))
    return " ".join(texts[:1] + [f"{text[0].upper()}{text[1:]}" for text in texts[1:]])


def says_little(line: CellRounds) -> bool:
    """Whether its image tells little of its precision."""
    return line.cell.storage in QUANTISED and line.cell.weights == "random"


def markdown(target: Run, rows: Sequence[Row], *, brief: bool = False) -> str:
    """The run's table, its conditions above it and what failed below; `brief`: main columns."""
    lines = by_cell(rows)
    if not lines:
        return "No rows.\n"
    printed = brief_columns(lines) if brief else columns_for(lines)[0]
    text = [*conditions(target, lines), "", *markdown_lines(printed, lines)]
    if not brief and (said := notes(lines)):
        text += ["", *(f"- {note}" for note in said)]
    if not brief and (by_stage := stages.markdown(target, rows)):
        text += ["", "## By stage", "", by_stage.rstrip()]
    failed = [row for row in rows if row["status"] != OK]
    if failed:
        text += ["", "Failed:", ""]
        text += [
            f"- {Cell.of(row)}, round {row['round'] + 1}: {row['status']}:"
            f" {' '.join(str((row['error'] or {}).get('what', '')).split())}"
            for row in failed
        ]
    missing = target.missing(rows)
    if missing:
        text += ["", "Missing:", ""]
        text += [f"- {cell}, round {round_ + 1}" for cell, round_ in missing]
    return "\n".join(text) + "\n"


def csv(rows: Sequence[Row]) -> str:
    """Every column, unrounded, one line per cell; SINCE where a cell has some."""
    lines = by_cell(rows)
    columns = [c for c in COLUMNS if c.header not in SINCE or any(map(c.value, lines))]
    return csv_text(columns, lines)


NAMED = ("guidance", "low memory", "encoder", "strength", "negative", "captions judged")
"""Columns that a terminal's caption calls by their name: their texts say too little alone."""


def show(target: Run, rows: Sequence[Row], width: int | None = None) -> None:
    """Print the table's main columns, as many as the terminal (or `width` characters) has room."""
    lines = by_cell(rows)
    if not lines:
        print("no rows yet")
        return
    _, above = columns_for(lines)
    caption = [
        f"{column.header} {column.text(lines[0])}"
        if column.header in NAMED
        else column.text(lines[0])
        for column in above
    ]
    wanted = terminal_columns(lines)
    for column in [column for column in wanted if column.header in ("weights", "numerics")]:
        texts = {column.text(line) for line in lines}
        if len(texts) == 1:  # said once: a terminal is narrow
            caption.append(f"{column.header} {texts.pop()}".removeprefix("numerics "))
            wanted.remove(column)
    dimmed = attrgetter("disturbed")
    draw(wanted, lines, ", ".join(caption), width, LEAST_NEEDED, dimmed)
    if any(EMULATED in line.provenance for line in lines):
        print(EMULATED_WORDS)
    if any(map(says_little, lines)):
        print(RANDOM_WORDS)
    room = width or (shutil.get_terminal_size().columns if sys.stdout.isatty() else 100)
    for text in notes(lines):
        print(textwrap.fill(text, room))


def page(target: Run, rows: Sequence[Row]) -> str:
    """The table in Markdown, below the run's name."""
    return f"# Run {target.label}\n\n{markdown(target, rows)}"


def json_text(targets: Sequence[Run]) -> str:
    """Every cell of some runs as JSON: its key, and each column that says anything, unrounded."""
    cells = []
    for target in targets:
        for line in by_cell(target.rows()):
            (figures,) = as_json(COLUMNS, [line])
            known = {name: value for name, value in figures.items() if value not in (None, "")}
            cells.append({"run": target.name, **line.cell.columns(), "columns": known})
    return json.dumps(cells, indent=2, allow_nan=False) + "\n"


def write(target: Run, rows: Sequence[Row], folder: Path | None = None) -> list[Path]:
    """Write `table.md` and `table.csv` into the run folder (or `folder`)."""
    place = folder or target.path
    files = [place / "table.md", place / "table.csv"]
    write_atomic(files[0], page(target, rows))
    write_atomic(files[1], csv(rows))
    return files
