"""A run's stages by backend and numerics: time, rate, share of the peak measured in that run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.limits.floors import beaten, beaten_text, ceilings_of, share_of_floor, under
from bench.rows.stats import median_or_none
from bench.rows.store import Row, Run
from bench.rows.summary import CellRounds, by_cell
from core.table import Column, markdown_lines

STAGES = {"text": "text", "encode": "encode", "unet_step": "UNet step", "decode": "decode"}
WORDS = (
    "Stages: medians over cells that differ in nothing but steps (and, but for `decode`, the"
    " decoder). Share of peak: multiply-adds of direct algorithms a second, against those"
    " of a large matrix product measured in the same run, in the cell's precision even where layers"
    " of a stage stay in FP32 (INT8's convolutions). `ort` can pass 100%: Winograd's convolutions"
    " do fewer, and FP32 by parts on BF16 units does them faster than FP32's own (docs/cpu.md)."
    " Share of floor: as `addbench roofline` has it, and nothing where a stage is faster than"
    " direct algorithms are, whose floor it is not. Peak memory and image PSNR are of the cells:"
    " the most and the worst. Speed: the first line of a stage is 1."
)


@dataclass(frozen=True)
class Stage:
    """One stage of cells that run it alike.

    Attributes:
        peak: TFLOP/s of a matrix product so computed.
        doubted: whether that was measured too low, as the run's own rows show.
    """

    key: str
    name: str
    lines: Sequence[CellRounds]
    peak: float | None
    first: Stage | None = None
    doubted: bool = False

    @property
    def ms(self) -> float | None:
        if self.key != "unet_step":
            return median_or_none([line.stage(self.key) for line in self.lines])
        # At one step there is no later one: the first is the UNet's time.
        return median_or_none(
            [line.stage("unet_step") or line.stage("unet_first") for line in self.lines]
        )

    def reached(self, name: str) -> float | None:
        """`tflops` or `fraction` (of the floor) of the rows' rooflines."""
        rooflines = [row["roofline"] or {} for line in self.lines for row in line.good]
        return median_or_none([each.get(self.key, {}).get(name) for each in rooflines])

    @property
    def rate(self) -> float | None:
        tflops = self.reached("tflops")
        return None if tflops is None else 1e3 * tflops

    @property
    def share_of_peak(self) -> float | None:
        known = self.rate and self.peak and not self.doubted
        return self.rate / self.peak / 10 if known else None  # type: ignore[operator]

    @property
    def share_of_floor(self) -> float | None:
        share = share_of_floor(None if self.doubted else self.reached("fraction"))
        return None if share is None else 100 * share

    @property
    def speed(self) -> float | None:
        base = (self.first or self).ms
        return base / self.ms if base and self.ms else None

    @property
    def memory(self) -> float | None:
        found = [line.median("peak_memory_mb") for line in self.lines]
        return max((each for each in found if each is not None), default=None)

    @property
    def image(self) -> str:
        rows = [row for line in self.lines for row in line.rows]
        return CellRounds(self.lines[0].cell, rows).image


def of_cell(name: str) -> Callable[[Stage], Any]:
    return lambda stage: getattr(stage.lines[0].cell, name)


COLUMNS = (
    Column("stage", lambda stage: stage.name),
    Column("backend", of_cell("backend_text")),
    Column("numerics", of_cell("numerics")),
    Column("low memory", lambda stage: "yes" if stage.lines[0].cell.low_memory else ""),
    Column("batch", of_cell("batch")),
    Column("ms", lambda stage: stage.ms, 1),
    Column("speed", lambda stage: stage.speed, 2),
    Column("GFLOP/s", lambda stage: stage.rate, 1),
    Column("share of peak (%)", lambda stage: stage.share_of_peak, 0),
    Column("share of floor (%)", lambda stage: stage.share_of_floor, 0),
    Column("peak memory (MB)", lambda stage: stage.memory, 0),
    Column("image PSNR", lambda stage: stage.image),
)


def stages_of(target: Run, rows: Sequence[Row]) -> list[Stage]:
    """Stages in the order of the pipeline, in each the cells in the order of the run."""
    surveyed = target.header.roofline
    rows = under(rows, surveyed)
    ceilings = ceilings_of(surveyed) if surveyed else {}
    found: dict[tuple[Any, ...], list[CellRounds]] = {}
    for line in by_cell(rows):
        cell = line.cell
        for key, name in STAGES.items():
            if line.stage(key) is None and not (key == "unet_step" and line.stage("unet_first")):
                continue
            of = {"decode": cell.decoder, "encode": cell.encoder}.get(key)
            name = f"{name} ({of})" if of else name
            alike = (cell.backend_text, cell.numerics, cell.low_memory, cell.batch)
            found.setdefault((list(STAGES).index(key), name, key, *alike), []).append(line)
    low = beaten(rows, surveyed) if surveyed else {}
    stages: list[Stage] = []
    firsts: dict[tuple[str, int], Stage] = {}
    # Stable: within a stage the order of the run stays.
    for (_, name, key, *_), lines in sorted(found.items(), key=lambda item: item[0][:2]):
        cell = lines[0].cell
        on = ceilings.get(cell.device)
        peak = on.tflops.get(cell.precision, {}).get("matmul") if on else None
        doubted = f"{cell.device} {cell.precision}" in low
        stage = Stage(key, name, lines, peak, firsts.get((name, cell.batch)), doubted)
        firsts.setdefault((name, cell.batch), stage)
        stages.append(stage)
    return stages


def markdown(target: Run, rows: Sequence[Row]) -> str:
    """The table of stages and its words; empty where no row has stages."""
    stages = stages_of(target, rows)
    if not stages:
        return ""
    printed = [column for column in COLUMNS if {column.text(s) for s in stages} != {"-"}]
    surveyed = target.header.roofline
    doubts = beaten_text(beaten(under(rows, surveyed), surveyed)) if surveyed else ""
    words = [WORDS, "", *([doubts, ""] if doubts else [])]
    return "\n".join([*words, *markdown_lines(printed, stages)]) + "\n"
