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

UNSTABLE_CV = 0.025
"""trtexec warns above the same coefficient of variation."""
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


@dataclass(frozen=True)
class Fit:
    """latency_ms ~ fixed_ms + per_step_ms * steps."""

    per_step_ms: float
    fixed_ms: float
    points: int
    worst: float
    """Largest distance of a point from the line, as a share of the point."""


def fit_steps(points: Sequence[tuple[int, float]]) -> Fit | None:
    """Least squares of latency [ms] on steps; None with fewer than two step counts.

    Through two step counts the line is exact, and `worst` 0 says nothing. The fixed cost is an
    extrapolation to zero steps: with an error e in every point it is off by more than e, and it may
    come out negative when it is small. The first step is often slower than the rest, which the fit
    books as fixed cost: pessimistic for that, optimistic for the step.
    """
    if len({steps for steps, _ in points}) < 2:
        return None
    steps, latencies = zip(*points, strict=True)
    line = statistics.linear_regression(steps, latencies)
    gaps = [abs(line.intercept + line.slope * x - y) / y for x, y in points]
    return Fit(line.slope, line.intercept, len(points), max(gaps))


def flags_of(summary: Summary, count: int, wanted: int, other_cpu: float | None) -> list[str]:
    """What a reader should know before trusting a row of `count` samples where `wanted` were asked.

    `unstable`: the coefficient of variation exceeds 2.5%. Pessimistic for calls of about a
    millisecond, where timer and scheduler alone reach that. Not given for fewer than 2 samples.
    """
    flags = []
    if summary.cv is not None and summary.cv > UNSTABLE_CV:
        flags.append("unstable")
    if count < wanted:
        flags.append("under_sampled")
    if other_cpu is not None and other_cpu > DISTURBED_CPU:
        flags.append("disturbed")
    return flags
