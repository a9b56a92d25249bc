"""How long a compiled program takes on the cores that it is given: the formula of the model.

    compute  = matrix products / (matmul x peak) + convolutions / (conv x peak) + what else there is
    stream   = weights / (share of the DDR's bandwidth), every weight read once an evaluation
    seconds  = max(compute, stream) + serial x min(compute, stream) + operators x overhead

`peak` is that of the program's cores. `serial` counts only where one program has the chip for
itself: of several, one computes while another waits for memory. What else there is:

    scores     of attention: each is written, exponentiated, normalised and read by the vector
               units, in blocks of queries
    exchange   the activations of a program that has the chip for itself, which its cores hand each
               other: what matrix products and attention move at one rate, what convolutions move
               at another

Everything on the chip (rates, and the time of an operator) goes with the peak of the cores or with
their clock; only the stream does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from core.devices import Device, devices
from export.cost import Cost, budget_cost

Vector = NDArray[np.float64]
Number = float | Vector
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""What of SDXL's time at 1024 px beside its multiply-adds may be the scores of attention; the rest
is the exchange of what matrix products and attention move."""
CORES = {"ai100-standard": 14, "ai100-pro": 16, "ai100-ultra": 16}
"""The cores of one SoC, by the maker's documentation."""
HOST_S = (0.002, 0.010)
"""Seconds of the host an image: tokens, noise, scheduler, uint8."""
SWITCH_S = (0.100, 0.200)
"""Seconds of a switch between two programs of an SoC that are not both resident. Its source says so
of a switch and does not count them: see `switches`."""
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
        byte_ps: picoseconds of a byte that matrix products and attention exchange, there.
        conv_byte_ps: picoseconds of a byte that convolutions exchange, there.
    """

    matmul: Number
    conv: Number
    serial_matmul: Number
    serial_conv: Number
    operator_matmul_us: Number
    operator_conv_us: Number
    score_ps: Number
    byte_ps: Number
    conv_byte_ps: Number

    @classmethod
    def of(cls, values: Sequence[Number] | Vector, share: float) -> Self:
        """Return the parameters that a fit's values stand for; values may be vectors.

        Args:
            values: the first six; milliseconds of the reference card for scores and exchange of
                one evaluation of SDXL's UNet at 1024 px; the last.
            share: of these milliseconds, what the scores take.
        """
        *_, beside_ms, conv_byte_ps = values
        scores, moved = reference_unet()
        score_ps, byte_ps = 1e9 * share / scores, 1e9 * (1 - share) / moved
        return cls(*(*values[:6], score_ps * beside_ms, byte_ps * beside_ms, conv_byte_ps))


@cache
def reference_unet() -> tuple[float, float]:
    """Scores, and bytes beside those of convolutions, of SDXL's UNet at 1024 px."""
    cost = budget_cost("unet", 1024)
    assert cost is not None  # a line of export/budget.csv
    return float(cost.scores), float(cost.activation_bytes - cost.conv_bytes)


@dataclass(frozen=True)
class Work:
    """One evaluation of a program, or of many: its whole batch.

    Attributes:
        moved_bytes: activations that matrix products and attention read and write.
        conv_bytes: activations that convolutions read and write.
    """

    matmul_flops: Number
    conv_flops: Number
    scores: Number
    moved_bytes: Number
    conv_bytes: Number
    weight_bytes: Number
    matmul_operators: Number
    conv_operators: Number

    @classmethod
    def of(cls, cost: Cost, batch: int = 1) -> Self:
        """Return the work of a part whose cost at batch 1 is `cost`."""
        return cls(
            matmul_flops=batch * (cost.by_kind["linear"] + cost.by_kind["attention"]),
            conv_flops=batch * cost.by_kind["conv"],
            scores=float(batch * cost.scores),
            moved_bytes=float(batch * (cost.activation_bytes - cost.conv_bytes)),
            conv_bytes=float(batch * cost.conv_bytes),
            weight_bytes=float(cost.weight_bytes),
            matmul_operators=float(cost.operators["linear"] + cost.operators["attention"]),
            conv_operators=float(cost.operators["conv"]),
        )

    @property
    def conv_share(self) -> Number:
        """The share of convolutions in the FLOPs."""
        return self.conv_flops / np.maximum(1.0, self.matmul_flops + self.conv_flops)


@dataclass(frozen=True)
class Hardware:
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


def seconds(work: Work, place: Hardware, found: Parameters, ddr: Number) -> Vector:
    """Return the seconds of one evaluation; whatever are vectors are of one length.

    Args:
        ddr: share of the DDR's bandwidth.
    """
    reference = core_peak(REFERENCE) * CORES[REFERENCE]
    exchange = work.moved_bytes * found.byte_ps + work.conv_bytes * found.conv_byte_ps
    rest = work.scores * found.score_ps + place.alone * exchange
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
    """Return the time at one SoC's peak, or for the weights at full bandwidth if that is longer."""
    place = Hardware.soc(device)
    return float(max(batch * cost.flops / place.peak, cost.weight_bytes / place.bandwidth))


def switches(programs: int) -> tuple[int, int]:
    """How often a turn through so many programs switches, at least and at most.

    The source of `SWITCH_S` calls it a switch between component binaries: a turn of a pipeline
    whose programs take turns has as many as programs. Or it is what all of them come to.
    """
    return 1, programs
