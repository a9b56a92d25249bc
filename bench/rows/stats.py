"""Statistics as pure functions. Each says what it assumes, and on which side it errs.

Calls inside one process are not independent: caches, clock and memory layout are shared. What is
computed here from the samples of one row describes that process; the spread between rounds (fresh
processes) is larger, and is what a comparison has to use.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

UNSTABLE_WIDTH = 0.025
"""Half-width of the median's interval, as a share of it, above which a row is `unstable`."""
DISTURBED_CPU = 0.05
"""Other processes' share of our cores above which a row is `disturbed`."""
P90_SAMPLES, P99_SAMPLES = 64, 662
"""MLPerf loadgen's early stopping: the fewest samples that bound a percentile at 99% confidence."""


@dataclass(frozen=True)
class Summary:
    """Figures of one row's samples; None where the samples are too few to say."""

    median_ms: float | None
    mean_ms: float | None
    min_ms: float | None
    max_ms: float | None
    sd_ms: float | None
    cv: float | None
    p90_ms: float | None
    p99_ms: float | None
    images_per_s: float | None


def summarise(samples_ms: Sequence[float], batch: int) -> Summary:
    """Summary of positive samples in milliseconds, every one kept.

    `sd_ms` (n - 1 in the denominator) and `cv` are optimistic about the run-to-run spread, since
    they see one process only, and pessimistic in the presence of a single slow call, which both
    count in full. `images_per_s` is the batch over the median: calls one after the other, nothing
    overlapped, so it is pessimistic for a server that pipelines.
    """
    if not samples_ms:
        return Summary(*[None] * 9)
    median, mean = statistics.median(samples_ms), statistics.fmean(samples_ms)
    deviation = statistics.stdev(samples_ms) if len(samples_ms) > 1 else None
    return Summary(
        median_ms=median,
        mean_ms=mean,
        min_ms=min(samples_ms),
        max_ms=max(samples_ms),
        sd_ms=deviation,
        cv=None if deviation is None else deviation / mean,
        p90_ms=percentile(samples_ms, 0.90, P90_SAMPLES),
        p99_ms=percentile(samples_ms, 0.99, P99_SAMPLES),
        images_per_s=batch * 1e3 / median,
    )


def percentile(samples: Sequence[float], q: float, needed: int) -> float | None:
    """The smallest sample with at least a share `q` of all at or below it; None below `needed`.

    Pessimistic for latencies: it never interpolates downwards between two samples. Optimistic where
    samples follow each other closely, as one burst then counts as many.
    """
    if len(samples) < needed:
        return None
    return sorted(samples)[math.ceil(q * len(samples)) - 1]


def median_or_none(values: Sequence[float | None]) -> float | None:
    """Median of the values that exist, or None."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


BARS = 2.0
"""Standard errors that a fitted figure has to be away from what it must not be."""
OFF_THE_LINE = 0.10
"""How far off a point may lie, as a share of it, whatever its own error."""


@dataclass(frozen=True)
class StepFit:
    """latency_ms ~ fixed_ms + per_step_ms * steps.

    Attributes:
        worst: the largest distance of a point from the line, as a share of the point.
        per_step_error_ms, fixed_error_ms: standard errors, from those of the points or from their
            distances to the line, whichever are larger.
        refused: why no figure of it should be shown; "" where its points support it.
    """

    per_step_ms: float
    fixed_ms: float
    points: int
    worst: float
    per_step_error_ms: float = 0.0
    fixed_error_ms: float = 0.0
    refused: str = ""


def fit_steps(
    points: Sequence[tuple[int, float]], errors_ms: Sequence[float] | None = None
) -> StepFit | None:
    """Least squares of latency [ms] on steps; None with fewer than two step counts.

    Through two step counts the line is exact, and `worst` 0 says nothing: what it is worth is in
    the errors of its points. The fixed cost is an extrapolation to zero steps: with an error e in
    every point it is off by more than e. The first step is often slower than the rest, which the
    fit books as fixed cost: pessimistic for that, optimistic for the step.

    Args:
        errors_ms: a standard error for each point; none of them has one where this is left out.
    """
    if len({steps for steps, _ in points}) < 2:
        return None
    steps, latencies = zip(*points, strict=True)
    errors = [0.0] * len(points) if errors_ms is None else errors_ms
    line = statistics.linear_regression(steps, latencies)
    off = [line.intercept + line.slope * x - y for x, y in points]
    mean = statistics.fmean(steps)
    spread = sum((x - mean) ** 2 for x in steps)
    pulls = [(x - mean) / spread for x in steps]  # of a point on the slope
    lifts = [1 / len(points) - mean * pull for pull in pulls]  # and on the intercept
    scatter = math.sqrt(sum(gap**2 for gap in off) / max(1, len(points) - 2))
    slope_error, fixed_error = (
        max(
            math.hypot(*(part * error for part, error in zip(parts, errors, strict=True))),
            scatter * math.hypot(*parts),
        )
        for parts in (pulls, lifts)
    )
    return StepFit(
        line.slope,
        line.intercept,
        len(points),
        max(abs(gap) / y for gap, y in zip(off, latencies, strict=True)),
        slope_error,
        fixed_error,
        _refusal(line.slope, line.intercept, slope_error, fixed_error, points, off, errors),
    )


def _refusal(
    slope: float,
    fixed: float,
    slope_error: float,
    fixed_error: float,
    points: Sequence[tuple[int, float]],
    off: Sequence[float],
    errors: Sequence[float],
) -> str:
    """Why points do not support the line through them; "" where they do."""
    if slope <= BARS * slope_error or slope <= 0:
        return "no cost of a step beyond the spread of its points"
    for (steps, ms), gap, error in zip(points, off, errors, strict=True):
        if abs(gap) > max(OFF_THE_LINE * ms, BARS * error):
            return f"its points lie on no line: {abs(gap) / ms:.0%} off at {steps}"
    # What a call of one step more than none takes cannot be less than that step.
    if fixed < -max(BARS * fixed_error, OFF_THE_LINE * min(ms for _, ms in points)):
        return "its points ask for a fixed cost below zero"
    return ""


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median of at least one sample, by order statistics.

    No distribution is assumed. Below 6 samples nothing reaches 95%, and it is their whole range.
    Optimistic where samples follow each other closely: it takes them for independent.
    """
    ordered, count = sorted(samples), len(samples)
    outside, ways, tail = 0, 1, 0  # samples left out at each end; how often so few come out below
    while 40 * (tail + ways) <= 2**count:
        tail += ways
        outside += 1
        ways = ways * (count - outside + 1) // outside
    last = max(outside - 1, 0)
    return ordered[last], ordered[-1 - last]


def flags_of(samples_ms: Sequence[float], wanted: int, other_cpu: float | None) -> list[str]:
    """What a reader should know before trusting a row's samples where `wanted` were asked for.

    `unstable`: the samples leave the median open by more than 2.5% to either side (half the width
    of its 95% interval). That calls of 10 ms scatter says little where there are hundreds of them;
    the median of three slow ones may be anywhere between them. Not given for a single sample.
    """
    flags = []
    if len(samples_ms) > 1:
        low, high = median_interval(samples_ms)
        if (high - low) / 2 > UNSTABLE_WIDTH * statistics.median(samples_ms):
            flags.append("unstable")
    if len(samples_ms) < wanted:
        flags.append("under_sampled")
    if other_cpu is not None and other_cpu > DISTURBED_CPU:
        flags.append("disturbed")
    return flags
