"""What others published, against the modelled ranges: the data, the counts, the picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.commands.claims import main
from bench.limits import coverage
from bench.limits.coverage import BELOW, FASTER, INSIDE, SLOWER, Held, groups, held, left_out
from bench.limits.ledger import ELSEWHERE, MODELS, read_claims
from bench.limits.ranges import COSTED, EFFICIENCY, Modelled, models_of
from bench.show.coverage import figure
from core.cli import run as shell
from core.devices import devices

CLAIMS = coverage.published()
LINES = held(CLAIMS)
BY_ID = {line.claim.id: line for line in LINES}


def test_what_others_published_is_clean() -> None:
    """Every figure is a time at stated conditions, on a known device, with a source; and each row
    that is not used says why."""
    elsewhere = read_claims(ELSEWHERE)
    assert len(elsewhere) > 70
    for claim in elsewhere:
        assert claim.source, claim.id
        assert claim.software, claim.id
        assert claim.hardware in devices(), claim.id
        assert claim.model in COSTED, claim.id
        assert claim.call_ms is not None, claim.id
        assert claim.counted, claim.id
        assert claim.batch, claim.id
        assert claim.batch % claim.accelerators == 0 or claim.metric == "latency", claim.id
    out = left_out()
    assert all(each["reason"] and each["source"] for each in out)
    names = [claim.id for claim in CLAIMS] + [each["id"] for each in out]
    assert len(names) == len(set(names))
    assert set(MODELS) <= {*COSTED, "SD-Turbo"}


def test_no_published_figure_is_below_its_floor_and_most_are_inside() -> None:
    assert len(LINES) > 100
    assert not [line.claim.id for line in LINES if line.state == BELOW]
    inside = [line for line in LINES if line.state == INSIDE]
    assert len(inside) >= 0.8 * len(LINES)
    for group in groups(LINES, lambda line: line.claim.hardware):
        assert group.count(INSIDE) >= 0.8 * len(group.lines), group.name


def test_the_range_of_gpus_is_what_the_figures_say() -> None:
    """No wider at its ends than the figures ask for, to a tenth of the factor."""
    compute = EFFICIENCY["NVIDIA"].compute
    shares = [line.share for line in LINES if devices()[line.claim.hardware].vendor == "NVIDIA"]
    assert len(shares) == 103
    assert compute[0] < min(shares) < 1.2 * compute[0]
    assert sum(share < 0.10 for share in shares) == 8


def test_an_offline_rate_by_hand() -> None:
    """16.4176 images a second on 8 cards are 487 ms of one card; 40 evaluations of 6761 GFLOP and
    the rest at 1979 TOPS are 142 ms at least."""
    line = BY_ID["m41-009"]
    assert line.call_ms == pytest.approx(8e3 / 16.4176)
    assert line.model.floor == pytest.approx((40 * 6761.2 + 10470 + 110) / 1979, rel=0.003)
    # In 8 bits the UNet only, in the range.
    by_hand = (40 * 6761.2 / 1979 + (10470 + 110) / 989) / 0.8
    assert line.model.fast == pytest.approx(by_hand, rel=0.01)
    assert models_of(replace(line.claim, precision="fp16"))[0].floor > line.model.floor
    assert models_of(replace(line.claim, hardware="h200-sxm-achieved")) == []  # no 8-bit peak


def test_states() -> None:
    model = Modelled(1, "vae", floor=10.0, fast=12.0, slow=50.0, switched=60.0)
    claim = CLAIMS[0]
    states = [Held(claim, model, time).state for time in (9.9, 11.0, 12.0, 55.0, 61.0)]
    assert states == [BELOW, FASTER, INSIDE, INSIDE, SLOWER]


def test_the_command_counts_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("table", "markdown"):
        assert shell(main, ["--coverage", "--format", form]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"of {len(LINES)} published figures with a range" in text
        assert "none is below its floor" in text
        assert "what their card's model was fitted to" in text
        for word in ("h100-sxm", "ai100-ultra", "TensorRT", "left_out.csv"):
            assert word in text
    assert shell(main, ["--coverage", "--format", "json", "--out", str(tmp_path / "picture")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert sum(said["states"].values()) == len(LINES) == len(said["held"])
    assert {file.name for file in tmp_path.iterdir()} == {"picture.svg", "picture.png"}


def test_a_floor_that_is_beaten_is_said_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    impossible = replace(BY_ID["m41-009"], call_ms=1.0)
    monkeypatch.setattr(coverage, "held", lambda claims: [*LINES, impossible])
    assert shell(main, ["--coverage"]) == 4
    assert "the floor is wrong, or the figure" in " ".join(capsys.readouterr().out.split())


def test_every_figure_is_a_point() -> None:
    slower = replace(LINES[0], call_ms=1e6)
    drawn = figure([*LINES, slower])
    points = [line for line in drawn.axes[0].lines if line.get_marker() not in ("None", None, "")]
    assert sum(np.size(line.get_xdata()) for line in points) == len(LINES) + 1
    hollow = [line for line in points if line.get_markerfacecolor() == "white"]
    assert sum(np.size(line.get_xdata()) for line in hollow) == 1


@pytest.mark.parametrize(
    "words", [["--out", "x"], ["--coverage", "--require", "beaten:a100-1img-200"]], ids=str
)
def test_mistakes_are_answered(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(main, words) == 2
    assert "--coverage" in capsys.readouterr().err
