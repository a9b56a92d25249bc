"""What a known card could do at best, and what would be no surprise: modelled, never measured."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from backends.devices import Device, devices
from bench.ledger import MODELS, Claim
from core.files import ROOT

BUDGET = ROOT / "export" / "budget.csv"
STEPS, DECODERS = (1, 2, 4), ("vae", "taesd")
SCOPES = {
    "end-to-end": ("text_encoder", "text_encoder_2", "unet", "decoder"),
    "unet+decode": ("unet", "decoder"),
    "unet": ("unet",),
    "decode": ("decoder",),
}


@dataclass(frozen=True)
class Efficiency:
    """The range of the peaks that real programs reach, as shares, and where it comes from."""

    compute: tuple[float, float]
    bandwidth: tuple[float, float]
    source: str


EFFICIENCY = {
    "NVIDIA": Efficiency(
        compute=(0.10, 0.80),
        bandwidth=(0.60, 0.90),
        source="80% is what a large matmul reached on one H200, 90% what a copy did; published"
        " eager and TensorRT pipelines at batch 1 lie between 9% and 27% of the peak; the lower"
        " ends are an assumption",
    ),
    "Qualcomm": Efficiency(
        compute=(0.27, 0.77),
        bandwidth=(0.60, 0.90),
        source="Qualcomm's own FP16 vision results on a Standard card, of 110 TFLOPS: median 30 at"
        " best throughput, 85 for large dense networks; that of the memory is an assumption",
    ),
}


@dataclass(frozen=True)
class Modelled:
    """Milliseconds of a call, or between calls, on one device. Provenance: `modelled`.

    `floor`: every part at the peak or its weights at full bandwidth, whichever takes longer, for
    direct algorithms. `fast` and `slow`: the floor over the efficiency range.
    """

    steps: int
    decoder: str
    floor: float
    fast: float
    slow: float

    def fit(self, call_ms: float) -> str:
        if call_ms < self.floor:
            return "impossible"
        if call_ms < self.fast:
            return "beyond the range"
        return "fits" if call_ms <= self.slow else "time to spare"


@cache
def budget() -> Mapping[str, Mapping[str, float]]:
    """GFLOP and megabytes of every SDXL-Turbo part, by part and column of export/budget.csv."""
    with BUDGET.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {
            row["part"]: {key: float(text) for key, text in row.items() if key != "part" and text}
            for row in rows
        }


def modelled(
    device: Device, size: int, batch: int, steps: int, decoder: str, scope: str = "end-to-end"
) -> Modelled | None:
    """The model of one call of `batch` images; None at a size whose cost is not known.

    A card of several SoCs runs a pipeline on each, side by side: a call is `batch / socs` images
    on one of them, with its share of peak and bandwidth.
    """
    column = f"gflop_{size}px"
    if column not in budget()["unet"]:
        return None
    images = -(-batch // device.socs)
    peak = device.fp16_tflops_dense / device.socs  # TFLOP/s = GFLOP/ms
    bandwidth = device.memory_gb_per_s / device.socs  # GB/s = MB/ms
    reached = EFFICIENCY[device.vendor]
    limits = [(1.0, 1.0), *zip(reached.compute[::-1], reached.bandwidth[::-1], strict=True)]
    totals = []
    for compute, memory in limits:
        total = 0.0
        for part in SCOPES[scope]:
            cost = budget()[f"{decoder}_decoder" if part == "decoder" else part]
            evaluations = steps if part == "unet" else 1
            total += evaluations * max(
                images * cost[column] / (peak * compute), cost["weights_mb"] / (bandwidth * memory)
            )
        totals.append(total)
    return Modelled(steps, decoder, *totals)


def models_of(claim: Claim) -> list[Modelled]:
    """The model at the claim's conditions; at every step count and decoder it leaves open."""
    device = devices().get(claim.hardware)
    if claim.model not in MODELS or device is None or device.vendor not in EFFICIENCY:
        return []
    if claim.size is None or claim.batch is None or claim.scope not in SCOPES:
        return []
    decoders: Sequence[str] = [claim.decoder] if claim.decoder else DECODERS
    if "decoder" not in SCOPES[claim.scope]:
        decoders = [claim.decoder or ""]
    found = [
        modelled(device, claim.size, claim.batch, steps, decoder, claim.scope)
        for decoder in decoders
        for steps in ([claim.steps] if claim.steps else STEPS)
    ]
    return [one for one in found if one is not None]
