"""`python -m bench.table RUN`: one line per cell, as Markdown and CSV."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.precision import INTEGERS, RANDOM_WORDS
from bench.cell import Cell
from bench.stats import median_or_none
from bench.store import EMULATED, FLAGS, LATEST, MODELLED, OK, RUNS, Row, Run, open_run
from core.cli import Parser, run
from core.errors import EXIT_OK
from core.files import write_atomic

EMPTY = "-"
MODELLED_WORDS = (
    "modelled: the card was not here and nothing was timed. The median is what the model says under"
    " its central assumptions, with all parts resident; low and high hold 8 of 10 draws of its"
    " assumptions and of its fit's errors, `high, switching` is theirs where programs are switched."
    " period: between the ends of two calls while every SoC is busy. images/J at TDP: the card at"
    " its power limit all the while, so at least that many."
)
EMULATED_WORDS = (
    "emulated: numerics of an NPU that this CPU emulates, from one call a cell. It has no speed,"
    " and is no stand-in for the accuracy of a Cloud AI 100."
)


@dataclass(frozen=True)
class Line:
    """One cell over its rounds. Figures are medians over the rounds that are ok, None without."""

    cell: Cell
    rows: Sequence[Row]

    @property
    def good(self) -> list[Row]:
        return [row for row in self.rows if row["status"] == OK]

    @property
    def status(self) -> str:
        """`ok`, or every other status with the number of rounds it came up in."""
        found = Counter(row["status"] for row in self.rows)
        if set(found) == {OK}:
            return OK
        return ", ".join(
            f"{status} ({number} of {len(self.rows)})" if len(self.rows) > 1 else status
            for status, number in sorted(found.items())
        )

    @property
    def flags(self) -> str:
        """Each flag, with the share of rounds that carry it where that is not all."""
        found = Counter(flag for row in self.good for flag in row["flags"])
        total = len(self.good)
        return ", ".join(
            flag if found[flag] == total else f"{flag} ({found[flag]} of {total})"
            for flag in FLAGS
            if flag in found
        )

    @property
    def image(self) -> str:
        checks = [row["image_check"] for row in self.rows if row["image_check"]]
        if not checks:
            return ""
        worst = min(checks, key=lambda check: (check["psnr_db"] is None, check["psnr_db"] or 0.0))
        return "no reference" if worst["psnr_db"] is None else f"{worst['psnr_db']:.1f} dB"

    @property
    def provenance(self) -> str:
        return ", ".join(sorted({row["provenance"] for row in self.rows}))

    def median(self, column: str) -> float | None:
        return median_or_none([row[column] for row in self.good])

    def stage(self, name: str) -> float | None:
        return median_or_none([(row["stages_ms"] or {}).get(name) for row in self.good])


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """Rows gathered by cell, in the order in which the cells first appear."""
    by_cell: dict[Cell, list[Row]] = {}
    for row in rows:
        by_cell.setdefault(Cell.of(row), []).append(row)
    return [Line(cell, found) for cell, found in by_cell.items()]


def guidance(cell: Cell) -> str:
    """`7.5 (batch)`; "" where there is none."""
    return f"{cell.guidance:g} ({cell.guidance_mode})" if cell.guidance else ""


@dataclass(frozen=True)
class Column:
    """A column: its header with the unit, its value, and the digits after the point."""

    header: str
    value: Callable[[Any], Any]
    digits: int | None = None

    def text(self, line: Any) -> str:
        value = self.value(line)
        if value is None or value == "":
            return EMPTY
        return f"{value:.{self.digits}f}" if self.digits is not None else str(value)


def figure(column: str) -> Callable[[Line], float | None]:
    return lambda line: line.median(column)


def stage(name: str) -> Callable[[Line], float | None]:
    return lambda line: line.stage(name)


def percent(column: str) -> Callable[[Line], float | None]:
    def value(line: Line) -> float | None:
        share = line.median(column)
        return None if share is None else share * 100

    return value


def switching_high(line: Line) -> float | None:
    """Upper end of a modelled latency where programs are switched."""
    found = [row["modelled"] for row in line.good if row["modelled"]]
    return median_or_none([each["switching"]["latency"]["high_ms"] for each in found])


def images_per_joule_at_tdp(line: Line) -> float | None:
    """Of a modelled card only: at its power limit over the period."""
    energy = line.median("energy_j") if line.provenance == MODELLED else None
    return line.cell.batch / energy if energy else None


def samples(line: Line) -> int | None:
    taken = sum(len(row["samples_ms"]) for row in line.good)
    return None if line.provenance == MODELLED and not taken else taken


COLUMNS = (
    Column("model", lambda line: line.cell.model),
    Column("weights", lambda line: line.cell.weights),
    Column("backend", lambda line: line.cell.backend_text),
    Column("device", lambda line: line.cell.device),
    Column("numerics", lambda line: line.cell.numerics),
    Column("size (px)", lambda line: line.cell.size),
    Column("scheduler", lambda line: line.cell.scheduler),
    Column("guidance", lambda line: guidance(line.cell)),
    Column("provenance", lambda line: line.provenance),
    Column("decoder", lambda line: line.cell.decoder),
    Column("batch", lambda line: line.cell.batch),
    Column("steps", lambda line: line.cell.steps),
    Column("median (ms)", figure("median_ms"), 1),
    Column("low (ms)", figure("low_ms"), 1),
    Column("high (ms)", figure("high_ms"), 1),
    Column("high, switching (ms)", switching_high, 1),
    Column("period (ms)", figure("period_ms"), 1),
    Column("images/s", figure("images_per_s"), 3),
    Column("images/J at TDP", images_per_joule_at_tdp, 3),
    Column("min (ms)", figure("min_ms"), 1),
    Column("max (ms)", figure("max_ms"), 1),
    Column("CV (%)", percent("cv"), 1),
    Column("p90 (ms)", figure("p90_ms"), 1),
    Column("p99 (ms)", figure("p99_ms"), 1),
    Column("text (ms)", stage("text"), 1),
    Column("first UNet step (ms)", stage("unet_first"), 1),
    Column("UNet step (ms)", stage("unet_step"), 1),
    Column("decode (ms)", stage("decode"), 1),
    Column("rest (ms)", stage("rest"), 1),
    Column("NFE", figure("nfe"), 0),
    Column("cold call (ms)", figure("cold_ms"), 1),
    Column("compile (s)", figure("compile_s"), 2),
    Column("load (s)", figure("load_s"), 2),
    Column("peak memory (MB)", figure("peak_memory_mb"), 0),
    Column("image PSNR", lambda line: line.image),
    Column("samples", samples),
    Column("rounds", lambda line: len(line.rows)),
    Column("status", lambda line: line.status),
    Column("flags", lambda line: line.flags),
)
ALWAYS = ("weights", "backend", "numerics", "decoder", "batch", "steps", "flags")
"""Columns of the Markdown table that stay even where they say the same in every line."""
CONDITIONS = ("model", "device", "size (px)", "scheduler", "guidance", "provenance")
"""Said once above the table where all lines agree."""
BRIEF = ("weights", "backend", "numerics", "scheduler", "guidance", "decoder", "batch", "steps",
         "NFE", "median (ms)", "low (ms)", "high (ms)", "high, switching (ms)", "period (ms)",
         "images/s", "images/J at TDP", "CV (%)", "UNet step (ms)", "decode (ms)",
         "peak memory (MB)", "samples", "image PSNR", "provenance", "status", "flags")  # fmt: skip
"""Columns of the short table: in the terminal and in the README."""


SINCE = ("guidance", "low (ms)", "high (ms)", "high, switching (ms)", "period (ms)",
         "images/J at TDP")  # fmt: skip
"""Columns of the CSV that are left out where no cell has a value: tables that were published before
they existed stay as they are."""


def columns_for(lines: Sequence[Line]) -> tuple[list[Column], list[Column]]:
    """(columns to print, columns that say the same everywhere and go above the table)."""
    printed, above = [], []
    for column in COLUMNS:
        texts = {column.text(line) for line in lines}
        if column.header in ALWAYS:
            printed.append(column)
        elif column.header in CONDITIONS and len(texts) == 1:
            above += [column] if texts != {EMPTY} else []
        elif texts != {EMPTY}:
            printed.append(column)
    return printed, above


LEAST_NEEDED = ("samples", "image PSNR", "peak memory (MB)", "decode (ms)", "UNet step (ms)",
                "CV (%)", "flags", "images/s")  # fmt: skip
"""What a narrow terminal goes without, first to last; `table.md` has everything."""


def brief_columns(lines: Sequence[Line]) -> list[Column]:
    """The short table's columns, without a status that is ok and flags that nobody has.

    What is said above the table is not said again, nor an NFE that is the number of steps.
    """

    def says(column: Column) -> bool:
        if column.header == "NFE":
            return any(line.median("nfe") not in (None, line.cell.steps) for line in lines)
        texts = {column.text(line) for line in lines}
        return len(texts) > 1 if column.header in CONDITIONS else bool(texts - {EMPTY, OK})

    return [column for column in COLUMNS if column.header in BRIEF and says(column)]


def conditions(target: Run, lines: Sequence[Line]) -> list[str]:
    """Paragraphs: what all lines share, the machine, the method."""
    _, above = columns_for(lines)
    shared = [f"{column.header} {column.text(lines[0])}" for column in above]
    if all(line.provenance == MODELLED for line in lines):
        made = [f"Images: {target.header['environment']['cpu']}, FP16 between the parts."]
        return [f"{'; '.join(shared)}.", "", MODELLED_WORDS] + (
            ["", *made] if target.header.get("images", True) else []
        )
    machine, rule = target.header["environment"], target.header["settings"]
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
        *(["", EMULATED_WORDS] if any(EMULATED in line.provenance for line in lines) else []),
        *(["", MODELLED_WORDS] if any(MODELLED in line.provenance for line in lines) else []),
        *(["", f"{RANDOM_WORDS}."] if any(map(says_little, lines)) else []),
    ]


def says_little(line: Line) -> bool:
    """Whether its image tells little of its precision."""
    return line.cell.storage in INTEGERS and line.cell.weights == "random"


def markdown(target: Run, rows: Sequence[Row], *, brief: bool = False) -> str:
    """The run's table, its conditions above it and what failed below; `brief`: main columns."""
    lines = lines_of(rows)
    if not lines:
        return "No rows.\n"
    printed = brief_columns(lines) if brief else columns_for(lines)[0]
    text = [*conditions(target, lines), "", *grid(printed, lines)]
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


def grid(columns: Sequence[Column], lines: Sequence[Any]) -> list[str]:
    """A Markdown table, padded so that it reads as plain text too."""
    cells = [[column.header for column in columns]]
    cells += [[column.text(line).replace("|", "\\|") for column in columns] for line in lines]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    right = [column.digits is not None for column in columns]

    def join(row: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(row, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * (width - number) + ":" * number for width, number in zip(widths, right, strict=True)
    )
    return [join(cells[0]), f"| {' | '.join(rule)} |", *(join(row) for row in cells[1:])]


def csv(rows: Sequence[Row]) -> str:
    """Every column, unrounded, one line per cell; SINCE where a cell has some."""
    import pandas as pd

    lines = lines_of(rows)
    columns = [c for c in COLUMNS if c.header not in SINCE or any(map(c.value, lines))]
    table = {column.header: [column.value(line) for line in lines] for column in columns}
    text: str = pd.DataFrame(table).to_csv(index=False, lineterminator="\n")
    return text


def show(target: Run, rows: Sequence[Row], width: int | None = None) -> None:
    """Print the table's main columns, as many as the terminal (or `width` characters) has room."""
    from rich.console import Console
    from rich.table import Table

    lines = lines_of(rows)
    if not lines:
        print("no rows yet")
        return
    _, above = columns_for(lines)
    caption = [
        f"guidance {column.text(lines[0])}"
        if column.header == "guidance"
        else column.text(lines[0])
        for column in above
    ]
    wanted = brief_columns(lines)
    for column in [column for column in wanted if column.header in ("weights", "numerics")]:
        texts = {column.text(line) for line in lines}
        if len(texts) == 1:  # said once: a terminal is narrow
            caption.append(f"{column.header} {texts.pop()}".removeprefix("numerics "))
            wanted.remove(column)
    room = width or (None if sys.stdout.isatty() else 190)
    console = Console(width=room, highlight=False, markup=False)
    widths = {column.header: narrowest(column, lines) for column in wanted}
    for header in LEAST_NEEDED:  # a cut-off figure is worse than a column less
        if sum(width + 3 for width in widths.values()) + 1 > console.width:
            widths.pop(header, None)
    table = Table(title=", ".join(caption), title_justify="left", title_style="")
    wanted = [column for column in wanted if column.header in widths]
    for column in wanted:
        table.add_column(
            column.header,
            justify="right" if column.digits is not None else "left",
            min_width=widths[column.header],
        )
    for line in lines:
        table.add_row(*(column.text(line) for column in wanted))
    console.print(table)
    if any(EMULATED in line.provenance for line in lines):
        print(EMULATED_WORDS)
    if any(map(says_little, lines)):
        print(RANDOM_WORDS)


def narrowest(column: Column, lines: Sequence[Line]) -> int:
    """Characters a column needs if headers and words may go on several lines."""
    texts = [column.text(line) for line in lines]
    words = [word for text in texts for word in text.split()] if column.digits is None else texts
    return max(map(len, (*column.header.split(), *words)))


def write(target: Run, rows: Sequence[Row], folder: Path | None = None) -> list[Path]:
    """`table.md` and `table.csv` into the run folder (or `folder`)."""
    place = folder or target.path
    files = [place / "table.md", place / "table.csv"]
    write_atomic(files[0], f"# Run {target.name}\n\n{markdown(target, rows)}")
    write_atomic(files[1], csv(rows))
    return files


def parser() -> Parser:
    top = Parser(prog="python -m bench.table", description=__doc__)
    top.add_argument("run", nargs="?", default=LATEST, metavar="RUN|latest")
    top.add_argument("--out", type=Path, default=RUNS, help="where runs lie (results/runs)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    target = open_run(args.run, args.out)
    rows = target.rows()
    show(target, rows)
    for file in write(target, rows):
        print(file)
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run(main))
