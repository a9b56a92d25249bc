"""How long a compiled program takes on the cores that it is given: the formula of the model.

    compute  = matrix products / (matmul x peak) + convolutions / (conv x peak) + what else there is
    stream   = weights / (share of the DDR's bandwidth), every weight read once an evaluation
    seconds  = max(compute, stream) + serial x min(compute, stream) + operators x overhead

`peak` is that of the program's cores. `serial` counts only where one program has the chip for
itself: of several, one computes while another waits for memory. What else there is depends on how
the published results are read, see `READINGS`. Everything on the chip (rates, and the time of an
operator) goes with the peak of the cores or with their clock; only the stream does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from core.devices import Device, devices
from export.cost import Cost

Vector = NDArray[np.float64]
Number = float | Vector
Reading = Literal["scores", "exchange"]
READINGS: tuple[Reading, ...] = get_args(Reading)
"""What SDXL at 1024 px spends most of its time on, beside its multiply-adds.

    scores     the scores of attention: each is written, exponentiated, normalised and read by the
               vector units, in blocks of queries
    exchange   the activations of a program that has the chip for itself: they are exchanged among
               its cores
"""
CORES = {"ai100-standard": 14, "ai100-pro": 16, "ai100-ultra": 16}
"""Of one SoC, by the maker's documentation."""
HOST_S = (0.002, 0.010)
"""Seconds of the host an image: tokens, noise, scheduler, uint8."""
SWITCH_S = (0.100, 0.200)
"""Seconds of a turn of a pipeline on an SoC whose programs are not all resident."""
REFERENCE = "ai100-pro"
"""The card whose SoC the time of a score, of a byte and of an operator is stated for."""


@dataclass(frozen=True)
class Parameters:
    """What is fitted: numbers, or one of each for every draw.

    Attributes:
        matmul, conv: share of the peak.
        serial_matmul, serial_conv: share of the shorter of compute and stream that does not
            overlap, for a program that has the chip for itself.
        operator_matmul_us, operator_conv_us: of an operator, on the reference card.
        score_ps: picoseconds of a score on all of the reference card.
        byte_ps: picoseconds of a byte of activations that is exchanged, on the reference card.
    """

    matmul: Number
    conv: Number
    serial_matmul: Number
    serial_conv: Number
    operator_matmul_us: Number
    operator_conv_us: Number
    score_ps: Number = 0.0
    byte_ps: Number = 0.0

    @classmethod
    def of(cls, values: Sequence[float] | Vector, reading: Reading | None) -> Self:
        """From what a fit works on: the last of seven is that of the reading."""
        last = float(values[6])
        shared = cls(*(float(value) for value in values[:6]))
        if reading is None:
            return shared
        named = {"scores": "score_ps", "exchange": "byte_ps"}[reading]
        return replace(shared, **{named: last})


@dataclass(frozen=True)
class Work:
    """One evaluation of a program, or of many: its whole batch."""

    matmul_flops: Number
    conv_flops: Number
    scores: Number
    activation_bytes: Number
    weight_bytes: Number
    matmul_operators: Number
    conv_operators: Number

    @classmethod
    def of(cls, cost: Cost, batch: int = 1) -> Self:
        """Of a part whose cost is that of batch 1."""
        return cls(
            matmul_flops=batch * (cost.by_kind["linear"] + cost.by_kind["attention"]),
            conv_flops=batch * cost.by_kind["conv"],
            scores=float(batch * cost.scores),
            activation_bytes=float(batch * cost.activation_bytes),
            weight_bytes=float(cost.weight_bytes),
            matmul_operators=float(cost.operators["linear"] + cost.operators["attention"]),
            conv_operators=float(cost.operators["conv"]),
        )

    @property
    def conv_share(self) -> Number:
        """Of the FLOPs."""
        return self.conv_flops / np.maximum(1.0, self.matmul_flops + self.conv_flops)


@dataclass(frozen=True)
class Place:
    """What a program runs on.

    Attributes:
        peak: FLOP/s of its cores.
        clock: of a core, over that of the reference card.
        bandwidth: bytes a second of the DDR at its pins; shared by `instances`.
        alone: 1 where the program has the chip for itself, else 0.
    """

    peak: Number
    clock: Number
    bandwidth: Number
    instances: Number = 1.0
    alone: Number = 1.0

    @classmethod
    def soc(cls, device: Device) -> Self:
        """One whole SoC of a card."""
        peak = device.fp16_tflops_dense * 1e12 / device.socs
        bandwidth = device.memory_gb_per_s * 1e9 / device.socs
        return cls(peak, peak / CORES[device.name] / core_peak(REFERENCE), bandwidth)


def core_peak(card: str) -> float:
    """FLOP/s of one core at its card's clock."""
    device = devices()[card]
    return device.fp16_tflops_dense * 1e12 / device.socs / CORES[card]


def seconds(work: Work, place: Place, found: Parameters, ddr: Number) -> Vector:
    """Of one evaluation; whatever are vectors are of one length.

    Args:
        ddr: share of the DDR's bandwidth.
    """
    reference = core_peak(REFERENCE) * CORES[REFERENCE]
    rest = work.scores * found.score_ps + place.alone * work.activation_bytes * found.byte_ps
    compute = (
        work.matmul_flops / found.matmul + work.conv_flops / found.conv + 1e-12 * reference * rest
    ) / place.peak
    stream = place.instances * work.weight_bytes / (ddr * place.bandwidth)
    share = work.conv_share
    serial = (1 - share) * found.serial_matmul + share * found.serial_conv
    operators = (
        work.matmul_operators * found.operator_matmul_us
        + work.conv_operators * found.operator_conv_us
    )
    overlapped = np.maximum(compute, stream) + place.alone * serial * np.minimum(compute, stream)
    return np.asarray(overlapped + 1e-6 * operators / place.clock)


def floor_seconds(cost: Cost, batch: int, device: Device) -> float:
    """At the peak of one SoC, or for the weights at full bandwidth if that is longer."""
    place = Place.soc(device)
    return float(max(batch * cost.flops / place.peak, cost.weight_bytes / place.bandwidth))
