"""Plans and estimates."""

from __future__ import annotations

import pytest
from made import cell, row

from backends.base import UnavailableError
from bench.rows.cell import Cell
from bench.run import estimate as estimates
from bench.run.estimate import TYPICAL_FRACTION, estimate, sampling_s
from bench.run.measure import StopRule
from bench.run.plan import groups, make_cells, probe
from bench.run.request import Request, Sampling
from core.errors import PreconditionError
from export.bundle import Bundle

RULE = StopRule()


def test_a_group_is_what_one_worker_measures(tiny_bundle: Bundle) -> None:
    candidates = probe(["null", "null:unet_ms=3,text_ms=1"])
    cells = make_cells(tiny_bundle, candidates, Request(batches=(1, 4), steps=(1, 2, 4)))
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 * 3
    found = groups(cells)
    assert [len(group) for group in found] == [3] * 8
    assert all(len({one.group for one in group}) == 1 for group in found)
    assert cells[-1].options == "text_ms=1,unet_ms=3"  # sorted
    assert cells[-1].backend_text == "null:text_ms=1,unet_ms=3"
    assert (cells[0].weights, cells[0].storage, cells[0].precision) == ("random", "fp16", "fp32")


def test_decoders_that_are_not_named_are_those_of_the_bundle(tiny_bundle: Bundle) -> None:
    parts = {name: part for name, part in tiny_bundle.manifest["parts"].items()
             if name != "taesd_decoder"}  # fmt: skip
    without = Bundle(tiny_bundle.path, {**tiny_bundle.manifest, "parts": parts})
    for bundle, decoders in ((tiny_bundle, ["vae", "taesd"]), (without, ["vae"])):
        cells = make_cells(bundle, probe(["null"]), Request(steps=(1,)))
        assert [cell.decoder for cell in cells] == decoders


def test_a_cell_goes_into_columns_and_back() -> None:
    one = cell(options="a=1", steps=4)
    assert Cell.of(one.columns() | {"median_ms": 1.0}) == one
    assert one.differences(cell(options="a=2", steps=4)) == ["options"]
    with pytest.raises(KeyError):
        Cell.of({"model": "x"})


def test_settings_go_into_columns_and_back() -> None:
    method = Sampling(StopRule(min_samples=4), rounds=3)
    assert Sampling.of(method.columns()) == method


def test_probe_keeps_the_unusable_beside_the_usable() -> None:
    found = probe(["null:usable=0", "null"])
    assert [candidate.found.usable for candidate in found] == [False, True]
    with pytest.raises(UnavailableError, match="none of the backends"):
        probe(["null:usable=0", "null:usable=0,unet_ms=3"])
    with pytest.raises(PreconditionError, match="stands twice"):
        probe(["null:unet_ms=3,text_ms=1", "null:text_ms=1,unet_ms=3"])


@pytest.mark.parametrize(
    ("call_s", "seconds"),
    [
        (0.1, 0.1 + 31 * 0.1),  # min_time decides, one warm-up call
        (1.0, 1 + 11 * 1.0),  # min_samples decides
        (8.0, 8 + 9 * 8.0),  # max_time decides
        (50.0, 50 + 3 * 50.0),  # three samples, and the cold call is the warm-up
    ],
)
def test_seconds_of_a_cell(call_s: float, seconds: float) -> None:
    assert sampling_s(call_s, call_s, RULE) == pytest.approx(seconds)


def test_estimates_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    one = cell(backend="ort")
    earlier = row(one, [1000.0] * 3, cold_ms=2000.0)
    known = estimate(one, RULE, {one: earlier}, None)
    assert known.seconds == pytest.approx(2 + 11)
    assert known.source == "run made"
    unknown = estimate(one, RULE, {}, None)
    assert unknown.bound
    assert unknown.seconds == 3.0
    monkeypatch.setattr(estimates, "call_floor_s", lambda cell, surveyed: 6.0)
    rough = estimate(one, RULE, {}, {"some": "survey"})
    assert rough.source == f"floor / {TYPICAL_FRACTION}"
    call_s = 6.0 / TYPICAL_FRACTION
    assert rough.seconds == pytest.approx(sampling_s(call_s, call_s, RULE))
    assert not rough.bound
    # The null backend takes as long as it is told: a floor says nothing about it.
    assert estimate(cell(backend="null"), RULE, {}, {"some": "survey"}).bound
