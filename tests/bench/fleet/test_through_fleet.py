"""The same cells through a fleet's engine and without, in turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fleet_double import FleetDouble

from bench.commands import harness
from bench.fleet import engines
from bench.rows.store import open_run
from core.cli import run as shell
from export.bundle import Bundle


def test_both_ways_are_measured_in_turns_and_what_a_group_takes_longer_is_said(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fleet = FleetDouble("here")
    monkeypatch.setattr(engines, "fleet_at", lambda _: fleet)
    out = tmp_path / "record.json"
    words = ["fleet", "--model", str(tiny_bundle.path), "--backend", "null", "--steps", "1",
             "--decoder", "taesd", "--rounds", "2", "--min-time", "0.1", "--min-samples", "3",
             "--runs", str(tmp_path), "--out", str(out)]  # fmt: skip
    assert shell(harness.main, words) in (0, 4)  # whether it is within is for a quiet machine
    record = json.loads(out.read_text())
    assert len(record["direct_s"]) == len(record["through_s"]) == 2
    assert record["verdicts"] == ["inconclusive"]  # two rounds tell nothing
    for name in record["runs"]:
        run = open_run(name, tmp_path)
        assert [row["round"] for row in run.rows()] == [0, 1]
        assert {row["status"] for row in run.rows()} == {"ok"}
    assert "through the fleet" in capsys.readouterr().out


def test_one_machine_is_asked_for(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "fleet_at", lambda _: FleetDouble("left", "right"))
    assert shell(harness.main, ["fleet", "--model", str(tiny_bundle.path)]) == 2
    assert "2 machines fit" in capsys.readouterr().err
