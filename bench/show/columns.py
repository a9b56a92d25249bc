"""Columns of a sweep's table: a line per cell, what each column shows, which are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.rows.cell import Cell
from bench.rows.fields import MODELLED, OK
from bench.rows.summary import CellRounds
from core.table import EMPTY, Column


def guidance(cell: Cell) -> str:
    """`7.5 (batch)`; "" where there is none."""
    return f"{cell.guidance:g} ({cell.guidance_mode})" if cell.guidance else ""


def figure(column: str) -> Callable[[CellRounds], float | None]:
    return lambda line: line.median(column)


def stage(name: str) -> Callable[[CellRounds], float | None]:
    return lambda line: line.stage(name)


def percent(column: str) -> Callable[[CellRounds], float | None]:
    def value(line: CellRounds) -> float | None:
        share = line.median(column)
        return None if share is None else share * 100

    return value


def judged(name: str, *, pictured: bool) -> Callable[[CellRounds], float | None]:
    """A share that the judge read, in percent, of images from noise or of those from pictures: what
    is asked of them is not the same."""

    def value(line: CellRounds) -> float | None:
        share = line.quality(name) if bool(line.cell.encoder) == pictured else None
        return None if share is None else share * 100

    return value


def fid_network(line: CellRounds) -> str:
    """Which network the own FID is over: FIDs of two compare as little as of two counts."""
    network = line.quality("fid_network")
    return f"{int(network):08x}" if network else ""


def images_per_joule(line: CellRounds) -> float | None:
    """Where power was measured."""
    energy = None if line.provenance == MODELLED else line.median("energy_j")
    return line.cell.batch / energy if energy else None


def images_per_joule_at_tdp(line: CellRounds) -> float | None:
    """Return a modelled card's images per joule at its power limit over the period, else None."""
    energy = line.median("energy_j") if line.provenance == MODELLED else None
    return line.cell.batch / energy if energy else None


def samples(line: CellRounds) -> int | None:
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
    Column("low memory", lambda line: "yes" if line.cell.low_memory else ""),
    Column("encoder", lambda line: line.cell.encoder),
    Column("strength", lambda line: line.cell.strength if line.cell.encoder else None, 2),
    Column("scenario", lambda line: line.cell.scenario),
    Column("negative", lambda line: line.cell.negative),
    Column("provenance", lambda line: line.provenance),
    Column("decoder", lambda line: line.cell.decoder),
    Column("batch", lambda line: line.cell.batch),
    Column("steps", lambda line: line.cell.steps),
    Column("median (ms)", figure("median_ms"), 1),
    Column("low (ms)", figure("low_ms"), 1),
    Column("high (ms)", figure("high_ms"), 1),
    Column("high, switching (ms)", lambda line: line.switching_high_ms, 1),
    Column("period (ms)", figure("period_ms"), 1),
    Column("images/s", figure("images_per_s"), 3),
    Column("frames/s", lambda line: line.frames("per_s"), 1),
    Column("frame: encode (ms)", lambda line: line.frames("encode_ms"), 1),
    Column("frame: UNet (ms)", lambda line: line.frames("unet_ms"), 1),
    Column("frame: decode (ms)", lambda line: line.frames("decode_ms"), 1),
    Column("frame: rest (ms)", lambda line: line.frames("rest_ms"), 1),
    Column("images/J", images_per_joule, 3),
    Column("images/J at TDP", images_per_joule_at_tdp, 3),
    Column("min (ms)", figure("min_ms"), 1),
    Column("max (ms)", figure("max_ms"), 1),
    Column("CV (%)", percent("cv"), 1),
    Column("p90 (ms)", figure("p90_ms"), 1),
    Column("p99 (ms)", figure("p99_ms"), 1),
    Column("text (ms)", stage("text"), 1),
    Column("encode (ms)", stage("encode"), 1),
    Column("first UNet step (ms)", stage("unet_first"), 1),
    Column("UNet step (ms)", stage("unet_step"), 1),
    Column("decode (ms)", stage("decode"), 1),
    Column("rest (ms)", stage("rest"), 1),
    Column("loading (ms)", stage("load"), 1),
    Column("NFE", figure("nfe"), 0),
    Column("cold call (ms)", figure("cold_ms"), 1),
    Column("compile (s)", figure("compile_s"), 2),
    Column("load (s)", figure("load_s"), 2),
    Column("peak memory (MB)", figure("peak_memory_mb"), 0),
    Column("image PSNR", lambda line: line.image),
    Column("captions right (%)", judged("all", pictured=False), 1),
    Column("changes right (%)", judged("all", pictured=True), 1),
    Column("kept place (%)", judged("kept_place", pictured=True), 1),
    Column("shift (px)", lambda line: line.quality("shift_px"), 1),
    Column("own FID", lambda line: line.quality("fid_shapes"), 2),
    Column("captions judged", lambda line: line.quality("captions"), 0),
    Column("FID network", fid_network),
    Column("samples", samples),
    Column("rounds", lambda line: len(line.rows)),
    Column("status", lambda line: line.status, whole=True),
    Column("flags", lambda line: line.flags, whole=True),
)
ALWAYS = ("weights", "backend", "numerics", "decoder", "batch", "steps", "flags")
"""Columns of the Markdown table that stay even where they say the same in every line."""
CONDITIONS = ("model", "device", "size (px)", "scheduler", "guidance", "low memory", "encoder",
              "strength", "scenario", "negative", "provenance",
              "captions judged", "FID network")  # fmt: skip
"""Said once above the table where all lines agree."""
BRIEF = ("weights", "backend", "numerics", "scheduler", "guidance", "low memory", "encoder",
         "strength", "scenario", "negative", "encode (ms)", "frames/s", "decoder",
         "batch", "steps", "NFE", "median (ms)", "low (ms)", "high (ms)", "high, switching (ms)",
         "period (ms)", "images/s", "images/J", "images/J at TDP", "CV (%)", "UNet step (ms)",
         "decode (ms)", "loading (ms)", "peak memory (MB)", "samples", "image PSNR",
         "captions right (%)", "changes right (%)", "shift (px)", "own FID", "provenance", "status",
         "flags")  # fmt: skip
"""Columns of the short table: in the terminal and in the README."""


SINCE = ("guidance", "low memory", "encoder", "strength", "scenario", "negative", "encode (ms)",
         "frames/s", "frame: encode (ms)", "frame: UNet (ms)", "frame: decode (ms)",
         "frame: rest (ms)", "loading (ms)", "low (ms)", "high (ms)",
         "high, switching (ms)", "period (ms)", "images/J", "images/J at TDP",
         "captions right (%)", "changes right (%)", "kept place (%)", "shift (px)", "own FID",
         "captions judged", "FID network")  # fmt: skip
"""Columns of the CSV that are left out where no cell has a value: tables that were published before
they existed stay as they are."""


def columns_for(lines: Sequence[CellRounds]) -> tuple[list[Column], list[Column]]:
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
                "CV (%)", "images/s")  # fmt: skip
"""What a narrow terminal goes without, first to last; `table.md` has everything."""


def brief_columns(lines: Sequence[CellRounds]) -> list[Column]:
    """The short table's columns, without a status that is ok and flags that nobody has.

    What is said above the table is not said again, nor an NFE that is the number of steps.
    """

    def says(column: Column) -> bool:
        if column.header == "NFE":
            return any(line.median("nfe") not in (None, line.cell.kept) for line in lines)
        texts = {column.text(line) for line in lines}
        return len(texts) > 1 if column.header in CONDITIONS else bool(texts - {EMPTY, OK})

    return [column for column in COLUMNS if column.header in BRIEF and says(column)]


JUDGED = ("status", "flags")
"""What says whether a line is to be trusted: first in a terminal, before the figures, and whole."""


def terminal_columns(lines: Sequence[CellRounds]) -> list[Column]:
    """The short table's columns, what a line is worth before what it says."""
    brief = brief_columns(lines)
    return sorted(brief, key=lambda column: column.header not in JUDGED)
