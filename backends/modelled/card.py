"""How long a Cloud AI 100 card would take for one pipeline call: modelled, never measured.

A part takes `max(compute, stream)`, and what of the two does not overlap, as `fit` found it on
published results; a card of several SoCs has its share of peak, bandwidth and memory on each. What
nobody has published is assumed, and stands in ASSUMPTIONS. An interval is 8 of 10 of a thousand
draws of the assumptions and of the errors that the fit made on networks it had not seen; the same
draws for every call, so that calls differ by what they do and not by chance. No draw is below a
part's floor: all FLOPs at the peak, or all weights once at full bandwidth.

Splits of a call of N images:

    pipelines   a batch-1 pipeline on every SoC, side by side; images and calls are dealt out
    batch       all N images as one batch on one SoC; calls are dealt out
    parts       every part on an SoC of its own, all N images through each; calls follow each other
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from backends.base import UnsupportedError
from backends.modelled.fit import DDR, KINDS, Vector, factor, fits
from core.devices import Device
from export.cost import Cost

SPLITS = ("pipelines", "batch", "parts")
DRAWS = 1024
INTERVAL = (0.1, 0.9)
HOST_S = (0.002, 0.010)
SWITCH_S = (0.100, 0.200)
ASSUMPTIONS = (
    f"DDR: programs get {DDR[0]:.0%} to {DDR[-1]:.0%} of its bandwidth; weights are read once for"
    " every evaluation of a part",
    "activations: anything between all kept on the chip and all read and written once through DDR",
    f"host: {1e3 * HOST_S[0]:.0f} to {1e3 * HOST_S[1]:.0f} ms an image for tokens, noise, scheduler"
    " and uint8 (of the published rows of SDXL-Turbo on our CPU, nine in ten or more took as much"
    " outside of the parts)",
    "program switching: none, all parts resident; `switching` figures add"
    f" {1e3 * SWITCH_S[0]:.0f} to {1e3 * SWITCH_S[1]:.0f} ms to each turn of a pipeline on an SoC,"
    " what one published study saw on full SDXL",
    "an SoC reaches the same share of its own peak as the Standard card of the published results,"
    " and an operator costs as much time beside, whatever the clock and the power that each may"
    " draw (a Standard card has 75 W; a public record of an Ultra shows a limit of 31 W an SoC)",
)
"""What the model takes for granted: no source for this card gives it."""


@dataclass(frozen=True)
class Interval:
    """Seconds: the central assumptions, and 8 of 10 draws."""

    low: float
    mid: float
    high: float

    @classmethod
    def of(cls, drawn: Vector) -> Interval:
        """From one value for the central assumptions and then one for each draw."""
        low, high = (float(each) for each in np.quantile(drawn[1:], INTERVAL))
        return cls(low, float(drawn[0]), high)


@dataclass(frozen=True)
class Draws:
    """The assumptions: the central ones first, then DRAWS others. Vectors of one length.

    Attributes:
        ddr: share of the bandwidth; activations: share that goes through DDR.
        host_s, switch_s: seconds an image, seconds a turn.
        efficiency, serial, overhead_s, error: by kind, see `fit.Fit`; `error` multiplies times.
    """

    ddr: Vector
    activations: Vector
    host_s: Vector
    switch_s: Vector
    efficiency: Mapping[str, Vector]
    serial: Mapping[str, Vector]
    overhead_s: Mapping[str, Vector]
    error: Mapping[str, Vector]


@cache
def draws() -> Draws:
    """Sobol points: spread evenly, and the same every time."""
    from scipy.stats import qmc

    points = qmc.Sobol(6, rng=np.random.default_rng(7)).random(DRAWS)
    which = np.minimum((points[:, 0] * len(DDR)).astype(int), len(DDR) - 1)
    middle = len(DDR) // 2

    def uniform(column: int, low: float, high: float) -> Vector:
        return np.concatenate([[(low + high) / 2], low + (high - low) * points[:, column]])

    found = fits()
    parameters = {kind: np.array([found[kind, ddr].parameters for ddr in DDR]) for kind in KINDS}
    chosen = np.concatenate([[middle], which])
    error: dict[str, Vector] = {}
    for column, kind in enumerate(KINDS, start=4):
        drawn = np.empty(DRAWS)
        for place, ddr in enumerate(DDR):
            mine, one = which == place, found[kind, ddr]
            drawn[mine] = np.quantile(
                one.held_out, points[mine, column], weights=one.weights, method="inverted_cdf"
            )
        error[kind] = np.concatenate([[1.0], drawn])
    return Draws(
        ddr=np.array(DDR)[chosen],
        activations=uniform(1, 0.0, 1.0),
        host_s=uniform(2, *HOST_S),
        switch_s=uniform(3, *SWITCH_S),
        efficiency={kind: parameters[kind][chosen, 0] for kind in KINDS},
        serial={kind: parameters[kind][chosen, 1] for kind in KINDS},
        overhead_s={kind: parameters[kind][chosen, 2] for kind in KINDS},
        error=error,
    )


@dataclass(frozen=True)
class Call:
    """What a pipeline does in one call.

    Attributes:
        unet_inputs: of the UNet for an image: 2 where guidance runs as one batch.
        unet_calls: of the UNet at a timestep: 2 where guidance runs as two calls.
    """

    decoder: str
    steps: int
    batch: int
    split: str = "pipelines"
    unet_inputs: int = 1
    unet_calls: int = 1


@dataclass(frozen=True)
class Times:
    """A modelled call. Seconds.

    Attributes:
        latency: of a call, all parts resident.
        period: between the ends of two calls while the card is kept busy.
        switching_latency, switching_period: the same where programs are switched.
        rest: of the latency, what the host takes while no SoC works for the call.
        floor, period_floor: of latency and period, whatever the draw; no host work.
    """

    latency: Interval
    period: Interval
    switching_latency: Interval
    switching_period: Interval
    rest: Interval
    floor: float
    period_floor: float


@dataclass(frozen=True)
class Estimate(Times):
    """`stages` of a call: `text`, `unet_step` (one timestep), `decode`, `rest` (host)."""

    stages: Mapping[str, Interval]


def default_split(device: Device) -> str:
    """Side by side where there are several SoCs, a batch where there is one."""
    return "pipelines" if device.socs > 1 else "batch"


def part_seconds(cost: Cost, batch: int, device: Device) -> Vector:
    """One evaluation of a part on one SoC, for every draw. `cost` is that of batch 1."""
    drawn = draws()
    peak = device.fp16_tflops_dense * 1e12 / device.socs
    bandwidth = device.memory_gb_per_s * 1e9 / device.socs
    flops = {
        "matmul": batch * (cost.by_kind["linear"] + cost.by_kind["attention"]),
        "conv": batch * cost.by_kind["conv"],
    }
    operators = {
        "matmul": cost.operators["linear"] + cost.operators["attention"],
        "conv": cost.operators["conv"],
    }
    share = flops["conv"] / max(1.0, sum(flops.values()))  # of convolutions
    compute = sum((flops[kind] / (drawn.efficiency[kind] * peak) for kind in KINDS), np.zeros(()))
    moved = cost.weight_bytes + drawn.activations * batch * cost.activation_bytes
    stream = moved / (drawn.ddr * bandwidth)
    serial = (1 - share) * drawn.serial["matmul"] + share * drawn.serial["conv"]
    overhead = sum((operators[kind] * drawn.overhead_s[kind] for kind in KINDS), np.zeros(()))
    seconds = np.maximum(compute, stream) + serial * np.minimum(compute, stream) + overhead
    seconds = seconds * drawn.error["matmul"] ** (1 - share) * drawn.error["conv"] ** share
    return np.asarray(np.maximum(seconds, part_floor(cost, batch, device)))


def part_floor(cost: Cost, batch: int, device: Device) -> float:
    """Seconds at the peak of one SoC, or for its weights at full bandwidth if that is longer."""
    return max(
        batch * cost.flops / (device.fp16_tflops_dense * 1e12 / device.socs),
        cost.weight_bytes / (device.memory_gb_per_s * 1e9 / device.socs),
    )


def sequence(
    device: Device, batch: int, parts: Sequence[tuple[Cost, int]], split: str | None = None
) -> Times:
    """A call that runs parts one after the other on the SoC that takes it: `pipelines`, `batch`.

    Args:
        parts: cost at batch 1 of each, and its evaluations.
        split: None for the card's default.
    """
    side_by_side = (split or default_split(device)) == "pipelines"
    images = 1 if side_by_side else batch
    turns = math.ceil(batch / device.socs) if side_by_side else 1
    host = draws().host_s
    device_s = sum(
        (times * part_seconds(cost, images, device) for cost, times in parts), np.zeros(())
    )
    least = sum(times * part_floor(cost, images, device) for cost, times in parts)
    # Turns that every SoC takes for each call, when all have work. One host serves them all.
    share = batch / (images * device.socs)

    def times_of(turn: Vector) -> tuple[Interval, Interval, Interval]:
        rest = np.maximum(turns * images * host, batch * host - turns * turn)
        period = np.maximum(share * (turn + images * host), batch * host)
        return Interval.of(turns * turn + rest), Interval.of(period), Interval.of(rest)

    latency, period, rest = times_of(device_s)
    switching_latency, switching_period, _ = times_of(device_s + draws().switch_s)
    return Times(
        latency=latency,
        period=period,
        switching_latency=switching_latency,
        switching_period=switching_period,
        rest=rest,
        floor=turns * least,
        period_floor=share * least,
    )


def spread(device: Device, batch: int, parts: Sequence[tuple[Cost, int]], encoders: int) -> Times:
    """A call whose parts have an SoC each: `parts`. The first `encoders` run at the same time.

    Raises:
        UnsupportedError: the card has fewer SoCs than parts.
    """
    if device.socs < len(parts):
        raise UnsupportedError(
            f"{device.name} cannot hold {len(parts)} parts on an SoC each",
            f"it has {device.socs}",
            f"use split={default_split(device)}",
        )
    each = [times * part_seconds(cost, batch, device) for cost, times in parts]
    floors = [times * part_floor(cost, batch, device) for cost, times in parts]
    host = batch * draws().host_s
    once = np.max(each[:encoders], axis=0) + np.sum(each[encoders:], axis=0) + host
    latency = Interval.of(once)
    period = Interval.of(np.max([*each, host], axis=0))
    floor = max(floors[:encoders]) + sum(floors[encoders:])
    return Times(latency, period, latency, period, Interval.of(host), floor, max(floors))


def estimate(device: Device, costs: Mapping[str, Cost], call: Call) -> Estimate:
    """The model of one call on one card. `costs`: of every part at batch 1, FP16.

    Raises:
        UnsupportedError: the card has fewer SoCs than the split needs.
    """
    encoders = [part for part in costs if part.startswith("text_encoder")]
    unet, decoder = doubled(costs["unet"], call.unet_inputs), costs[f"{call.decoder}_decoder"]
    text = [costs[part] for part in encoders]
    evaluations = call.steps * call.unet_calls
    parts = [*((cost, 1) for cost in text), (unet, evaluations), (decoder, 1)]
    if call.split == "parts":
        times = spread(device, call.batch, parts, len(encoders))
        images, turns = call.batch, 1
    else:
        times = sequence(device, call.batch, parts, call.split)
        side_by_side = call.split == "pipelines"
        images = 1 if side_by_side else call.batch
        turns = math.ceil(call.batch / device.socs) if side_by_side else 1
    encoded = [part_seconds(cost, images, device) for cost in text]
    stages = {
        "text": np.max(encoded, axis=0) if call.split == "parts" else np.sum(encoded, axis=0),
        "unet_step": call.unet_calls * part_seconds(unet, images, device),
        "decode": part_seconds(decoder, images, device),
    }
    found = {name: Interval.of(turns * seconds) for name, seconds in stages.items()}
    return Estimate(**vars(times), stages={**found, "rest": times.rest})


def doubled(cost: Cost, inputs: int) -> Cost:
    """A part that takes `inputs` inputs for every image; its weights are read once for all."""
    return replace(
        cost,
        flops=inputs * cost.flops,
        activation_bytes=inputs * cost.activation_bytes,
        by_kind={kind: inputs * flops for kind, flops in cost.by_kind.items()},
    )


def reach() -> str:
    """What the fits say of the card, in a sentence."""
    words = []
    for kind, name in zip(KINDS, ("matrix products", "convolutions"), strict=True):
        one = fits()[kind, DDR[len(DDR) // 2]]
        median, most = (factor(one.held_out, one.weights, share) for share in (0.5, 0.9))
        words.append(
            f"{name} at {one.efficiency:.0%} of the peak (held-out error: a factor of {median:.2f}"
            f" in the median, {most:.2f} at the 90th percentile)"
        )
    return (
        f"fitted to the maker's published FP16 results on a Standard card, {' and '.join(words)};"
        f" {DDR[0]:.0%} to {DDR[-1]:.0%} of the DDR's bandwidth is an assumption"
    )
