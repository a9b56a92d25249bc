"""Rows of integer weights: what their table says of the image, and the ceiling they are under."""

from __future__ import annotations

from pathlib import Path

import pytest
from made import cell, make_run, row

from backends.check.gate import RANDOM_WORDS
from bench.machine import ceilings
from bench.show import table


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"precision": "int8", "storage": "int8"}, True),
        ({"storage": "int4"}, True),
        ({"precision": "int8", "storage": "int8", "weights": "folder"}, False),
        ({}, False),
    ],
)
def test_a_table_says_what_random_weights_show(
    columns: dict[str, str], said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(cell(**columns), [1.0, 1.1])]
    run = make_run(tmp_path, rows)
    assert (RANDOM_WORDS in table.markdown(run, rows)) is said
    table.show(run, rows)
    assert (RANDOM_WORDS in capsys.readouterr().out) is said


def test_integer_products_have_a_ceiling_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "STOP_AFTER_S", 0.05)
    monkeypatch.setattr(ceilings, "GROW_UNTIL_S", 0.01)
    if "int8" not in ceilings.native_dtypes():
        pytest.skip("this CPU has no INT8 arithmetic worth the name")
    found = ceilings.measure(["int8"])
    assert set(found.tflops) == {"int8"}
    assert found.tflops["int8"]["matmul"] == found.tflops["int8"]["conv"] > 0
