"""Statistics: exact on cases worked by hand, and properties that hold for all samples."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.rows.stats import (
    fit_steps,
    flags_of,
    median_interval,
    median_or_none,
    percentile,
    summarise,
)

times = st.floats(min_value=1e-3, max_value=1e6)
samples = st.lists(times, min_size=1, max_size=200)


def test_summary_by_hand() -> None:
    found = summarise([10.0, 20.0, 30.0, 100.0], batch=4)
    assert (found.median_ms, found.mean_ms, found.min_ms, found.max_ms) == (25.0, 40.0, 10.0, 100.0)
    assert found.sd_ms == pytest.approx(40.8248, abs=1e-4)
    assert found.cv == pytest.approx(1.02062, abs=1e-5)
    assert found.images_per_s == pytest.approx(160.0)
    assert found.p90_ms is None
    assert found.p99_ms is None


def test_nothing_is_guessed_from_too_little() -> None:
    assert set(vars(summarise([], 1)).values()) == {None}
    one = summarise([5.0], 1)
    assert one.median_ms == 5.0
    assert one.sd_ms is None
    assert one.cv is None


@given(samples)
def test_summary_is_ordered(values: list[float]) -> None:
    found = summarise(values, 1)
    assert found.min_ms is not None
    assert found.median_ms is not None
    assert found.max_ms is not None
    assert found.min_ms <= found.median_ms <= found.max_ms


@pytest.mark.parametrize(
    ("count", "p90", "p99"), [(63, 0, 0), (64, 1, 0), (661, 1, 0), (662, 1, 1)]
)
def test_percentiles_need_their_samples(count: int, p90: bool, p99: bool) -> None:
    found = summarise([float(n + 1) for n in range(count)], 1)
    assert (found.p90_ms is not None) == p90
    assert (found.p99_ms is not None) == p99


@given(st.lists(times, min_size=64, max_size=300), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_percentile_is_a_sample_that_bounds_its_share(values: list[float], q: float) -> None:
    found = percentile(values, q, 64)
    assert found in values
    assert sum(value <= found for value in values) >= q * len(values)
    assert sum(value < found for value in values) < q * len(values)


@given(
    st.floats(min_value=0.1, max_value=1e4),
    st.floats(min_value=0.1, max_value=1e4),
    st.lists(st.integers(1, 50), min_size=2, max_size=8, unique=True),
)
def test_a_fit_finds_the_line_it_was_given(step: float, fixed: float, steps: list[int]) -> None:
    found = fit_steps([(count, fixed + step * count) for count in steps])
    assert found is not None
    assert found.per_step_ms == pytest.approx(step, rel=1e-6)
    assert found.fixed_ms == pytest.approx(fixed, rel=1e-6, abs=1e-6 * step * 50)
    assert found.worst == pytest.approx(0, abs=1e-6)


def test_a_fit_says_how_far_it_is_off() -> None:
    found = fit_steps([(1, 10.0), (2, 20.0), (4, 20.0)])
    assert found is not None
    assert found.worst > 0.1
    assert fit_steps([(2, 10.0), (2, 11.0)]) is None
    assert fit_steps([]) is None


def test_flags() -> None:
    steady = [10.0, 10.01, 10.0, 9.99] * 3
    assert flags_of(steady, 10, 0.01) == []
    assert flags_of(steady[:9], 10, None) == ["under_sampled"]
    assert flags_of(steady, 10, 0.06) == ["disturbed"]
    assert flags_of([10.0, 11.0, 10.0], 3, None) == ["unstable"]
    assert flags_of([10.0], 1, None) == []
    # A hundred calls that scatter by 10% say where their median is; six of them do not.
    shaky = [9.0, 10.0, 11.0, 10.2, 9.8, 10.1] * 17
    assert flags_of(shaky, 10, None) == []
    assert flags_of(shaky[:6], 6, None) == ["unstable"]


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=40))
def test_the_interval_of_a_median_holds_it(samples: list[float]) -> None:
    low, high = median_interval(samples)
    assert min(samples) <= low <= statistics.median(samples) <= high <= max(samples)


def test_the_interval_of_a_median_is_as_sure_as_it_says() -> None:
    """Of 3000 medians of 15 samples each, of a skewed distribution, 95% and not all are inside."""
    draw = random.Random(5)
    inside = 0
    for _ in range(3000):
        low, high = median_interval([draw.expovariate(1.0) for _ in range(15)])
        inside += low <= math.log(2) <= high
    assert 0.95 <= inside / 3000 < 0.985  # the exact level is 96.5%


def test_median_of_what_is_known() -> None:
    assert median_or_none([3.0, None, 1.0]) == 2.0
    assert median_or_none([None]) is None
