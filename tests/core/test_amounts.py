"""Sizes and counts as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.amounts import bytes_text, count_text


@given(st.integers(0, 10**15))
def test_a_size_is_read_back_within_its_digits_and_never_as_nothing(count: int) -> None:
    value, unit = bytes_text(count).split()
    size = {"byte": 1, "bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    step = 0.1 * size if unit == "GB" else size
    assert abs(float(value) * size - count) <= step / 2 + 1e-6 * count
    assert (float(value) == 0) == (count == 0)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "1 byte"),
        (999, "999 bytes"),
        (999_600, "1 MB"),
        (999_600_000, "1.0 GB"),
        (12_400, "12 kB"),
    ],
)
def test_a_size_keeps_the_unit_that_has_digits_for_it(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_nouns_are_counted() -> None:
    assert count_text(1, "cell") == "1 cell"
    assert count_text(0, "cell") == "0 cells"
    assert count_text(2, "process", "processes") == "2 processes"
