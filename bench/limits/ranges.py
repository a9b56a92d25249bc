"""What a known card could do at best, and what would be no surprise: modelled, never measured.

Two kinds of model. A Cloud AI 100 has the one that was fitted to its maker's published results
(backends/modelled): the range is 8 of 10 draws, all parts resident. Of any other card only the
shares of its peaks are known that programs were seen to reach: the range divides by both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from backends.modelled.costs import LISTED, SAME_PARTS
from bench.limits.ledger import DATA, Claim, Ours
from core.devices import Device, devices
from core.files import read_json
from export.cost import Cost, budget_cost
from export.models import MODELS as OURS

STEPS, DECODERS = (1, 2, 4), ("vae", "taesd")
SCOPES = {
    "end-to-end": ("text_encoder", "text_encoder_2", "unet", "decoder"),
    "text": ("text_encoder", "text_encoder_2"),
    "unet+decode": ("unet", "decoder"),
    "unet": ("unet",),
    "decode": ("decoder",),
}
COSTS = DATA / "costs_512px.json"
COSTED = {
    "SDXL-Turbo": LISTED,
    "SDXL-base": LISTED,
    "LCM-SDXL": LISTED,
    "SDXL LCM-LoRA": LISTED,
    "SD-1.5": "sd15",
    "SD-Turbo": "sd-turbo",
}
"""Published names of models -> ours whose parts cost as much: SDXL's are all the same networks."""
EIGHT_BIT = ("fp8", "int8")
HALF = ("fp16", "bf16", "mixed")
FITTED = "Qualcomm"
"""Vendor of the cards that backends/modelled knows."""


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
        source="80% is what a large matmul reached on one H200, 90% what a copy did; 10% and 60%"
        " are assumptions that are older than any published figure here, which are held against"
        " them: `addbench claims --coverage`. On GeForce cards the fast end adds up in FP16, the"
        " slow end in FP32 at half the rate",
    ),
}


@dataclass(frozen=True)
class Range:
    """Milliseconds of a call. `switched`: the slow end where a card switches to each program."""

    floor: float
    fast: float
    slow: float
    switched: float | None = None


@dataclass(frozen=True)
class Modelled:
    """Milliseconds of a call, or between calls, on one device. Provenance: `modelled`.

    `floor`: every part at the peak or its weights at full bandwidth, whichever takes longer, for
    direct algorithms. `fast` and `slow`: the range. `switched`: see `Range`.
    """

    steps: int
    decoder: str
    floor: float
    fast: float
    slow: float
    switched: float | None = None

    def fit(self, call_ms: float) -> str:
        if call_ms < self.floor:
            return "impossible"
        if call_ms < self.fast:
            return "beyond the range"
        return "fits" if call_ms <= self.slow else "time to spare"


def can_model(device: Device) -> bool:
    return device.vendor == FITTED or device.vendor in EFFICIENCY


@cache
def costs_512px() -> dict[str, dict[str, Cost]]:
    """Return each model's costs as `export.cost.part_cost_at` has them: tracing takes seconds."""
    return {
        model: {part: Cost(**columns) for part, columns in parts.items()}
        for model, parts in read_json(COSTS).items()
    }


def cost_of(model: str, part: str, size: int) -> Cost | None:
    """The cost of a part at batch 1; None where no table has it."""
    if model == LISTED:
        return budget_cost(part, size)
    return costs_512px()[model][part] if size == 512 and model in costs_512px() else None


def modelled(
    device: Device,
    size: int,
    batch: int,
    steps: int,
    decoder: str,
    scope: str = "end-to-end",
    *,
    model: str = LISTED,
    evaluations: int | None = None,
    precision: str = "fp16",
) -> Modelled | None:
    """The model of one call of `batch` images; None at a size whose cost is not known.

    A card of several SoCs runs a pipeline on each, side by side: a call is `batch / socs` images
    on one of them, with its share of peak and bandwidth.

    Args:
        evaluations: of the UNet, where they are not the steps.
        precision: of the UNet.
    """  # fmt: skip
    parts = []
    for name in SCOPES[scope]:
        part = f"{decoder}_decoder" if name == "decoder" else name
        if part not in OURS[model].parts:
            continue
        cost = cost_of(model, part, size)
        if cost is None:
            return None
        parts.append((cost, (evaluations or steps) if name == "unet" else 1))
    found = call_ms(device, batch, parts, precision)
    return Modelled(steps, decoder, found.floor, found.fast, found.slow, found.switched)


def call_ms(
    device: Device,
    batch: int,
    parts: Sequence[tuple[Cost, int]],
    precision: str = "fp16",
) -> Range:
    """The range of a call that runs `parts` one after the other.

    Args:
        parts: the cost of each at batch 1, FP16, and its evaluations.
        precision: of the UNet. In 8 bits the range has everything else in FP16; the floor has all
            of it in 8 bits.
    """
    if device.vendor == FITTED:
        return fitted_ms(device, batch, parts)
    images = -(-batch // device.socs)
    bandwidth = device.memory_gb_per_s / device.socs  # GB/s = MB/ms
    halves = [rate / device.socs for rate in (device.fp16_tflops_dense, device.slower_fp16_tflops)]
    eight = (device.int8_tops_dense or math.nan) / device.socs
    in_eight = precision in EIGHT_BIT

    def total(
        half: float, compute: float, memory: float, is_eight: Callable[[str], bool]
    ) -> float:  # half: TFLOP/s = GFLOP/ms
        return sum(
            times
            * max(
                images * cost.flops / 1e9 / ((eight if is_eight(cost.part) else half) * compute),
                cost.weight_bytes / (2e6 if is_eight(cost.part) else 1e6) / (bandwidth * memory),
            )
            for cost, times in parts
        )

    reached = EFFICIENCY[device.vendor]
    fast, slow = (
        total(half, compute, memory, lambda part: in_eight and part == "unet")
        for half, compute, memory in zip(
            halves, reached.compute[::-1], reached.bandwidth[::-1], strict=True
        )
    )
    return Range(total(halves[0], 1.0, 1.0, lambda part: in_eight), fast, slow)


def fitted_ms(device: Device, batch: int, parts: Sequence[tuple[Cost, int]]) -> Range:
    from backends.modelled.card import sequence

    found = sequence(device, batch, parts)
    return Range(
        1e3 * found.floor,
        1e3 * found.latency.low,
        1e3 * found.latency.high,
        1e3 * found.each.latency.high,
    )


def reached(device: Device) -> str:
    """The share of the card's peak that its range is made of, in words."""
    if device.vendor == FITTED:
        return "what a model of the card has them reach, with its assumptions"
    low, high = EFFICIENCY[device.vendor].compute
    return f"{low:.0%} to {high:.0%} of the card's peak"


def explained() -> list[str]:
    """What the ranges are made of, a sentence or two for each vendor."""
    from backends.modelled.card import reach

    ranges = [
        f"{vendor}: compute {each.compute[0]:.0%} to {each.compute[1]:.0%} of the peak, memory"
        f" {each.bandwidth[0]:.0%} to {each.bandwidth[1]:.0%}: {each.source}."
        for vendor, each in EFFICIENCY.items()
    ]
    return [*ranges, f"{FITTED}: {reach()}. `addbench cards` has all of it."]


def floor_of(ours: Ours) -> float | None:
    """Milliseconds that no call of a cell of ours goes below; None where no floor is known.

    A cell that is faster was not measured right.
    """
    cell, device = ours.cell, devices().get(ours.hardware)
    width, _, height = cell.size.partition("x")
    known = cell.model in COSTED.values() or cell.model in SAME_PARTS
    if device is None or not can_model(device) or not known or width != height:
        return None
    precision = "fp16" if device.int8_tops_dense is None else "int8"  # the faster that it may be
    found = modelled(
        device,
        int(width),
        cell.batch,
        cell.steps,
        cell.decoder,
        model=SAME_PARTS.get(cell.model, cell.model),
        precision=precision if cell.precision in EIGHT_BIT else "fp16",
    )
    return None if found is None else found.floor


def models_of(claim: Claim) -> list[Modelled]:
    """The model at the claim's conditions; at every step count and decoder it leaves open."""
    device, model = devices().get(claim.hardware), COSTED.get(claim.model)
    if model is None or device is None or not can_model(device):
        return []
    eight_bit = claim.precision in EIGHT_BIT
    if not eight_bit and claim.precision not in HALF:
        return []
    if eight_bit and (device.int8_tops_dense is None or device.vendor == FITTED):
        return []
    if claim.size is None or claim.batch is None or claim.scope not in SCOPES:
        return []
    # The period of an Offline run over many is that of one of them: an SoC, where a card has more.
    images = -(-claim.batch // claim.accelerators)
    decoders: Sequence[str] = [claim.decoder] if claim.decoder else DECODERS
    if "decoder" not in SCOPES[claim.scope]:
        decoders = [claim.decoder or ""]
    found = [
        modelled(
            device,
            claim.size,
            images,
            steps,
            decoder,
            claim.scope,
            model=model,
            evaluations=claim.evaluations,
            precision=claim.precision,
        )
        for decoder in decoders
        for steps in ([claim.steps] if claim.steps else STEPS)
    ]
    return [one for one in found if one is not None]
