"""Contenders: the cells of runs with an interval for each quantity, and the advantage of one over
another.

Times scatter from process to process, so rounds are what counts: with five or more of them the
interval is that of `bench.verdict.rules`; with fewer it is the noise model's, see REACH. Cells of
one run are held against each other round by round, as what a round shares cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from backends.check.gate import QUANTISED
from bench.rows.cell import Cell
from bench.rows.fields import EMULATED, MODELLED, OK
from bench.rows.header import Header
from bench.rows.store import Row, Run
from bench.rows.summary import UNKNOWN, CellRounds, by_cell
from bench.verdict.choosing.wants import QUANTITIES, Wants
from bench.verdict.rules import (
    CONFIDENCE,
    PAIR_ROUNDS,
    RUN_SLOWDOWN,
    Array,
    one_sample,
    two_sample,
)

REACH = {1: 0.31, 2: 0.22, 3: 0.14, 4: 0.10}
"""How far the logarithm of a ratio of two equal cells may be off, by rounds: 98 of 100 times less
under the noise model's typical levels. From PAIR_ROUNDS on the rounds themselves say it."""
MEMORY_SPREAD = 0.02
"""What the peak memory of two processes that do the same may differ by."""
Moment = tuple[str, int]
"""A run and a round of it: what cells share that were measured close to each other."""


@dataclass(frozen=True)
class Span:
    """A figure and the interval that it lies in, nineteen of twenty times on each side."""

    mid: float
    low: float
    high: float

    def worst(self, less: bool) -> float:
        """The end that is worse where `less` is better."""
        return self.high if less else self.low

    def best(self, less: bool) -> float:
        """The end that is better where `less` is better."""
        return self.low if less else self.high


@dataclass(frozen=True)
class Contender:
    """A cell on a machine, with what its rows say.

    Attributes:
        machine: its hash; `place` is what people call it.
        values: the figures of each timed quantity by run and round.
        spans: every quantity that is known, with its interval.
        fault: why it cannot be taken; "" where nothing speaks against it.
        calm: whether some round of it was undisturbed.
        header: that of its run, for its bundle and machine.
    """

    cell: Cell
    machine: str
    place: str
    run: str
    provenance: str
    rounds: int
    values: Mapping[str, Mapping[Moment, float]]
    spans: Mapping[str, Span]
    fault: str = ""
    calm: bool = True
    header: Header | None = field(default=None, repr=False, compare=False)

    @cached_property
    def simplicity(self) -> tuple[object, ...]:
        """What makes it simpler than another, in the order of SIMPLER; smaller is simpler."""
        return simplicity(self.cell, self.provenance)

    @cached_property
    def key(self) -> tuple[object, ...]:
        """A total order of contenders that does not depend on how they were given."""
        return (*self.simplicity, self.cell, self.machine, self.run)


SIMPLER = (
    "measured, not modelled", "no low memory", "fewer options", "weights and arithmetic as exact"
    " as they come", "a backend that needs less installed", "the model's own decoder",
    "fewer steps", "a smaller batch",
)  # fmt: skip
"""Which of two that tie is taken: the first of these in which they differ."""
INSTALLED = ("ort", "torch", "openvino", "cuda", "trt", "qaic")
"""Backends, those that come with the project first."""
EXACT = ("fp32", "bf16", "fp16", "fp8", "int8", "int4")
"""Dtypes, the most exact first."""


def simplicity(cell: Cell, provenance: str) -> tuple[object, ...]:
    """The key by which ties are broken, in the order of SIMPLER."""

    def place(value: str, ordered: Sequence[str]) -> int:
        return ordered.index(value) if value in ordered else len(ordered)

    quantised = cell.storage in QUANTISED
    return (
        provenance != "measured",
        cell.low_memory,
        len(cell.options.split(",")) if cell.options else 0,
        (place(cell.precision, EXACT), place(cell.storage, EXACT) if quantised else 0),
        place(cell.backend, INSTALLED),
        cell.decoder != "vae",
        cell.steps,
        cell.batch,
    )


# ---- from rows


def contenders_of(
    runs: Sequence[Run], wants: Wants, keep: Callable[[Cell], bool] = lambda _: True
) -> list[Contender]:
    """The cells of some runs, one for each machine that a cell was measured on.

    Of a cell that several runs of a machine have, the run with most good rounds counts, of equals
    the newest.

    Args:
        keep: which cells are looked at.
    """
    gathered: dict[tuple[str, Cell], Contender] = {}
    for run in sorted(runs, key=lambda run: run.name):
        for line in by_cell(run.rows()):
            cell = line.cell
            if cell.encoder or cell.negative or cell.scenario or not keep(cell):
                continue  # other pictures are another task, and times under load another measure
            entry = contender(line, run, wants)
            before = gathered.get((entry.machine, entry.cell))
            if before is None or (not entry.fault, entry.rounds) >= (
                not before.fault, before.rounds
            ):  # fmt: skip
                gathered[entry.machine, entry.cell] = entry
    return list(gathered.values())


def contender(line: CellRounds, run: Run, wants: Wants) -> Contender:
    """One cell of a run."""
    cell, modelled = line.cell, line.provenance == MODELLED
    machine = cell.device if modelled else run.header.machine
    values = {
        name: {
            (run.name, row["round"]): value
            for row in line.good
            if (value := figure(name, row, wants)) is not None
        }
        for name, quantity in QUANTITIES.items()
        if quantity.timed
    }
    calm = modelled or any("disturbed" not in row["flags"] for row in line.good)
    spans = {
        name: timed_span(list(found.values()), calm)
        for name, found in values.items()
        if found and not modelled
    }
    if modelled and line.good:
        spans |= modelled_spans(line.good[-1], wants)
    return Contender(
        cell=cell,
        machine=machine,
        place=cell.device if modelled else place_of(run),
        run=run.label,
        provenance=line.provenance,
        rounds=len(line.good),
        values={name: found for name, found in values.items() if found},
        spans=spans | plain_spans(line),
        fault=fault_of(line),
        calm=calm,
        header=run.header,
    )


def place_of(run: Run) -> str:
    """What people call a run's machine."""
    environment = run.header.environment
    cards = [str(name) for name in (environment.get("accelerators") or {}).values()]
    return ", ".join([f"{environment['cpu']}, {environment['cores_allowed']} cores", *cards])


def figure(name: str, row: Row, wants: Wants) -> float | None:
    """What a row says of a timed quantity."""
    if name == "latency":
        return float(row["median_ms"]) if row["median_ms"] else None
    rate = row["images_per_s"]
    if name == "joule/image":
        return row["energy_j"] / row["batch"] if row["energy_j"] else None
    if name == "usd/1000":
        return wants.price / 3.6 / rate if rate and wants.price else None
    return float(rate) if rate else None


def timed_span(values: Sequence[float], calm: bool) -> Span:
    """The interval of a figure over its rounds."""
    logs = np.log(np.array(values))
    estimate, low, high = (float(each) for each in one_sample(logs))
    if len(values) < PAIR_ROUNDS:
        low, high = estimate - REACH[len(values)], estimate + REACH[len(values)]
        low, high = min(low, float(logs.min())), max(high, float(logs.max()))
    if not calm:  # other programs may have made all of its rounds longer
        low, high = min(low, estimate - UNKNOWN), max(high, estimate + UNKNOWN)
    return Span(math.exp(estimate), math.exp(low), math.exp(high))


def modelled_spans(row: Row, wants: Wants) -> dict[str, Span]:
    """The figures of a modelled card: each as wide as its latency is, by the model."""
    low, mid, high = row["low_ms"], row["median_ms"], row["high_ms"]
    if not (low and mid and high):
        return {}
    spans = {}
    for name, quantity in QUANTITIES.items():
        value = figure(name, row, wants) if quantity.timed else None
        if value is None:
            continue
        ends = (value * low / mid, value * high / mid) if quantity.less else (
            value * mid / high, value * mid / low
        )  # fmt: skip
        spans[name] = Span(value, *ends)
    return spans


def plain_spans(line: CellRounds) -> dict[str, Span]:
    """The figures that no clock is behind."""
    spans = {}
    peaks = [peak for row in line.good if (peak := peak_mb(row)) is not None]
    if peaks:
        around = 1 + MEMORY_SPREAD
        spans["memory"] = Span(float(np.median(peaks)), min(peaks) / around, max(peaks) * around)
    checks = [row["image_check"] for row in line.good if row["image_check"]]
    known = [check["psnr_db"] for check in checks if check["psnr_db"] is not None]
    if known:
        spans["psnr"] = Span(min(known), min(known), min(known))
    judged = [row["quality"] for row in line.good if row["quality"]]
    if judged:
        spans["captions"] = share_span(judged[-1]["all"], int(judged[-1]["captions"]))
    return spans


def peak_mb(row: Row) -> float | None:
    """The peak memory of what computes: of a GPU or card where it tells, else of the worker."""
    device = (row["accelerator"] or {}).get("peak_memory_mb") if row["device"] != "cpu" else None
    return device if device is not None else row["peak_memory_mb"]


def share_span(share: float, count: int) -> Span:
    """A share of captions in percent, with its exact binomial interval."""
    from scipy.stats import binomtest

    interval = binomtest(round(share * count), count).proportion_ci(2 * CONFIDENCE - 1)
    return Span(100 * share, 100 * float(interval.low), 100 * float(interval.high))


def fault_of(line: CellRounds) -> str:
    """Why a cell cannot be taken whatever its figures are; "" where it may be."""
    bad = [row for row in line.rows if row["status"] != OK]
    if bad:
        error = bad[-1]["error"] or {}
        return f"{line.status}: {' '.join(str(error.get('what', '')).split())}".rstrip(": ")
    if EMULATED in line.provenance:
        return "emulated: it has no speed"
    return "" if line.median("median_ms") else "it has no time"


# ---- one against another


def advantage(one: Contender, other: Contender, name: str) -> Span:
    """How much better `one` is than `other`, above 0: as the logarithm of a factor where the
    figures are ratios, as a difference of points or dB where they are not."""
    quantity = QUANTITIES[name]
    sign = -1.0 if quantity.less else 1.0
    if not quantity.timed:
        scale = math.log if quantity.unit == "MB" else float
        mine, theirs = one.spans[name], other.spans[name]
        return ordered(
            sign * (scale(mine.mid) - scale(theirs.mid)),
            sign * (scale(mine.low) - scale(theirs.high)),
            sign * (scale(mine.high) - scale(theirs.low)),
        )
    calm = one.calm and other.calm
    if MODELLED in one.provenance or MODELLED in other.provenance:
        mine, theirs = one.spans[name], other.spans[name]
        return ordered(
            sign * math.log(mine.mid / theirs.mid),
            sign * math.log(mine.low / theirs.high),
            sign * math.log(mine.high / theirs.low),
        )
    mine_at, theirs_at = one.values[name], other.values[name]
    shared = [moment for moment in mine_at if moment in theirs_at]
    if shared:
        pairs = sign * (logs(mine_at, shared) - logs(theirs_at, shared))
        return widened(paired(pairs), 0.0 if calm else UNKNOWN)
    apart = two_runs(sign * logs(mine_at, mine_at), sign * logs(theirs_at, theirs_at))
    return widened(apart, math.log1p(RUN_SLOWDOWN))


def logs(values: Mapping[Moment, float], moments: Iterable[Moment]) -> Array:
    """The logarithms of figures at some moments."""
    return np.log(np.array([values[moment] for moment in moments]))


def paired(differences: Array) -> Span:
    """The centre of differences of rounds and the interval that it lies in."""
    estimate, low, high = (float(each) for each in one_sample(differences))
    if len(differences) < PAIR_ROUNDS:
        reach = REACH[len(differences)]
        return Span(estimate, estimate - reach, estimate + reach)
    return Span(estimate, low, high)


def two_runs(mine: Array, theirs: Array) -> Span:
    """The difference of two runs' rounds and the interval that it lies in."""
    estimate, low, high = (float(each) for each in two_sample(theirs, mine, 2 * CONFIDENCE - 1))
    fewest = min(len(mine), len(theirs))
    if fewest < PAIR_ROUNDS:
        return Span(estimate, estimate - REACH[fewest], estimate + REACH[fewest])
    return Span(estimate, low, high)


def widened(span: Span, by: float) -> Span:
    """An interval that reaches at least so far to both sides."""
    return Span(span.mid, min(span.low, span.mid - by), max(span.high, span.mid + by))


def ordered(mid: float, one: float, other: float) -> Span:
    """The interval between two ends, whichever is the lower."""
    return Span(mid, min(one, other), max(one, other))
