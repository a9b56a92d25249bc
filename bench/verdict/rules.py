"""The two rules that say `slower`, as pure functions of round medians.

Everything is in logarithms: a change is a factor, and a factor up is as far as its inverse down.
Arrays may have any leading axes (cells, simulated jobs); the last one is rounds. `addbench noise`
runs these same functions on simulated jobs to know how often they are wrong.

Rank statistics: a round that a burst hit counts as one large value, however large. Their coverage
assumes independent rounds, which fresh processes in alternating order nearly are and which drift
between two runs breaks; the docstrings say on which side each errs then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

CONFIDENCE = 0.95
RUN_SLOWDOWN = 0.15
"""Default limit for two runs measured one after the other."""
RUN_ROUNDS = 5
"""Fewest rounds a side of such runs: with fewer the spread of the rounds is hardly known."""
RUN_SPREADS = 6.0
"""A change between two runs must also exceed this many spreads of a run's own rounds."""
PAIR_SLOWDOWN = 0.08
"""Default limit for alternating rounds."""
PAIR_PROOF = 0.02
"""What the one-sided 95% bound must exceed besides."""
PAIR_ROUNDS = 5
"""Fewest pairs for which a one-sided 95% signed-rank bound exists."""
MANY_PAIRS = 1_000_000
"""Above this the pairwise differences of two samples are searched instead of listed."""


@dataclass(frozen=True)
class Judgement:
    """A rule applied to every leading index.

    Attributes:
        estimate, low, high: the log-ratio HEAD / BASE and its interval.
        spread: of a run's own rounds, as a standard deviation (`runs` only, 0 for `pairs`).
        slower, faster: the rule's verdicts.
        same: the estimate is within the limit, and a slowdown of twice the limit is excluded.
    What is none of the three is inconclusive.
    """

    estimate: Array
    low: Array
    high: Array
    spread: Array
    slower: Flags
    faster: Flags
    same: Flags


def runs(base: Array, head: Array, max_slowdown: float = RUN_SLOWDOWN) -> Judgement:
    """Two runs measured one after the other: log latencies [..., rounds] of each.

    `slower`: the two-sample Hodges-Lehmann estimate exceeds `max_slowdown`, and so clearly that
    (1) its 95% interval lies wholly above it and (2) it is more than RUN_SPREADS times the spread
    of the rounds within the runs. The second condition is what keeps the rule honest on a machine
    that drifts: the interval takes rounds for independent, and a drift that lasts longer than a
    run moves all of its rounds together, which shows only as spread within each run. `faster` is
    the mirror image.

    Pessimistic, i.e. slow to accuse, when bursts inflate the spread. Optimistic when something
    changes the machine exactly between the two runs: nothing in the numbers can show that.
    """
    limit = math.log1p(max_slowdown)
    estimate, low, high = two_sample(base, head)
    spread = np.sqrt((deviation(base) ** 2 + deviation(head) ** 2) / 2)
    clear = np.abs(estimate) > RUN_SPREADS * spread
    return Judgement(
        estimate,
        low,
        high,
        spread,
        slower=(estimate > limit) & (low > limit) & clear,
        faster=(estimate < -limit) & (high < -limit) & clear,
        same=(np.abs(estimate) <= limit) & (high < 2 * limit),
    )


def pairs(log_ratios: Array, max_slowdown: float = PAIR_SLOWDOWN) -> Judgement:
    """Alternating rounds: the log-ratio HEAD / BASE of each, [..., rounds].

    `slower`: the Hodges-Lehmann estimate exceeds `max_slowdown` and the one-sided 95% signed-rank
    bound exceeds PAIR_PROOF. The interval is the two one-sided bounds (90%).

    What both sides of a round share - machine, slow drift - cancels. Pessimistic when bursts hit
    both sides, optimistic when the order matters (the second of two always warmer): hence ABBA.
    """
    limit, proof = math.log1p(max_slowdown), math.log1p(PAIR_PROOF)
    estimate, low, high = one_sample(log_ratios)
    return Judgement(
        estimate,
        low,
        high,
        spread=np.zeros_like(estimate),
        slower=(estimate > limit) & (low > proof),
        faster=(estimate < -limit) & (high < -proof),
        same=(np.abs(estimate) <= limit) & (high < 2 * limit),
    )


def two_sample(
    base: Array, head: Array, confidence: float = CONFIDENCE
) -> tuple[Array, Array, Array]:
    """Shift of `head` [..., m] against `base` [..., n]: (estimate, low, high), each [...].

    The estimate is the median of all m x n differences, the interval the two-sided one that
    inverts the Mann-Whitney test: conservative, as its level is at least `confidence`. NaN, where
    so few rounds cannot give that level.
    """
    n, m = base.shape[-1], head.shape[-1]
    total = n * m
    outside = rank_sum_tail(n, m, (1 - confidence) / 2)
    wanted = {(total - 1) // 2, total // 2}
    if outside:
        wanted |= {outside - 1, total - outside}
    places = sorted(wanted)
    lead = base.shape[:-1]
    flat_base, flat_head = base.reshape(-1, n), head.reshape(-1, m)
    found = np.empty((len(flat_base), len(places)))
    chunk = max(1, MANY_PAIRS // total)
    for start in range(0, len(flat_base), chunk):
        piece = slice(start, start + chunk)
        if total > MANY_PAIRS:
            found[piece] = _search(flat_base[start], flat_head[start], places)
            continue
        differences = flat_head[piece, :, None] - flat_base[piece, None, :]
        found[piece] = np.partition(differences.reshape(-1, total), places)[:, places]
    at = {place: found[:, column].reshape(lead) for column, place in enumerate(places)}
    estimate = (at[(total - 1) // 2] + at[total // 2]) / 2
    unknown = np.full(lead, np.nan)
    return (
        estimate,
        at[outside - 1] if outside else unknown,
        at[total - outside] if outside else unknown,
    )


def _search(base: Array, head: Array, places: list[int]) -> list[float]:
    """Order statistics of all differences head - base without listing them: by bisection."""
    ordered = np.sort(base)
    values = []
    for place in places:
        below, above = float(head.min() - base.max()), float(head.max() - base.min())
        while above - below > 1e-12:
            middle = (below + above) / 2
            count = len(head) * len(base) - np.searchsorted(ordered, head - middle).sum()
            below, above = (below, middle) if count > place else (middle, above)
        values.append(above)
    return values


def one_sample(values: Array, confidence: float = CONFIDENCE) -> tuple[Array, Array, Array]:
    """Centre of `values` [..., n]: (estimate, low, high), each [...].

    The estimate is the median of the n (n + 1) / 2 Walsh averages; `low` and `high` are the
    one-sided bounds at `confidence` that invert the signed-rank test: together an interval of
    2 x confidence - 1. Conservative. NaN where so few values cannot give that level.
    """
    n = values.shape[-1]
    left, right = np.triu_indices(n)
    walsh = np.sort((values[..., left] + values[..., right]) / 2, axis=-1)
    total = walsh.shape[-1]
    estimate = (walsh[..., (total - 1) // 2] + walsh[..., total // 2]) / 2
    outside = signed_rank_tail(n, 1 - confidence)
    if not outside:
        unknown = np.full(values.shape[:-1], np.nan)
        return estimate, unknown, unknown
    return estimate, walsh[..., outside - 1], walsh[..., total - outside]


def deviation(values: Array) -> Array:
    """Standard deviation of `values` [..., n] from the median absolute deviation.

    Blind to what hits fewer than half of the rounds. With five of them it scatters by a third.
    """
    centre = np.median(values, axis=-1, keepdims=True)
    mad = np.median(np.abs(values - centre), axis=-1)
    return np.asarray(1.4826 * mad, dtype=np.float64)


@cache
def signed_rank_tail(n: int, alpha: float) -> int:
    """How many of the smallest Walsh averages a one-sided bound at level 1 - alpha leaves out,
    plus one: the bound is the smallest but `result - 1`. 0 when n values cannot give the level.

    From the exact null distribution of the signed-rank sum, in which each rank 1..n counts with
    probability 1/2; scipy has it only behind a p-value.
    """
    ways = np.ones(1)
    for rank in range(1, n + 1):
        ways = np.convolve(ways, [0.5, *[0.0] * (rank - 1), 0.5])
    return int(np.searchsorted(np.cumsum(ways), alpha, side="right"))


@cache
def rank_sum_tail(n: int, m: int, alpha: float) -> int:
    """The same for the n x m differences of two samples, `alpha` on one side.

    Exact up to 50 values a side, the normal approximation above (it is off by less than 1% there).
    """
    if max(n, m) > 50:
        normal = NormalDist(n * m / 2, math.sqrt(n * m * (n + m + 1) / 12))
        return max(0, int(normal.inv_cdf(alpha)))
    # ways[j][u]: orderings of i of one sample and j of the other with Mann-Whitney count u
    size = n * m + 1
    ways = [np.eye(1, size)[0] for _ in range(m + 1)]
    for i in range(1, n + 1):
        fresh = [np.eye(1, size)[0]]
        for j in range(1, m + 1):
            shifted = np.concatenate([np.zeros(j), ways[j][: size - j]])
            fresh.append(fresh[j - 1] * j / (i + j) + shifted * i / (i + j))
        ways = fresh
    return int(np.searchsorted(np.cumsum(ways[m]), alpha, side="right"))


def percent(log_ratio: Any) -> str:
    """`+8.3%` of a log-ratio."""
    return f"{math.expm1(float(log_ratio)):+.1%}"


def reason(judged: Judgement, place: int, max_slowdown: float) -> str:
    """Why the cell at `place` of a one-axis judgement is inconclusive."""
    limit = math.log1p(max_slowdown)
    estimate, low, high, spread = (
        float(part[place]) for part in (judged.estimate, judged.low, judged.high, judged.spread)
    )
    interval = f"the interval {percent(low)} to {percent(high)}"
    if abs(estimate) <= limit:
        return f"{interval} does not exclude a slowdown of {percent(2 * limit)}"
    if spread and abs(estimate) <= RUN_SPREADS * spread:
        return (
            f"rounds of one run spread by {math.expm1(spread):.1%}, and {percent(estimate)} is less"
            f" than {RUN_SPREADS:g} times that: the machine drifts"
        )
    side = "above" if estimate > 0 else "below"
    return f"{percent(estimate)}, but {interval} does not lie far enough {side} no change"
