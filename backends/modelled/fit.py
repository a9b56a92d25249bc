"""What programs reach on a Cloud AI 100, fitted to what was published of three of its cards.

The formula is in `program`. It is fitted by robust least squares on the logarithm of the time to

- Qualcomm's own FP16 results on a Standard card: transformers and dense convolutional networks;
- six MLPerf results of SDXL base at 1024 px on Pro and Ultra cards, which are all that there is of
  this architecture: whole pipelines, with guidance either as a batch of two on one device or as one
  prompt each on two (`SPLIT_OF_GUIDANCE`). They count like any other two families.

What SDXL's 0.3 s an evaluation on a Pro are, the counted work of its graph narrows down:

- It is on the chip. An Ultra's SoC takes 1.65 to 1.71 times a Pro, their peaks differ by 1.72 and
  their DDR not at all. What is left for the DDR is not more than the weights: neither scores nor
  activations leave the chip in numbers.
- It is not the operators. 934 of them, and 1200 more where attention is cut into blocks, at the
  microseconds that the small networks show for one, are 6% of it at most.
- It is not the multiply-adds, which run at half of the peak or more where rows have enough tokens.
- What is left are the scores of attention, of which SDXL at 1024 px has four times as many for a
  FLOP as BERT, and the exchange of activations. One size of one network cannot tell them apart: the
  share of the scores is assumed, in `SHARES`, and all is fitted anew for each. Those fits are worth
  what they say of networks that they had not seen (`weights`): a mixture of both is likelier than
  either alone, by which also the Standard card's transformers are explained better. At 512 px there
  are 14 times fewer scores and 4 times fewer activations, so that what is said of 512 px is
  extrapolated. A measured UNet step at 512 px would settle it.

Convolutions exchange activations too: with it the Standard card's convolutional networks that have
a chip for themselves are predicted within a factor of 1.3 where they are held out, without it
within 1.5, and an operator of theirs takes 5 to 7 microseconds in place of 13. They ask for 10 to
20 ps a byte whatever the share of the scores is, on which what matrix products ask for depends: so
theirs is a parameter of its own.

What the DDR delivers cannot be told from these rows: it is assumed, and all is fitted anew for each
assumption. Rows whose weights cannot stay on the chip are a check of it, see `CardRow.streamed`.

No rate passes `fastest_share`: what the fastest published program of these cards reaches. What
rests on a bound says little of the card: `Fit.at_bounds` has the names.

Rows count by family (BERT-base in 33 names is one family), and throughput and latency rows of a
family count the same. Errors are of whole families held out, each of SDXL's cards a family: a fit
that never saw a BERT-large says how long a BERT-large takes, and one that never saw an Ultra how
long SDXL takes on it. Not used are

- the latency column, whose unit is not documented for vision rows: times come from throughput;
- rows that the host link bounds: scores for a whole vocabulary, and more than 5 GB/s of images;
- transformers narrower than a Stable Diffusion UNet (hidden size below 640), which reach less;
- grouped and depthwise convolutions, which Stable Diffusion does not have;
- `achieved_tflops` of vision transformers, which leaves out the projections of their attention:
  their FLOPs are counted from the architecture.

Where the model is weak: nothing was published of a UNet at any other size, or of its parts. ALBERT,
whose layers share their weights, is as slow as if they did not, and is counted as reading them in
every layer. What the chips may draw is left out: a Standard card has 75 W, a public record of an
Ultra shows a limit of 31 W an SoC.
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
from scipy import stats
from scipy.optimize import least_squares

from backends.modelled.program import (
    HOST_S,
    SHARES,
    SWITCH_S,
    Hardware,
    Parameters,
    Vector,
    Work,
    core_peak,
    seconds,
    switches,
)
from core.devices import devices
from export.cost import budget_cost

DATA = Path(__file__).with_name("data")
MEASURED, ARCHITECTURES = DATA / "ai100_standard_measured.csv", DATA / "architectures.csv"
SDXL = DATA / "sdxl_measured.csv"
CARD = "ai100-standard"
Kind = Literal["matmul", "conv"]
KINDS: tuple[Kind, ...] = ("matmul", "conv")
DDR = (0.60, 0.75, 0.90)
"""Assumed shares of the DDR's bandwidth that a program gets: favourable last."""
WIDE = 640
"""Hidden size of the narrowest transformer block of SDXL's UNet."""
LINK_GB_PER_S = 5.0
"""The link's rate of FP16 input, at which the smallest networks all give out the same images/s."""
SDXL_SIZE, SDXL_STEPS = 1024, 20
SPLIT_OF_GUIDANCE = "guidance"


@dataclass(frozen=True)
class CardRow:
    """One published row of the Standard card: `seconds` for one inference of each instance.

    Attributes:
        cores: of one instance.
        flops, scores, activation_bytes: of one inference of one instance, its whole batch.
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
    scores: float
    activation_bytes: float
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

    @property
    def work(self) -> Work:
        conv = self.kind == "conv"
        return Work(
            matmul_flops=0.0 if conv else self.flops,
            conv_flops=self.flops if conv else 0.0,
            scores=self.scores,
            moved_bytes=0.0 if conv else self.activation_bytes,
            conv_bytes=self.activation_bytes if conv else 0.0,
            weight_bytes=self.weight_bytes,
            matmul_operators=0.0 if conv else float(self.operators),
            conv_operators=float(self.operators) if conv else 0.0,
        )

    @property
    def place(self) -> Hardware:
        chip, peak = Hardware.soc(devices()[CARD]), core_peak(CARD) * self.cores
        alone = float(self.instances == 1)
        return Hardware(peak, chip.clock, chip.bandwidth, float(self.instances), alone)


@dataclass(frozen=True)
class Diffusion:
    """One published row of SDXL: `seconds` an image, of the devices that `split` gives it."""

    id: str
    card: str
    scenario: str
    split: str
    seconds: float
    source: str

    @property
    def parts(self) -> list[tuple[Work, int]]:
        """The work of one device for one image, and how many times it is done."""
        prompts = 1 if self.split == SPLIT_OF_GUIDANCE else 2
        calls = {"text_encoder": (1, 1), "text_encoder_2": (1, 1), "vae_decoder": (1, 1)}
        calls["unet"] = (prompts, SDXL_STEPS)
        parts = []
        for name, (batch, times) in calls.items():
            cost = budget_cost(name, SDXL_SIZE)
            assert cost is not None, name  # a line of export/budget.csv
            parts.append((Work.of(cost, batch), times))
        return parts


@dataclass(frozen=True)
class Fit:
    """All rows under one share of the scores and one assumption about the DDR.

    Attributes:
        errors: measured / modelled time of the rows, as they were fitted.
        held_out: the same with the row's family left out of the fit.
        modelled: seconds, with the row's family left out.
        at_bounds: names of the parameters that rest on a bound.
    """

    share: float
    ddr: float
    parameters: Parameters
    errors: Vector
    held_out: Vector
    modelled: Vector
    at_bounds: tuple[str, ...]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def samples(measured: Path = MEASURED, architectures: Path = ARCHITECTURES) -> list[CardRow]:
    """Every row of a known architecture that the host link does not bound, narrow ones included."""
    known = {row["model"]: row for row in table(architectures)}
    rows = []
    for row in table(measured):
        about = known.get(row["model"])
        if about is None or row["task"] == "fill-mask":
            continue
        batch, instances = int(row["batch"]), int(row["instances"])
        rate, side = float(row["samples_per_s"]), int(row["sequence_or_image"])
        vision = bool(row["achieved_tflops"])
        if vision and rate * 3 * side * side * 2 > LINK_GB_PER_S * 1e9:
            continue
        if about["layers"]:
            layers, hidden, inner = (int(about[n]) for n in ("layers", "hidden", "intermediate"))
            patch = int(row["model"].rsplit("_", 1)[1]) if vision else 0
            tokens = (side // patch) ** 2 + 1 if vision else side
            flops, weights = encoder(layers, hidden, inner, tokens)
            scores, moved = traffic(layers, hidden, inner, tokens)
        else:
            flops = float(row["achieved_tflops"]) * 1e12 / rate
            weights, scores = float(about["params_m"]) * 2e6, 0.0
            moved = float(about["activation_mb"]) * 1e6
        rows.append(
            CardRow(
                model=row["model"],
                family=about["family"],
                kind="conv" if about["kind"] == "conv" else "matmul",
                objective=row["objective"],
                cores=int(row["cores"]),
                instances=instances,
                seconds=batch * instances / rate,
                flops=batch * flops,
                scores=batch * scores,
                activation_bytes=batch * moved,
                weight_bytes=weights,
                operators=int(about["operators"]),
                hidden=int(about["hidden"]) if about["hidden"] else None,
            )
        )
    return rows


def diffusion_rows(path: Path = SDXL) -> list[Diffusion]:
    """What was published of SDXL."""
    return [
        Diffusion(
            id=row["id"],
            card=row["card"],
            scenario=row["scenario"],
            split=row["split"],
            seconds=int(row["devices"]) / float(row["value"])
            if row["unit"] == "samples/s"
            else float(row["value"]),
            source=row["source"],
        )
        for row in table(path)
    ]


def encoder(layers: int, hidden: int, intermediate: int, tokens: int) -> tuple[float, float]:
    """FLOPs of one sample, and bytes of FP16 weights, of a transformer encoder."""
    matrices = layers * (4 * hidden**2 + 2 * hidden * intermediate)
    attention = layers * 4 * tokens**2 * hidden
    return 2.0 * tokens * matrices + attention, 2.0 * matrices


def traffic(layers: int, hidden: int, intermediate: int, tokens: int) -> tuple[float, float]:
    """Scores of one sample, heads of 64, and bytes of FP16 activations, as `export.cost` counts."""
    scores = layers * (hidden // 64) * tokens**2
    projections, attention, inner = 8 * hidden, 4 * hidden, 2 * (hidden + intermediate)
    return float(scores), 2.0 * layers * tokens * (projections + attention + inner)


class Rows:
    """Everything that is fitted, as arrays: what a fit evaluates some hundred times.

    Attributes:
        names, families, kinds: of the rows; SDXL's last, a family for each card, of kind `matmul`.
        seconds: as published.
        weights: of the rows where errors are counted; they add up to 1.
    """

    def __init__(self, fitted: Sequence[CardRow], sdxl: Sequence[Diffusion]) -> None:
        self.names = [each.model for each in fitted] + [each.id for each in sdxl]
        self.families = [each.family for each in fitted] + [f"SDXL on {x.card}" for x in sdxl]
        self.kinds: list[Kind] = [each.kind for each in fitted]
        self.kinds += ["matmul"] * len(sdxl)
        self.seconds = np.array([s.seconds for s in fitted] + [x.seconds for x in sdxl])
        self.is_sdxl = np.array([False] * len(fitted) + [True] * len(sdxl))
        objectives = [each.objective for each in fitted] + [each.split for each in sdxl]
        cells = list(zip(self.families, objectives, strict=True))
        weights = np.array([1 / cells.count(cell) for cell in cells])
        self.weights = weights / weights.sum()

        works, places = [each.work for each in fitted], [each.place for each in fitted]
        times = np.zeros((len(self.names), len(fitted) + 4 * len(sdxl)))
        times[: len(fitted), : len(fitted)] = np.eye(len(fitted))
        for place, each in enumerate(sdxl, start=len(fitted)):
            for work, count in each.parts:
                times[place, len(works)] = count
                works.append(work)
                places.append(Hardware.soc(devices()[each.card]))
        self.work = Work(*np.array([list(vars(work).values()) for work in works]).T)
        self.place = Hardware(*np.array([list(vars(place).values()) for place in places]).T)
        self.times = times
        # Host, and the middle of what a turn through SDXL's four programs may switch.
        beside = sum(HOST_S) / 2 + sum(switches(4)) / 2 * sum(SWITCH_S) / 2
        self.beside = np.where(self.is_sdxl, beside, 0.0)
        most = fastest_share(fitted)
        self.low = np.array([0.05, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        self.high = np.array([most, most, 1.0, 1.0, 1e3, 1e3, 1e3, 1e3])

    def predict(self, parameters: Parameters, ddr: float) -> Vector:
        """Seconds of every row."""
        return np.asarray(
            seconds(self.work, self.place, parameters, ddr) @ self.times.T + self.beside
        )

    def solve(
        self,
        keep: NDArray[np.bool_],
        ddr: float,
        share: float,
        start: Sequence[float] | Vector | None = None,
    ) -> Vector:
        """The parameters' values, see `Parameters.of`; by soft-L1 loss on the logarithm of time.

        Args:
            keep: which rows are fitted.
            share: of the scores, see `SHARES`.
        """
        weights = np.sqrt(self.weights)[keep]

        def residuals(values: Vector) -> Vector:
            off = np.log(self.predict(Parameters.of(values, share), ddr) / self.seconds)
            return np.asarray(weights * off[..., keep])

        def slopes(values: Vector) -> Vector:
            """All columns of the Jacobian at once, by differences into the bounds."""
            step = np.where(values + 1e-6 * SCALE > self.high, -1e-6, 1e-6) * SCALE
            moved = (values[:, None] + np.diag(step))[:, :, None]
            return np.asarray(((residuals(moved) - residuals(values)) / step[:, None]).T)

        def result(start: Sequence[float] | Vector) -> Vector:
            fitted = least_squares(
                residuals,
                jac=slopes,
                x0=np.clip(start, self.low, self.high),
                bounds=(self.low, self.high),
                x_scale=SCALE,
                loss="soft_l1",
                ftol=1e-5,
                f_scale=0.1 / np.sqrt(len(self.names)),
            )
            return np.append(fitted.x, [fitted.cost])

        # Several starts: `serial` can rest at a bound, and another minimum is lower then.
        starts = [*([] if start is None else [start]), START, [*START[:2], 0.7, 0.7, *START[4:]]]
        best = min((result(each) for each in starts), key=lambda each: float(each[-1]))
        return np.asarray(best[:-1])

    def at_bounds(self, values: Vector) -> tuple[str, ...]:
        """Names of the values that rest on a bound, as a person is told."""
        near = 1e-3 * SCALE
        return tuple(
            f"{name} {'0' if bottom else f'{high:.0%} of the peak' if n < 2 else f'{high:g}'}"
            for n, (name, value, low, high) in enumerate(
                zip(NAMES, values, self.low, self.high, strict=True)
            )
            if (bottom := value - low < near[n]) or high - value < near[n]
        )


NAMES = ("matmul", "conv", "serial_matmul", "serial_conv", "operator_matmul_us",
         "operator_conv_us", "scores and exchange", "conv_byte_ps")  # fmt: skip
START = [0.5, 0.65, 0.1, 0.1, 3.0, 10.0, 100.0, 5.0]
SCALE = np.array([0.1, 0.1, 0.3, 0.3, 10.0, 10.0, 30.0, 10.0])


def fastest_share(fitted: Sequence[CardRow]) -> float:
    """The most of a card's peak that any published program reached: no rate is above it.

    It is a network of dense convolutions, and products run on the same units.
    """
    peak = core_peak(CARD)
    return max(s.flops / s.seconds / (peak * s.cores) for s in fitted)


@cache
def rows() -> Rows:
    """What the model is fitted to."""
    fitted = [s for s in samples() if s.hidden is None or s.hidden >= WIDE]
    return Rows(fitted, diffusion_rows())


@cache
def fits() -> Mapping[tuple[float, float], Fit]:
    """The fits under every share and assumption about the DDR, each family held out in turn."""
    published = rows()
    everything = np.ones(len(published.names), bool)
    found = {}
    for share in SHARES:
        for ddr in DDR:
            values = published.solve(everything, ddr, share)
            modelled = np.empty(len(published.names))
            for family in dict.fromkeys(published.families):
                mine = np.array([each == family for each in published.families])
                others = published.solve(~mine, ddr, share, start=values)
                modelled[mine] = published.predict(Parameters.of(others, share), ddr)[mine]
            parameters = Parameters.of(values, share)
            found[share, ddr] = Fit(
                share,
                ddr,
                parameters,
                errors=published.seconds / published.predict(parameters, ddr),
                held_out=published.seconds / modelled,
                modelled=modelled,
                at_bounds=published.at_bounds(values),
            )
    return found


def weights(without: str = "") -> dict[tuple[float, float], float]:
    """How much each fit counts: the DDR's assumptions alike, shares by their likelihood.

    That is of the held-out errors of transformers and SDXL, for which logarithms have a Laplace
    distribution of the fit's own width; each family is one observation, however many rows it has.

    Args:
        without: a family whose errors do not count.
    """
    families = families_of("matmul") - {without}

    def likelihood(fit: Fit) -> float:
        errors, counts = errors_of(fit, "matmul", without)
        width = float(np.average(np.abs(np.log(errors)), weights=counts))
        return width ** -len(families)

    found: dict[tuple[float, float], float] = {}
    for ddr in DDR:
        each = {share: likelihood(fits()[share, ddr]) for share in SHARES}
        found |= {(share, ddr): one / sum(each.values()) / len(DDR) for share, one in each.items()}
    return {place: found[place] for place in fits()}


def central() -> Fit:
    """The likeliest fit under the middle assumption about the DDR: the middle of an interval."""
    middle, counts = DDR[len(DDR) // 2], weights()
    return max((fits()[share, middle] for share in SHARES), key=lambda f: counts[f.share, f.ddr])


def families_of(kind: Kind) -> set[str]:
    """The families that have rows of a kind."""
    published = rows()
    return {f for f, own in zip(published.families, published.kinds, strict=True) if own == kind}


def of_kind(kind: Kind) -> NDArray[np.bool_]:
    """Which rows are of a kind."""
    return np.array([each == kind for each in rows().kinds])


def errors_of(fit: Fit, kind: Kind, without: str = "") -> tuple[Vector, Vector]:
    """Held-out errors of the rows of a kind, and their weights; `without` one family."""
    published = rows()
    mine = of_kind(kind) & np.array([family != without for family in published.families])
    return fit.held_out[mine], published.weights[mine]


def unseen_errors(fit: Fit, kind: Kind, without: str = "") -> tuple[Vector, Vector]:
    """`errors_of`, wider by what so few families leave open of one that comes: those are drawn."""
    errors, counts = errors_of(fit, kind, without)
    n = len(families_of(kind) - {without})
    wider = stats.t.ppf(0.9, n - 1) / stats.norm.ppf(0.9) * np.sqrt(1 + 1 / n)
    return errors**wider, counts


@dataclass(frozen=True)
class Covered:
    """A published row, and between what a model that never saw its family puts it. Seconds."""

    name: str
    family: str
    measured: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high


def coverage(interval: tuple[float, float]) -> list[Covered]:
    """Every row with its interval: fits, weights, and errors, all without its family."""
    published, found = rows(), []
    groups = dict.fromkeys(zip(published.kinds, published.families, strict=True))
    spread = {
        (kind, family): [
            (each, each_weight, *unseen_errors(each, kind, family))
            for each, each_weight in zip(fits().values(), weights(family).values(), strict=True)
        ]
        for kind, family in groups
    }
    for place, name in enumerate(published.names):
        kind, family = published.kinds[place], published.families[place]
        drawn = [
            (each.modelled[place] * errors, each_weight * counts / counts.sum())
            for each, each_weight, errors, counts in spread[kind, family]
        ]
        values, counted = (np.concatenate(column) for column in zip(*drawn, strict=True))
        low, high = (quantile(values, counted, share) for share in interval)
        found.append(Covered(name, family, float(published.seconds[place]), low, high))
    return found


def without_sdxl() -> dict[str, list[float]]:
    """Measured / modelled time of SDXL's rows where no row of SDXL was fitted, for each share."""
    published, ddr = rows(), DDR[len(DDR) // 2]
    found: dict[str, list[float]] = {}
    for share in SHARES:
        parameters = Parameters.of(published.solve(~published.is_sdxl, ddr, share), share)
        off = published.seconds / published.predict(parameters, ddr)
        for n in np.flatnonzero(published.is_sdxl):
            found.setdefault(published.names[n], []).append(float(off[n]))
    return found


def quantile(values: Vector, weights: Vector, share: float) -> float:
    """The least of `values` with at least `share` of the weight at or below it."""
    return float(np.quantile(values, share, weights=weights, method="inverted_cdf"))


def factor(errors: Vector, weights: Vector, share: float) -> float:
    """Return the largest factor that the model is off by in `share` of the weight; 1: no error."""
    return float(np.exp(quantile(np.abs(np.log(errors)), weights, share)))
