"""How long a Cloud AI 100 card would take for one pipeline call: modelled, never measured.

A part takes what `program` says with the parameters that `fit` found on published results; a card
of several SoCs has its share of peak, bandwidth and memory on each. What nobody has published is
assumed, and stands in ASSUMPTIONS. An interval is 8 of 10 of a thousand draws of the assumptions,
of the fits by their weight, and of the errors that each made on networks it had not seen; the same
draws for every call, so that calls differ by what they do and not by chance. No draw is below a
part's floor: all FLOPs at the peak, or all weights once at full bandwidth.

Splits of a call of N images:

    pipelines   a batch-1 pipeline on every SoC, side by side; images and calls are dealt out
    batch       all N images as one batch on one SoC; calls are dealt out
    parts       every part on an SoC of its own, all N images through each; calls follow each other
    guidance    a batch-1 pipeline on every two SoCs, each with the UNet for one of guidance's two
                inputs; all else is on the first of them

In MLPerf's terms a latency of one image is what SingleStream measures, the period of a call over
its images the inverse of Offline's samples/s, and Server a latency while calls come at some rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from backends.base import UnsupportedError
from backends.modelled.fit import (
    DDR,
    KINDS,
    central,
    errors_of,
    factor,
    fits,
    unseen_errors,
    weights,
    without_sdxl,
)
from backends.modelled.program import (
    HOST_S,
    SHARES,
    SWITCH_S,
    Hardware,
    Parameters,
    Vector,
    Work,
    floor_seconds,
    seconds,
    switches,
)
from core.devices import Device
from export.cost import Cost

SPLITS = ("pipelines", "batch", "parts", "guidance")
DRAWS = 1024
INTERVAL = (0.1, 0.9)
ASSUMPTIONS = (
    f"DDR: programs get {DDR[0]:.0%} to {DDR[-1]:.0%} of its bandwidth; weights are read once for"
    " every evaluation of a part",
    "what SDXL at 1024 px spends most of its time on beside multiply-adds: the scores of attention,"
    f" the exchange of activations among the cores, or both, in shares of {SHARES[0]:.0%} to"
    f" {SHARES[-1]:.0%}, each as often as networks that its fit had not seen make it likely;"
    " neither goes through the DDR",
    f"host: {1e3 * HOST_S[0]:.0f} to {1e3 * HOST_S[1]:.0f} ms an image for tokens, noise, scheduler"
    " and uint8 (of the published rows of SDXL-Turbo on our CPU, nine in ten or more took as much"
    " outside of the parts)",
    "program switching: none, all parts resident; its authors say"
    f" {1e3 * SWITCH_S[0]:.0f} to {1e3 * SWITCH_S[1]:.0f} ms of a switch between programs of full"
    " SDXL, not how many a turn of a pipeline has: figures are given for one, and for one at each"
    " of its programs (four for SDXL), and SDXL's published times are fitted with the middle of"
    " the two",
    "everything on the chip goes with the clock of its cores: SDXL took 1.65 to 1.71 times as long"
    " on an Ultra's SoC as on a Pro, whose peaks differ by 1.72; the power that each may draw is"
    " left out (a Standard card has 75 W; a public record of an Ultra shows a limit of 31 W an"
    " SoC)",
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
        """Read one value for the central assumptions and then one for each draw."""
        low, high = (float(each) for each in np.quantile(drawn[1:], INTERVAL))
        return cls(low, float(drawn[0]), high)


@dataclass(frozen=True)
class Draws:
    """The assumptions: the central ones first, then DRAWS others. Vectors of one length.

    Attributes:
        ddr: share of the bandwidth.
        host_s, switch_s: seconds an image, seconds a switch.
        parameters: see `program`.
        error: by kind, what multiplies times.
    """

    ddr: Vector
    host_s: Vector
    switch_s: Vector
    parameters: Parameters
    error: Mapping[str, Vector]


@cache
def draws() -> Draws:
    """Sobol points: spread evenly, and the same every time."""
    from scipy.stats import qmc

    points = qmc.Sobol(5, rng=np.random.default_rng(7)).random(DRAWS)
    found = list(fits().values())
    upto = np.cumsum(list(weights().values()))
    which = np.minimum(np.searchsorted(upto, points[:, 0], side="right"), len(found) - 1)
    middle = next(n for n, each in enumerate(found) if each is central())
    chosen = np.concatenate([[middle], which])

    def uniform(column: int, low: float, high: float) -> Vector:
        return np.concatenate([[(low + high) / 2], low + (high - low) * points[:, column]])

    error: dict[str, Vector] = {}
    for column, kind in enumerate(KINDS, start=3):
        drawn = np.empty(DRAWS)
        for place, each in enumerate(found):
            mine, (errors, counts) = which == place, unseen_errors(each, kind)
            drawn[mine] = np.quantile(
                errors, points[mine, column], weights=counts, method="inverted_cdf"
            )
        error[kind] = np.concatenate([[1.0], drawn])
    values = np.array([list(vars(each.parameters).values()) for each in found])
    return Draws(
        ddr=np.array([each.ddr for each in found])[chosen],
        host_s=uniform(1, *HOST_S),
        switch_s=uniform(2, *SWITCH_S),
        parameters=Parameters(*values[chosen].T),
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
class Pace:
    """Seconds of a call, and between the ends of two calls while the card is kept busy."""

    latency: Interval
    period: Interval


@dataclass(frozen=True)
class Times(Pace):
    """A modelled call: its pace where all parts are resident. Seconds.

    Attributes:
        once: its pace where a turn of a pipeline switches once, or all its switches take as long.
        each: the same where it switches at each of its programs.
        rest: of the latency, what the host takes while no SoC works for the call.
        floor, period_floor: of latency and period, whatever the draw; no host work.
    """

    once: Pace
    each: Pace
    rest: Interval
    floor: float
    period_floor: float


@dataclass(frozen=True)
class CallEstimate(Times):
    """`stages` of a call: `text`, `unet_step` (one timestep), `decode`, `rest` (host)."""

    stages: Mapping[str, Interval]


def default_split(device: Device) -> str:
    """Side by side where there are several SoCs, a batch where there is one."""
    return "pipelines" if device.socs > 1 else "batch"


def part_seconds(cost: Cost, batch: int, device: Device) -> Vector:
    """One evaluation of a part on one SoC, for every draw. `cost` is that of batch 1."""
    drawn, work = draws(), Work.of(cost, batch)
    share = work.conv_share
    off = drawn.error["matmul"] ** (1 - share) * drawn.error["conv"] ** share
    took = seconds(work, Hardware.soc(device), drawn.parameters, drawn.ddr) * off
    return np.asarray(np.maximum(took, floor_seconds(cost, batch, device)))


def dealt(device: Device, batch: int, split: str) -> tuple[int, int, int]:
    """How many images a turn has, turns a call on the SoCs that take most, and SoCs a turn has."""
    if split == "batch":
        return batch, 1, 1
    socs = 2 if split == "guidance" else 1
    return 1, math.ceil(batch / (device.socs // socs)), socs


def sequence(
    device: Device, batch: int, parts: Sequence[tuple[Cost, int]], split: str | None = None
) -> Times:
    """A call that runs parts one after the other: `pipelines`, `batch`, `guidance`.

    Args:
        parts: cost at batch 1 of each, and its evaluations, on the SoC that has most to do.
        split: None for the card's default.
    """
    images, turns, socs = dealt(device, batch, split or default_split(device))
    host = draws().host_s
    device_s = sum(
        (times * part_seconds(cost, images, device) for cost, times in parts), np.zeros(())
    )
    least = sum(times * floor_seconds(cost, images, device) for cost, times in parts)
    # Turns that every SoC takes for each call, when all have work. One host serves them all.
    share = batch / (images * (device.socs // socs))

    def rest_of(turn: Vector) -> Vector:
        return np.maximum(turns * images * host, batch * host - turns * turn)

    def pace(switched: int) -> Pace:
        turn = device_s + switched * draws().switch_s
        period = np.maximum(share * (turn + images * host), batch * host)
        return Pace(Interval.of(turns * turn + rest_of(turn)), Interval.of(period))

    once, each = (pace(count) for count in switches(len(parts)))
    return Times(
        **vars(pace(0)),
        once=once,
        each=each,
        rest=Interval.of(rest_of(device_s)),
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
    floors = [times * floor_seconds(cost, batch, device) for cost, times in parts]
    host = batch * draws().host_s
    once = np.max(each[:encoders], axis=0) + np.sum(each[encoders:], axis=0) + host
    pace = Pace(Interval.of(once), Interval.of(np.max([*each, host], axis=0)))
    floor = max(floors[:encoders]) + sum(floors[encoders:])
    return Times(**vars(pace), once=pace, each=pace, rest=Interval.of(host), floor=floor,
                 period_floor=max(floors))  # fmt: skip


def estimate(device: Device, costs: Mapping[str, Cost], call: Call) -> CallEstimate:
    """The model of one call on one card. `costs`: of every part at batch 1, FP16.

    Raises:
        UnsupportedError: the card has fewer SoCs than the split needs.
    """
    encoders = [part for part in costs if part.startswith("text_encoder")]
    inputs = call.unet_inputs
    if call.split == "guidance":
        check_guidance(device, call)
        inputs = 1
    unet, decoder = doubled(costs["unet"], inputs), costs[f"{call.decoder}_decoder"]
    text = [costs[part] for part in encoders]
    evaluations = call.steps * call.unet_calls
    parts = [*((cost, 1) for cost in text), (unet, evaluations), (decoder, 1)]
    if call.split == "parts":
        times = spread(device, call.batch, parts, len(encoders))
        images, turns = call.batch, 1
    else:
        times = sequence(device, call.batch, parts, call.split)
        images, turns, _ = dealt(device, call.batch, call.split)
    encoded = [part_seconds(cost, images, device) for cost in text]
    stages = {
        "text": np.max(encoded, axis=0) if call.split == "parts" else np.sum(encoded, axis=0),
        "unet_step": call.unet_calls * part_seconds(unet, images, device),
        "decode": part_seconds(decoder, images, device),
    }
    found = {name: Interval.of(turns * seconds) for name, seconds in stages.items()}
    return CallEstimate(**vars(times), stages={**found, "rest": times.rest})


def check_guidance(device: Device, call: Call) -> None:
    """Refuse `guidance` where there is nothing to share out, or nobody to share it with."""
    if call.unet_inputs != 2:
        raise UnsupportedError(
            "split=guidance is for guidance as one batch",
            f"this call gives the UNet {call.unet_inputs} input an image, and nothing to share out",
            f"use split={default_split(device)}",
        )
    if device.socs < 2:
        raise UnsupportedError(
            f"{device.name} cannot share guidance out",
            "it has one SoC, and each of the two inputs has one of its own",
            f"use split={default_split(device)}",
        )


def doubled(cost: Cost, inputs: int) -> Cost:
    """A part that takes `inputs` inputs for every image; its weights are read once for all."""
    return replace(
        cost,
        flops=inputs * cost.flops,
        activation_bytes=inputs * cost.activation_bytes,
        conv_bytes=inputs * cost.conv_bytes,
        by_kind={kind: inputs * flops for kind, flops in cost.by_kind.items()},
        scores=inputs * cost.scores,
    )


def reach() -> str:
    """What the fits say of the card, in a sentence."""
    middle = central()
    shares = []
    for kind, name in zip(KINDS, ("matrix products", "convolutions"), strict=True):
        errors, counts = errors_of(middle, kind)
        median, most = (factor(errors, counts, share) for share in (0.5, 0.9))
        shares.append(
            f"{name} at {getattr(middle.parameters, kind):.0%} of the peak (held-out error: a"
            f" factor of {median:.2f} in the median, {most:.2f} at the 90th percentile)"
        )
    off = likeliest_without_sdxl()
    return (
        "fitted to the maker's published FP16 results on a Standard card and to MLPerf's of SDXL on"
        f" Pro and Ultra cards, {' and '.join(shares)}; without SDXL's it would be"
        f" {min(off):.2f} to {max(off):.2f} times too fast for them;"
        f" {DDR[0]:.0%} to {DDR[-1]:.0%} of the DDR's bandwidth is an assumption"
    )


def likeliest_without_sdxl() -> list[float]:
    """Measured / modelled time of SDXL's rows where none was fitted, by the likeliest share."""
    place = SHARES.index(central().share)
    return [off[place] for off in without_sdxl().values()]
