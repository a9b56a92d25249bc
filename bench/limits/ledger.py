"""Published figures and ours, in one form: the material of the claims."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.rows.cell import Cell
from bench.rows.stats import median_or_none
from bench.rows.store import Row, Run, is_timed
from core.devices import devices, identify

DATA = Path(__file__).with_name("data")
FIGURES, METHODS = DATA / "published_figures.csv", DATA / "methods.csv"
ELSEWHERE, LEFT_OUT = DATA / "published_elsewhere.csv", DATA / "left_out.csv"
"""What others published of few-step and other models, to hold the ranges against; and what of it
is not used, with the reason."""
MODELS = {
    "SDXL-Turbo": "sdxl-turbo",
    "SD-1.5": "sd15",
    "SD-Turbo": "sd-turbo",
    "SDXL-base": "sdxl-base",
    "LCM-SDXL": "lcm-sdxl",
}
"""Published names of models -> ours."""
STATED = {"a10g-sd15-20step": 40}
"""UNet evaluations where a source states them (40 to 42) and `methods.csv` does not."""
SAME_NFE = 0.05
"""Two schedulers' timesteps for as many steps differ by one or two of twenty."""
PROGRAMS = {
    "Cloud AI 100 Ultra (150 W TDP)": "qaic",
    "TensorRT 9.2 demo": "trt",
    "ORT TensorRT EP (static)": "trt",
    "ORT CUDA EP (static)": "cuda",
    "torch.compile": "torch:mode=compile",
    "diffusers eager": "torch:mode=eager",
    "fastsdcpu (OpenVINO)": "openvino",
    "fastsdcpu (PyTorch)": "torch",
    "StreamDiffusion TensorRT": "trt",
}
"""What a published system runs on, as `--backend` names it; a system that does not say is not here.
"""


@dataclass(frozen=True)
class Claim:
    """One published figure with its conditions; None where the source does not state one."""

    id: str
    system: str
    model: str
    hardware: str
    precision: str
    size: int | None
    batch: int | None
    steps: int | None
    decoder: str | None
    scope: str
    metric: str
    value: float | None
    unit: str
    qualifier: str
    source: str
    fid_5k: float | None = None
    clip_score: float | None = None
    software: str = ""
    """What it ran on, where many systems share it; as `system` says it elsewhere."""
    accelerators: int = 1
    """SoCs or cards that share a call out among them."""
    counted: int | None = None
    """UNet evaluations of an image where the file of the figure says them."""

    @property
    def call_ms(self) -> float | None:
        """Milliseconds of a call, or between two of them; None if the figure is no time."""
        if self.value is None:
            return None
        if self.metric in ("latency", "period") and self.unit == "ms":
            return self.value
        if self.metric == "throughput" and self.unit == "images/s" and self.batch:
            return 1e3 * self.batch / self.value
        return None

    @property
    def evaluations(self) -> int | None:
        """UNet evaluations of an image; those of a network of two UNets count twice."""
        return self.counted or evaluations().get(self.id, self.steps)

    @property
    def conditions(self) -> str:
        stated = [
            f"{self.size} px" if self.size else "",
            f"batch {self.batch}" if self.batch else "batch not stated",
            f"{self.steps} step{'s' * (self.steps != 1)}" if self.steps else "steps not stated",
            self.decoder or ("" if self.scope == "unet" else "decoder not stated"),
            self.precision,
            self.scope,
        ]
        return ", ".join(filter(None, stated))


@cache
def evaluations() -> dict[str, int]:
    """UNet evaluations of an image by claim, where they are not the steps."""
    with METHODS.open(newline="") as file:
        listed = {row["id"]: int(row["nfe"]) * int(row["unets"]) for row in csv.DictReader(file)}
    return listed | STATED


def read_claims(path: Path = FIGURES) -> list[Claim]:
    """The published figures, in the order of the file."""

    def number(text: str) -> int | None:
        return int(text) if text else None

    def real(text: str) -> float | None:
        return float(text) if text else None

    with path.open(newline="") as file:
        return [
            Claim(
                id=row["id"],
                system=row["system"],
                model=row["model"],
                hardware=row["hardware"],
                precision=row["precision"],
                size=number(row["size_px"]),
                batch=number(row["batch"]),
                steps=number(row["steps"]),
                decoder=row["decoder"] or None,
                scope=row["scope"],
                metric=row["metric"],
                value=real(row["value"]),
                unit=row["unit"],
                qualifier=row["qualifier"],
                source=row["source"],
                fid_5k=real(row.get("fid_5k", "")),
                clip_score=real(row.get("clip_score", "")),
                software=row.get("software", ""),
                accelerators=number(row.get("accelerators", "")) or 1,
                counted=number(row.get("evaluations", "")),
            )
            for row in csv.DictReader(file)
        ]


# ---- what we measured


@dataclass(frozen=True)
class Ours:
    """One cell of ours, medians over its rounds that are ok. Times in milliseconds."""

    hardware: str
    cell: Cell
    run: str
    median_ms: float
    period_ms: float | None
    joules: float | None
    """The energy of one call."""
    nfe: float | None = None

    @property
    def images_per_joule(self) -> float | None:
        return self.cell.batch / self.joules if self.joules else None

    def time_for(self, claim: Claim) -> float | None:
        """The figure that a claim of that metric is about: a latency is no period."""
        return self.period_ms if claim.metric == "period" else self.median_ms

    def __str__(self) -> str:
        return f"{self.cell} on {self.hardware}: {self.median_ms:.1f} ms"


def hardware_of(environment: Mapping[str, Any], device: str) -> str:
    """The claims' name for what a row ran on, or what it calls itself.

    `accelerators` in a run's environment maps the rows' device to the driver's name for it.
    """
    if device == "cpu":
        cpu = str(environment.get("cpu", "unknown"))
        return " ".join(cpu.replace("(R)", "").replace("(TM)", "").split())
    reported = str(environment.get("accelerators", {}).get(device, device))
    known = devices().get(reported) or identify(reported)
    return known.name if known else reported


def measured(runs: Iterable[Run]) -> list[Ours]:
    """Every cell of ours that is measured, not modelled."""
    found = []
    for run in runs:
        by_cell: dict[Cell, list[Row]] = {}
        for row in run.rows():
            if is_timed(row) and row["provenance"] == "measured":
                by_cell.setdefault(Cell.of(row), []).append(row)
        for cell, rows in by_cell.items():
            if cell.backend == "null":
                continue  # a scripted device
            found.append(
                Ours(
                    hardware_of(run.header.environment, cell.device),
                    cell,
                    run.name,
                    statistics.median(row["median_ms"] for row in rows),
                    median_or_none([row.get("period_ms") for row in rows]),
                    median_or_none([row["energy_j"] for row in rows]),
                    median_or_none([row["nfe"] for row in rows]),
                )
            )
    return found


def mismatches(claim: Claim, ours: Ours) -> list[str]:
    """The stated conditions of a claim that a cell of ours does not meet."""
    cell = ours.cell
    pairs: Sequence[tuple[str, Any, Any]] = (
        ("size", f"{claim.size}x{claim.size}" if claim.size else None, cell.size),
        ("batch", claim.batch, cell.batch),
        ("steps", claim.steps, cell.steps),
        ("decoder", claim.decoder, cell.decoder),
        ("precision", claim.precision or None, cell.precision),
        ("scope", claim.scope, "end-to-end"),
        ("memory", False, cell.low_memory),
        ("picture", "", cell.encoder),
        # A period is that of a card that always has work, which is what `offline` gives it.
        (
            "scenario",
            "offline" if claim.metric == "period" and cell.scenario else "",
            cell.scenario,
        ),
        ("negative prompt", "", cell.negative),
    )
    found = [name for name, wanted, have in pairs if wanted is not None and wanted != have]
    wanted, nfe = claim.evaluations, ours.nfe
    if wanted and nfe and abs(nfe - wanted) > SAME_NFE * wanted and "steps" not in found:
        found.append("UNet evaluations")
    return found if is_hardware(claim.hardware, ours.hardware) else ["hardware", *found]


def is_hardware(wanted: str, have: str) -> bool:
    """Whether what a row ran on is what a claim names: `Core i7-12700` is no `Core i7-12700K`."""
    return bool(wanted) and bool(re.search(rf"(?<![\w-]){re.escape(wanted)}(?![\w-])", have))


def is_program(claim: Claim, ours: Ours) -> bool:
    """Whether a cell of ours ran on what the claim's system runs on, or that does not say."""
    wanted = PROGRAMS.get(claim.system)
    if wanted is None:
        return True
    backend, _, option = wanted.partition(":")
    options = ours.cell.options.split(",")
    eager = not any(each.startswith("mode=") for each in options)
    return ours.cell.backend == backend and (
        not option or option in options or (option == "mode=eager" and eager)
    )


def nearest(claim: Claim, ours: Sequence[Ours]) -> Ours | None:
    """The cell of ours that meets most of a claim's conditions; of the same model, or none."""
    fitting = [one for one in ours if one.cell.model == MODELS.get(claim.model)]
    weights = {"hardware": 8, "scope": 4, "size": 4, "steps": 2, "decoder": 2, "batch": 2}
    return min(
        fitting,
        key=lambda one: (sum(weights.get(n, 1) for n in mismatches(claim, one)), one.median_ms),
        default=None,
    )
