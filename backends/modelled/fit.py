"""How much of a Cloud AI 100's peak programs reach, fitted to Qualcomm's Standard-card results.

The time of one inference of one program on some of the card's cores is modelled as

    max(compute, stream) + serial x min(compute, stream) + operators x overhead

with compute = FLOPs / (efficiency x peak of its cores) and stream = weights / (share of the DDR's
bandwidth), every weight read once an inference. `serial` counts only where one program has the card
for itself: of several, one computes while another waits for memory. Matrix products (transformers)
and convolutions (dense convolutional networks) are fitted apart, each with its own `efficiency`,
`serial` and `overhead`, by robust least squares on the logarithm of the time.

What the DDR delivers cannot be told from these rows: no program streams gigabytes. It is assumed,
and everything else is fitted anew for each assumption. Rows whose weights cannot stay on the chip
are a check of it, see `streamed`.

Rows count by family (BERT-base in 33 names is one family), and throughput and latency rows of a
family count the same. Errors are of whole families held out: a fit that never saw a BERT-large says
how long a BERT-large takes. Not used are

- the latency column, whose unit is not documented for vision rows: times come from throughput;
- rows that the host link bounds: scores for a whole vocabulary, and more than 5 GB/s of images;
- transformers narrower than a Stable Diffusion UNet (hidden size below 640), which reach less;
- grouped and depthwise convolutions, which Stable Diffusion does not have.

Where the model is weak: a row that computes much with few tokens a core does not exist. At batch 1
FLOPs and weights grow together from row to row, so a program that waits for its weights looks like
one that computes at a tenth of its cores' peak; the model takes the first reading, which hides the
efficiency that a UNet at 16 x 16 tokens would have there (`unhidden` is the second). ALBERT, whose
layers share their weights, is as slow as if they did not, and is counted as reading them in every
layer: an assumption of the first reading. The rows nearest to a UNet, `albert-xlarge` of several
sequences and the vision transformers, are 1.5 to 1.8 times slower than the model says. No row holds
activations as large as those of a VAE decoder at full size. The figures are of the Standard card;
that an Ultra's SoC reaches the same share of its own, lower peak is an assumption.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.devices import devices

DATA = Path(__file__).with_name("data")
MEASURED, ARCHITECTURES = DATA / "ai100_standard_measured.csv", DATA / "architectures.csv"
CARD, CORES = "ai100-standard", 14
Kind = Literal["matmul", "conv"]
KINDS: tuple[Kind, ...] = ("matmul", "conv")
DDR = (0.60, 0.75, 0.90)
"""Assumed shares of the DDR's bandwidth that a program gets: favourable last."""
WIDE = 640
"""Hidden size of the narrowest transformer block of SDXL's UNet."""
LINK_GB_PER_S = 5.0
"""Of FP16 input: above it the smallest networks all give out the same images/s."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One published row: `seconds` for one inference of each of its `instances`.

    Attributes:
        cores: of one instance.
        flops: of one inference of one instance, its whole batch.
        weight_bytes: FP16, read once an inference by every instance.
    """

    model: str
    family: str
    kind: Kind
    objective: str
    cores: int
    instances: int
    seconds: float
    flops: float
    weight_bytes: float
    operators: int
    hidden: int | None

    @property
    def streamed(self) -> float:
        """Share of the DDR's bandwidth, if every instance reads its weights once an inference."""
        rate = self.instances * self.weight_bytes / self.seconds
        return rate / (devices()[CARD].memory_gb_per_s * 1e9)

    @property
    def on_chip(self) -> bool:
        """Whether the weights may fit into the cores' memory (9 MB each)."""
        return self.weight_bytes <= self.cores * 9e6


@dataclass(frozen=True)
class Fit:
    """One kind of work under one assumption about the DDR.

    Attributes:
        efficiency: share of the peak.
        serial: share of the shorter of compute and stream that does not overlap, for one program.
        overhead_s: seconds an operator.
        errors: measured / modelled time of the rows, as they were fitted.
        held_out: the same with the row's family left out of the fit.
        weights: of the rows; they add up to 1.
    """

    kind: Kind
    ddr: float
    efficiency: float
    serial: float
    overhead_s: float
    errors: Vector
    held_out: Vector
    weights: Vector

    @property
    def parameters(self) -> tuple[float, float, float]:
        return self.efficiency, self.serial, self.overhead_s


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def samples(measured: Path = MEASURED, architectures: Path = ARCHITECTURES) -> list[Sample]:
    """Every row of a known architecture that the host link does not bound, narrow ones included."""
    known = {row["model"]: row for row in table(architectures)}
    found = []
    for row in table(measured):
        about = known.get(row["model"])
        if about is None or row["task"] == "fill-mask":
            continue
        batch, instances = int(row["batch"]), int(row["instances"])
        rate, side = float(row["samples_per_s"]), int(row["sequence_or_image"])
        if row["achieved_tflops"]:
            if rate * 3 * side * side * 2 > LINK_GB_PER_S * 1e9:
                continue
            flops = float(row["achieved_tflops"]) * 1e12 / rate
            weights = float(about["params_m"]) * 2e6
        else:
            layers, hidden, inner = (int(about[n]) for n in ("layers", "hidden", "intermediate"))
            flops, weights = encoder(layers, hidden, inner, side)
        found.append(
            Sample(
                model=row["model"],
                family=about["family"],
                kind="conv" if about["kind"] == "conv" else "matmul",
                objective=row["objective"],
                cores=int(row["cores"]),
                instances=instances,
                seconds=batch * instances / rate,
                flops=batch * flops,
                weight_bytes=weights,
                operators=int(about["operators"]),
                hidden=int(about["hidden"]) if about["hidden"] else None,
            )
        )
    return found


def encoder(layers: int, hidden: int, intermediate: int, tokens: int) -> tuple[float, float]:
    """FLOPs of one sample, and bytes of FP16 weights, of a transformer encoder."""
    matrices = layers * (4 * hidden**2 + 2 * hidden * intermediate)
    attention = layers * 4 * tokens**2 * hidden
    return 2.0 * tokens * matrices + attention, 2.0 * matrices


def fitted_samples(kind: Kind, found: Sequence[Sample] | None = None) -> list[Sample]:
    """What the fit of `kind` is made of."""
    every = samples() if found is None else found
    return [s for s in every if s.kind == kind and (s.hidden is None or s.hidden >= WIDE)]


def unhidden(kind: Kind = "matmul") -> float:
    """The share of their cores' peak that rows of one inference at a time reach, in the median.

    What `efficiency` would be for them if none of them waited for weights.
    """
    of = [s for s in fitted_samples(kind) if s.objective == "best-latency"]
    bounds = Bounds(of, DDR[-1])
    return quantile(bounds.at_peak / bounds.seconds, row_weights(of), 0.5)


class Bounds:
    """Samples as arrays: what a fit evaluates some hundred times."""

    def __init__(self, of: Sequence[Sample], ddr: float) -> None:
        card = devices()[CARD]
        peak = card.fp16_tflops_dense * 1e12 / CORES
        self.at_peak = np.array([s.flops / (peak * s.cores) for s in of])
        self.stream = np.array(
            [s.instances * s.weight_bytes / (ddr * card.memory_gb_per_s * 1e9) for s in of]
        )
        self.alone = np.array([s.instances == 1 for s in of], float)
        self.operators = np.array([s.operators for s in of], float)
        self.seconds = np.array([s.seconds for s in of])

    def predict(self, parameters: Sequence[float] | Vector) -> Vector:
        """Seconds of every sample."""
        efficiency, serial, overhead_s = parameters
        compute = self.at_peak / efficiency
        overlapped = np.maximum(compute, self.stream)
        rest = serial * self.alone * np.minimum(compute, self.stream)
        return np.asarray(overlapped + rest + self.operators * overhead_s)


def row_weights(of: Sequence[Sample]) -> Vector:
    """Every family counts the same, and within it throughput as much as latency."""
    cells = [(s.family, s.objective) for s in of]
    weights = np.array([1 / cells.count(cell) for cell in cells])
    return weights / weights.sum()


def solve(of: Sequence[Sample], ddr: float) -> Vector:
    """efficiency, serial, seconds an operator; by soft-L1 loss on the logarithm of the time."""
    from scipy.optimize import least_squares

    bounds, weights = Bounds(of, ddr), np.sqrt(row_weights(of))

    def residuals(parameters: Vector) -> Vector:
        return weights * np.log(bounds.predict(parameters) / bounds.seconds)

    # Two starts: `serial` can rest at a bound.
    tries = [
        least_squares(
            residuals,
            x0=[0.5, serial, 3e-6],
            bounds=([0.05, 0.0, 0.0], [1.0, 1.0, 1e-3]),
            x_scale=[0.1, 0.3, 1e-5],
            loss="soft_l1",
            f_scale=0.1 / np.sqrt(len(of)),
        )
        for serial in (0.1, 0.7)
    ]
    return np.asarray(min(tries, key=lambda result: result.cost).x)


def fit(of: Sequence[Sample], kind: Kind, ddr: float) -> Fit:
    """The fit of `of`, with the errors of every family held out in turn."""
    bounds = Bounds(of, ddr)
    found = solve(of, ddr)
    held_out = np.empty(len(of))
    for family in {s.family for s in of}:
        mine = np.array([s.family == family for s in of])
        others = [s for s in of if s.family != family]
        held_out[mine] = (bounds.seconds / bounds.predict(solve(others, ddr)))[mine]
    efficiency, serial, overhead_s = map(float, found)
    errors = bounds.seconds / bounds.predict(found)
    return Fit(kind, ddr, efficiency, serial, overhead_s, errors, held_out, row_weights(of))


@cache
def fits() -> Mapping[tuple[Kind, float], Fit]:
    """The fits of both kinds under every assumption about the DDR."""
    found = samples()
    return {
        (kind, ddr): fit(fitted_samples(kind, found), kind, ddr) for kind in KINDS for ddr in DDR
    }


def quantile(values: Vector, weights: Vector, share: float) -> float:
    """The least of `values` with at least `share` of the weight at or below it."""
    return float(np.quantile(values, share, weights=weights, method="inverted_cdf"))


def factor(errors: Vector, weights: Vector, share: float) -> float:
    """By which factor the model is off, at most, in `share` of the weight; 1 is no error."""
    return float(np.exp(quantile(np.abs(np.log(errors)), weights, share)))
