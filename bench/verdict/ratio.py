"""How many times faster: the ratio of two latencies and its interval, as pure functions.

Three kinds of evidence, each with what it cannot see:

- rounds of both sides, alternating: the machine and slow drift cancel in the ratio of neighbours;
- rounds of one side around a single call of the other, or two single calls: each side's own
  spread, added as Welch does. A drift between them stays in the ratio;
- of a single call, the spread of its steps: what differs from process to process is not in it, so
  the interval is optimistic about that.

Every interval is two one-sided 95% bounds, 90% in all.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
BATCHES = 10
"""How many means of neighbouring steps a single call's spread is taken from."""


@dataclass(frozen=True)
class Ratio:
    """latency BASE / HEAD, and its interval; None where what was measured does not give one."""

    value: float
    low: float | None
    high: float | None
    why: str
    """Where the interval comes from, or why there is none."""


@dataclass(frozen=True)
class Level:
    """One side's log latency, its standard error and that one's degrees of freedom (0: no idea)."""

    log: float
    error: float
    freedom: float


def of_pairs(base_ms: Sequence[float], head_ms: Sequence[float]) -> Ratio:
    """A ratio from round medians of alternating rounds, pair by pair.

    Hodges-Lehmann estimate and signed-rank bounds of the log-ratios, as `addbench ab` has them:
    conservative, and unknown for fewer than 5 pairs.
    """
    import numpy as np

    from bench.verdict.rules import PAIR_ROUNDS, one_sample

    logs = np.array([math.log(b / h) for b, h in zip(base_ms, head_ms, strict=True)])
    estimate, low, high = (math.exp(float(found)) for found in one_sample(logs, CONFIDENCE))
    if len(logs) < PAIR_ROUNDS:
        why = f"{len(logs)} rounds have both sides, {PAIR_ROUNDS} are needed for an interval"
        return Ratio(estimate, None, None, why)
    return Ratio(estimate, low, high, f"signed-rank bounds over {len(logs)} alternating rounds")


def level_of_rounds(medians_ms: Sequence[float]) -> Level:
    """One side from its rounds' medians; optimistic if the machine drifts over the rounds."""
    logs = [math.log(value) for value in medians_ms]
    if len(logs) < 2:
        return Level(statistics.fmean(logs), math.inf, 0)
    return Level(statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs)),
                 len(logs) - 1)  # fmt: skip


def level_of_call(call_ms: float, steps_ms: Sequence[float]) -> Level:
    """One side from a single call of `call_ms` that spent `steps_ms` in the UNet, step by step.

    The error of the sum of n steps is n times that of their mean, which comes from BATCHES means
    of neighbours (batch means, as for the output of a simulation): neighbours are alike, and as if
    independent they would promise too much. Below 2 x BATCHES steps each counts for itself, which
    is optimistic. Text, decoding and the rest happened once and are taken as they came: optimistic
    too.
    """
    count = len(steps_ms)
    if count < 2:
        return Level(math.log(call_ms), math.inf, 0)
    batches = BATCHES if count >= 2 * BATCHES else count
    edges = [round(place * count / batches) for place in range(batches + 1)]
    means = [statistics.fmean(steps_ms[start:end]) for start, end in itertools.pairwise(edges)]
    error_ms = count * statistics.stdev(means) / math.sqrt(batches)
    return Level(math.log(call_ms), error_ms / call_ms, batches - 1)


def of_levels(base: Level, head: Level, why: str) -> Ratio:
    """A ratio from two sides that were measured apart.

    Welch's t interval of the difference of the logs.
    """
    from scipy.stats import t

    estimate = base.log - head.log
    if not base.freedom or not head.freedom:
        lacks = "one round, or a single call of one step, has no spread to take it from"
        return Ratio(math.exp(estimate), None, None, lacks)
    variance = base.error**2 + head.error**2
    if not variance:
        return Ratio(math.exp(estimate), math.exp(estimate), math.exp(estimate), why)
    freedom = variance**2 / (base.error**4 / base.freedom + head.error**4 / head.freedom)
    reach = float(t.ppf(CONFIDENCE, freedom)) * math.sqrt(variance)
    return Ratio(
        math.exp(estimate), math.exp(estimate - reach), math.exp(estimate + reach), why
    )  # fmt: skip
