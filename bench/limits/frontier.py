"""Quality against latency of few-step methods on one hardware."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.limits.ledger import METHODS, Claim, hardware_of, read_claims
from bench.rows.store import Run
from bench.rows.summary import CellRounds, by_cell
from core.errors import PreconditionError
from core.table import Column, csv_text, markdown_lines

if TYPE_CHECKING:
    from export.cost import Cost

STAND_IN = "sd15"
"""The model whose UNet and decoder all methods of the table share: it is what they distil."""
SIZE, BATCH, DECODER = (512, 512), 1, "vae"
MEASURED, MODELLED = "measured", "modelled"


@dataclass(frozen=True)
class Method:
    """A published method with its FID, and what an image costs it.

    Attributes:
        label: one point's name in the chart.
        nfe: UNet evaluations of an image; `why` says where the number comes from.
        unets: evaluations of the stand-in's UNet that one of its own is worth.
        model, scheduler: of the cells of ours that are this method; "" for none.
        claim: the published figure: FID-5k, CLIP score, steps, and its latency elsewhere.
    """

    label: str
    nfe: int
    unets: int
    model: str
    scheduler: str
    why: str
    claim: Claim

    @property
    def fid(self) -> float:
        return self.claim.fid_5k or math.nan

    @property
    def evaluations(self) -> int:
        """The evaluations of the stand-in's UNet for an image."""
        return self.nfe * self.unets


@dataclass(frozen=True)
class Point:
    """A method and its latency in ms; `low` and `high` where a model gives a range, else None."""

    method: Method
    latency_ms: float
    low_ms: float | None
    high_ms: float | None
    provenance: str
    source: str


@dataclass(frozen=True)
class Chart:
    """Points on one hardware.

    Attributes:
        conditions: what all of them share.
        model: how the modelled latencies were had, in a sentence.
    """

    hardware: str
    conditions: str
    model: str
    points: Sequence[Point]


def methods(path: Path = METHODS) -> list[Method]:
    """Every method of the published figures that has a FID, in the order of the file."""
    from export.models import SCHEDULERS

    claims = {claim.id: claim for claim in read_claims() if claim.fid_5k is not None}
    with path.open(newline="") as file:
        return [
            Method(
                label=row["label"],
                nfe=int(row["nfe"]),
                unets=int(row["unets"]),
                model=row["model"],
                scheduler=SCHEDULERS.get(row["scheduler"], ""),
                why=row["why"],
                claim=claims[row["id"]],
            )
            for row in csv.DictReader(file)
        ]


def evaluated(method: Method) -> str:
    return f"{method.evaluations} evaluation{'s' * (method.evaluations != 1)}"


# ---- latencies from runs


@dataclass(frozen=True)
class Found:
    """A cell of ours that can stand in a chart, with its rows and the run they are from."""

    hardware: str
    run: str
    line: CellRounds

    @property
    def setting(self) -> tuple[str, str, str]:
        """What all points of a chart share."""
        return self.hardware, self.line.cell.backend_text, self.line.cell.numerics


def found_in(runs: Sequence[Run]) -> list[Found]:
    """Cells at the conditions of the chart that were measured and are ok, the newest run last."""
    size = "{}x{}".format(*SIZE)
    return [
        Found(hardware_of(run.header.environment, line.cell.device), run.name, line)
        for run in sorted(runs, key=lambda one: one.name)
        for line in by_cell([row for row in run.rows() if row["provenance"] == MEASURED])
        if line.good
        and (line.cell.size, line.cell.batch, line.cell.decoder) == (size, BATCH, DECODER)
        and line.cell.backend != "null"
        and not (line.cell.encoder or line.cell.negative or line.cell.scenario)
    ]


def from_runs(runs: Sequence[Run], backend: str | None = None) -> Chart | None:
    """Latencies on the hardware and backend of the newest run that has the stand-in; None without.

    Of several cells of the stand-in the one with most UNet evaluations gives their time.
    """
    every = [one for one in found_in(runs) if backend in (None, one.line.cell.backend_text)]
    stand_ins = [
        one
        for one in every
        if one.line.cell.model == STAND_IN
        and all(row["stages_samples_ms"] for row in one.line.good)
    ]
    if not stand_ins:
        return None
    setting = stand_ins[-1].setting
    every = [one for one in every if one.setting == setting]
    most = max(
        (one for one in stand_ins if one.setting == setting),
        key=lambda one: (one.line.median("nfe") or 0, one.run),
    )
    once_ms, evaluation_ms = split(most.line)
    points = []
    for method in methods():
        same = [one for one in every if is_method(one.line, method)]
        if same:
            one = same[-1]
            latency = one.line.median("median_ms") or math.nan
            points.append(Point(method, latency, None, None, MEASURED, f"run {one.run}"))
        else:
            latency = once_ms + method.evaluations * evaluation_ms
            source = f"{STAND_IN}'s UNet, {evaluated(method)}, run {most.run}"
            points.append(Point(method, latency, None, None, MODELLED, source))
    model = (
        f"Modelled: {once_ms:,.0f} ms an image and {evaluation_ms:,.0f} ms a UNet evaluation, as"
        f" measured on {STAND_IN}"
    )
    if most.line.cell.guidance_mode == "batch":
        model += " (half of a batch of two)"
    return Chart(setting[0], f"{setting[1]}, {setting[2]}", model, points)


def is_method(line: CellRounds, method: Method) -> bool:
    cell = line.cell
    return (
        (cell.model, cell.scheduler, cell.steps)
        == (method.model, method.scheduler, method.claim.steps)
        and line.median("nfe") == method.nfe
    )  # fmt: skip


def split(line: CellRounds) -> tuple[float, float]:
    """(what an image takes beside the UNet, one UNet evaluation) of a cell, in ms.

    The first holds the scheduler's work for all steps and, under guidance, the empty prompt:
    pessimistic by these few milliseconds for a method of one step.
    """
    unet = [sum(steps) for row in line.good for steps in row["stages_samples_ms"]["unet"]]
    whole, total, nfe = line.median("median_ms"), statistics.median(unet), line.median("nfe")
    return (whole or math.nan) - total, total / (nfe or math.nan)


# ---- latencies from a known card


def from_device(name: str) -> Chart:
    """Latencies modelled for a card of devices.csv: the middle of the range that is no surprise.

    Raises:
        PreconditionError: there is no such card, or no range is known for its vendor.
    """
    from bench.limits.ranges import call_ms, can_model, reached
    from core.devices import find_device

    device = find_device(name)
    if not can_model(device):
        raise PreconditionError(
            f"{device.name} cannot be modelled",
            f"no share of the peak is known that programs reach on {device.vendor}",
            "add it with its source to EFFICIENCY in bench/limits/ranges.py",
        )
    once, unet = costs_of_parts(STAND_IN)
    points = []
    for method in methods():
        found = call_ms(device, BATCH, [*once, (unet, method.evaluations)])
        fast, slow = found.fast, found.slow
        source = f"{STAND_IN}'s parts, {evaluated(method)}, floor {found.floor:.1f} ms"
        points.append(Point(method, math.sqrt(fast * slow), fast, slow, MODELLED, source))
    widest = max(point.latency_ms / (point.low_ms or math.nan) for point in points)
    model = (
        f"Modelled: {STAND_IN}'s FLOPs and bytes at {reached(device)};"
        f" points in the middle: a factor of {widest:.1f} either way"
    )
    return Chart(device.name, "FP16", model, points)


def costs_of_parts(model: str) -> tuple[list[tuple[Cost, int]], Cost]:
    """Costs of what runs once an image, and of the UNet."""
    from export.cost import part_cost_at
    from export.models import find_model
    from export.source.checkpoint import open_checkpoint

    entry = find_model(model)
    checkpoint = open_checkpoint(entry, "random")
    costs = {
        part: part_cost_at(checkpoint, part, BATCH, *SIZE)
        for part in entry.parts
        if part != "taesd_decoder"
    }
    return [(costs[part], 1) for part in costs if part != "unet"], costs["unet"]


# ---- the table


def whole_range(point: Point) -> str:
    return "" if point.low_ms is None else f"{point.low_ms:.0f} to {point.high_ms:.0f}"


def elsewhere(point: Point) -> str:
    claim = point.method.claim
    return f"{claim.value:g} {claim.unit} on {claim.hardware}"


COLUMNS = (
    Column("method", lambda point: point.method.label),
    Column("FID-5k (published)", lambda point: point.method.fid, 1),
    Column("CLIP score (published)", lambda point: point.method.claim.clip_score, 3),
    Column("NFE", lambda point: point.method.nfe, 0),
    Column("latency (ms)", lambda point: point.latency_ms, 0),
    Column("range (ms)", whole_range),
    Column("provenance", lambda point: point.provenance),
    Column("latency from", lambda point: point.source),
    Column("NFE because", lambda point: point.method.why),
    Column("published latency", elsewhere),
    Column("FID and published latency from", lambda point: point.method.claim.source),
)


def columns_for(chart: Chart) -> list[Column]:
    ranged = any(point.low_ms is not None for point in chart.points)
    return [column for column in COLUMNS if ranged or column.header != "range (ms)"]


def markdown(chart: Chart) -> str:
    size = "{}x{}".format(*SIZE)
    return "\n".join(
        [
            f"Latency of one image on {chart.hardware}: {size} px, batch {BATCH}, {DECODER};"
            f" {chart.conditions}. {chart.model}. NFE: UNet evaluations of an image.",
            "",
            *markdown_lines(columns_for(chart), chart.points),
            "",
        ]
    )


def table_csv(chart: Chart) -> str:
    """Every column, unrounded, with the hardware."""
    hardware = Column("hardware", lambda _: chart.hardware)
    return csv_text([hardware, *columns_for(chart)], chart.points)


def nothing_to_draw(which: str) -> PreconditionError:
    """Return the refusal of runs without a latency of the stand-in."""
    size = "{}x{}".format(*SIZE)
    return PreconditionError(
        f"{which} no latency of {STAND_IN}",
        f"a measured cell is needed: {size} px, batch {BATCH}, {DECODER}, any steps",
        f"pass a run that has one (`addbench versus --pair {STAND_IN}-vs-turbo`), or"
        " --device a100-sxm-80gb",
    )
