"""The statistics against scipy and against their definitions; the two rules at their edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, wilcoxon

from bench.verdict import rules as verdict
from bench.verdict.rules import one_sample, pairs, rank_sum_tail, runs, signed_rank_tail, two_sample

values = st.floats(-1, 1, allow_nan=False).map(lambda value: round(value, 6))


@pytest.mark.parametrize("n", range(5, 13))
def test_signed_rank_tail_is_the_exact_one(n: int) -> None:
    sums = [
        sum(rank for rank, sign in enumerate(signs, start=1) if sign)
        for signs in itertools.product((0, 1), repeat=n)
    ]
    tail = signed_rank_tail(n, 0.05)
    assert np.mean(np.array(sums) <= tail - 1) <= 0.05 < np.mean(np.array(sums) <= tail)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (5, 8), (4, 6), (10, 10)])
def test_rank_sum_tail_is_the_exact_one(n: int, m: int) -> None:
    tail = rank_sum_tail(n, m, 0.025)
    # Distinct samples with a chosen Mann-Whitney count: scipy gives its exact one-sided p-value.
    assert exact_p(n, m, tail - 1) <= 0.025 < exact_p(n, m, tail)


def exact_p(n: int, m: int, count: int) -> float:
    """P(U <= count) by scipy, from samples made to have U = count."""
    full, rest = divmod(count, m)
    first = [m + 1.0 + i if i < full else -1.0 - i for i in range(n)]
    if rest:
        first[full] = rest + 0.5
    second = [float(j) for j in range(1, m + 1)]
    found = mannwhitneyu(first, second, alternative="less", method="exact")
    assert found.statistic == count
    return float(found.pvalue)


def test_tails_of_too_few_values_are_none() -> None:
    assert signed_rank_tail(4, 0.05) == 0
    assert rank_sum_tail(3, 3, 0.025) == 0
    assert math.isnan(one_sample(np.zeros(4))[1])
    assert math.isnan(two_sample(np.zeros(3), np.zeros(3))[1])


def test_normal_approximation_meets_the_exact_tail() -> None:
    assert rank_sum_tail(51, 51, 0.025) == pytest.approx(rank_sum_tail(50, 50, 0.025), rel=0.05)


@given(st.lists(values, min_size=5, max_size=12))
@settings(deadline=None)
def test_one_sample_is_the_median_of_walsh_averages(sample: list[float]) -> None:
    estimate, low, high = one_sample(np.array(sample))
    walsh = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(sample, 2)]
    assert estimate == pytest.approx(np.median(walsh))
    assert low <= estimate <= high


@given(st.lists(values, min_size=6, max_size=12, unique_by=abs))
@settings(max_examples=50, deadline=None)
def test_the_bound_inverts_the_signed_rank_test(sample: list[float]) -> None:
    array = np.array(sample)
    low = float(one_sample(array)[1])
    for shift, rejects in ((low - 1e-9, True), (low + 1e-9, False)):
        centred = array - shift
        if len({*np.abs(centred).round(12)}) < len(sample) or (centred == 0).any():
            return  # ties: scipy leaves the exact distribution
        p = wilcoxon(centred, alternative="greater", method="exact").pvalue
        assert (p <= 0.05) == rejects


@given(
    st.lists(values, min_size=4, max_size=9),
    st.lists(values, min_size=4, max_size=9),
    st.floats(-1, 1),
)
@settings(deadline=None)
def test_two_sample_moves_with_its_data(base: list[float], head: list[float], shift: float) -> None:
    one = two_sample(np.array(base), np.array(head))
    differences = [h - b for h in head for b in base]
    assert one[0] == pytest.approx(np.median(differences))
    assert one[1] <= one[0] <= one[2]
    moved = two_sample(np.array(base), np.array(head) + shift)
    assert np.allclose(np.array(moved) - shift, one)
    swapped = two_sample(np.array(head), np.array(base))
    assert np.allclose([-swapped[0], -swapped[2], -swapped[1]], one)


def test_listed_and_searched_differences_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    base, head = rng.normal(0, 1, (3, 40)), rng.normal(0.3, 1, (3, 60))
    listed = two_sample(base, head)
    monkeypatch.setattr(verdict, "MANY_PAIRS", 100)
    assert np.allclose(two_sample(base, head), listed)


def test_leading_axes_are_independent() -> None:
    rng = np.random.default_rng(1)
    base, head = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 3, 7))
    whole = two_sample(base, head)
    for i, j in itertools.product(range(2), range(3)):
        assert [part[i, j] for part in whole] == list(two_sample(base[i, j], head[i, j]))


# ---- the rules


def steady(rounds: int, change: float = 0.0, jitter: float = 0.005) -> np.ndarray:
    """Log latencies that alternate around log1p(change) by `jitter`."""
    return np.log1p(change) + jitter * (-1.0) ** np.arange(rounds)


@pytest.mark.parametrize(
    ("change", "verdict_"),
    [
        (0.30, "slower"),
        (0.17, "slower"),
        (0.10, "same"),
        (0.0, "same"),
        (-0.10, "same"),
        (-0.30, "faster"),
    ],
)
def test_runs_on_a_quiet_machine(change: float, verdict_: str) -> None:
    judged = runs(steady(5), steady(5, change))
    for name in ("slower", "faster", "same"):
        assert bool(getattr(judged, name)) == (name == verdict_), name


def test_runs_whose_rounds_drift_are_no_regression() -> None:
    drift = np.linspace(0, 0.25, 10)
    judged = runs(drift[:5], drift[5:] + 0.1)
    assert judged.estimate > np.log1p(0.15)
    assert not judged.slower
    assert "drifts" in verdict.reason(runs(drift[None, :5], drift[None, 5:] + 0.1), 0, 0.15)


def test_one_burst_does_not_decide() -> None:
    base, head = steady(10), steady(10)
    head[3] += 1.0
    assert runs(base, head).same
    assert pairs(head - base).same


def test_ties_are_the_same() -> None:
    judged = runs(np.zeros(5), np.zeros(5))
    assert judged.same
    assert judged.estimate == 0
    assert pairs(np.zeros(10)).same


@pytest.mark.parametrize(
    ("change", "limit", "verdict_"),
    [
        (0.12, 0.08, "slower"),
        (0.05, 0.08, "same"),
        (0.05, 0.03, "slower"),
        (-0.12, 0.08, "faster"),
    ],
)
def test_pairs_on_a_quiet_machine(change: float, limit: float, verdict_: str) -> None:
    judged = pairs(steady(10, change), limit)
    for name in ("slower", "faster", "same"):
        assert bool(getattr(judged, name)) == (name == verdict_), name


def test_pairs_need_proof() -> None:
    ratios = np.array([[0.5, 0.4, 0.3, 0.2, 0.12, 0.08, -0.1, -0.15, -0.2, 0.3]])
    judged = pairs(ratios)
    assert judged.estimate > np.log1p(0.08)
    assert not judged.slower
    assert not judged.same
    assert "does not lie far enough above" in verdict.reason(judged, 0, 0.08)


def test_wide_intervals_are_not_the_same() -> None:
    ratios = 0.3 * (-1.0) ** np.arange(10)[None]
    judged = pairs(ratios)
    assert not judged.same
    assert "does not exclude a slowdown" in verdict.reason(judged, 0, 0.08)


def test_deviation_of_normal_values() -> None:
    sample = np.random.default_rng(2).normal(0, 0.05, 20_000)
    assert verdict.deviation(sample) == pytest.approx(0.05, rel=0.03)
