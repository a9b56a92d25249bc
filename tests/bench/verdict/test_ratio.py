"""The ratio of two latencies: order, estimate, and whether its intervals hold what they promise."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.run.orders import schedule
from bench.verdict.ratio import (
    Level,
    level_of_call,
    level_of_rounds,
    of_levels,
    of_pairs,
)

times = st.lists(st.floats(1.0, 1e5), min_size=5, max_size=12)


@given(st.integers(1, 9), st.integers(1, 9))
def test_every_round_is_measured_once_and_the_rare_side_stands_in_the_middle(
    base: int, head: int
) -> None:
    found = schedule(base, head)
    assert Counter(side for side, _ in found) == Counter({0: base, 1: head})
    for side, rounds in ((0, base), (1, head)):
        assert [round_ for one, round_ in found if one == side] == list(range(rounds))
    if base != head:
        rare = 0 if base < head else 1
        sides = [side for side, _ in found]
        before, after = sides.index(rare), sides[::-1].index(rare)
        assert abs(before - after) <= 1


@given(times, st.data())
def test_a_ratio_turned_over_is_its_inverse(base: list[float], data: st.DataObject) -> None:
    head = data.draw(st.lists(st.floats(1.0, 1e5), min_size=len(base), max_size=len(base)))
    there, back = of_pairs(base, head), of_pairs(head, base)
    assert there.low is not None
    assert back.high is not None
    assert there.value == pytest.approx(1 / back.value)
    assert there.low == pytest.approx(1 / back.high)
    scaled = of_pairs([3 * value for value in base], head)
    assert scaled.value == pytest.approx(3 * there.value)


def test_too_little_gives_no_interval() -> None:
    assert of_pairs([10.0] * 4, [5.0] * 4).low is None
    assert of_pairs([10.0] * 4, [5.0] * 4).value == pytest.approx(2)
    one = level_of_rounds([5.0])
    call = level_of_call(20.0, [18.0])
    assert of_levels(call, level_of_rounds([5.0, 5.1]), "").low is None
    assert of_levels(level_of_rounds([20.0, 21.0]), one, "").low is None
    exact = of_levels(Level(math.log(6), 0.0, 3), Level(math.log(2), 0.0, 3), "")
    assert (exact.low, exact.value, exact.high) == pytest.approx((3, 3, 3))


@pytest.mark.parametrize(("likeness", "least"), [(0.0, 0.87), (0.6, 0.80)])
def test_the_interval_of_a_single_call_holds_the_truth(likeness: float, least: float) -> None:
    """50 steps, independent or alike (AR(1)); the truth is what the expected call takes.

    A t interval as if steps were independent would cover 0.60 of the second.
    """
    rng = random.Random(0)
    head = Level(0.0, 0.0, 5)
    covered, calls = 0, 2000
    for _ in range(calls):
        noise = rng.gauss(0, 1)
        steps = []
        for _ in range(50):
            noise = likeness * noise + math.sqrt(1 - likeness**2) * rng.gauss(0, 1)
            steps.append(100 * (1 + 0.05 * noise))
        found = of_levels(level_of_call(sum(steps) + 300, steps), head, "")
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 5300 <= found.high
    assert least < covered / calls < 0.95
