"""The error rates of both rules by a short seeded simulation; the model's levels from runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from made import cell, make_run, row

from bench.commands.noise import main
from bench.verdict import levels, noise
from bench.verdict.noise import HARSH, TYPICAL, Levels, ab, compare, false_alarms, power, simulate
from core.cli import run as shell

JOBS = 2000
"""No alarm at all in as many gives an upper 95% bound of 0.15%, five of them still 0.53%."""


@pytest.mark.parametrize("levels_", [TYPICAL, HARSH], ids=lambda each: each.name)
@pytest.mark.parametrize(
    "rule",
    [ab(10), compare(5), compare(10)],
    ids=["ab", "compare, 5 rounds", "compare, 10 rounds"],
)
def test_false_alarms_of_a_job(rule: noise.Rule, levels_: Levels) -> None:
    alarmed, _ = false_alarms(rule, levels_, JOBS, seed=7)
    assert alarmed.upper <= noise.FALSE_ALARM_GOAL


def test_power_of_ab_under_typical_noise() -> None:
    for slowdown, least in noise.POWER_GOALS.items():
        assert power(ab(10), TYPICAL, slowdown, 4000, seed=8).share >= least


def test_what_the_guards_are_for() -> None:
    """Without confirmation, interval or spread the goal is missed: the simulation can fail."""
    for rule in (ab(10, confirm=False), compare(5, estimate_alone=True)):
        assert false_alarms(rule, HARSH, 500, seed=9)[0].share > noise.FALSE_ALARM_GOAL


def test_a_plain_rule_cries_wolf() -> None:
    plain = noise.last_run(0.10, one_machine=False)
    assert false_alarms(plain, TYPICAL, 500, seed=9)[0].share > 0.3


def test_an_inconclusive_job_is_the_exception_under_typical_noise() -> None:
    for rule in (ab(10), compare(10)):
        assert false_alarms(rule, TYPICAL, 500, seed=10)[1].share < 0.25


def test_upper_bounds_are_those_of_the_binomial() -> None:
    assert noise.Rate(0, 1000).upper == pytest.approx(1 - 0.05 ** (1 / 1000))
    assert noise.Rate(5, 1000).upper == pytest.approx(0.01048, abs=2e-5)


def test_simulation_has_the_spreads_it_is_told() -> None:
    rng = np.random.default_rng(0)
    only = {"machine": 0.0, "drift": 0.0, "process": 0.0, "burst_rate": 0.0, "burst_mean": 0.1}
    quiet = simulate(Levels("cell", **only, cell=0.015), 300, 10, rng)
    assert quiet.std() == pytest.approx(0.015, rel=0.03)
    machine = simulate(Levels("machine", **(only | {"machine": 0.08}), cell=0.0), 3000, 2, rng)
    assert machine[:, 0, 0].std() == pytest.approx(0.08, rel=0.05)
    assert np.ptp(machine, axis=(1, 2)).max() == 0  # one draw for the job: it cancels
    drift = simulate(Levels("drift", **(only | {"drift": 0.01}), cell=0.0), 3000, 5, rng)
    assert np.diff(drift[:, :, 0], axis=1).std() == pytest.approx(0.01, rel=0.05)
    bursts = simulate(Levels("burst", **(only | {"burst_rate": 0.2}), cell=0.0), 500, 10, rng)
    assert (bursts > 0).mean() == pytest.approx(0.2, rel=0.05)
    assert bursts[bursts > 0].mean() == pytest.approx(0.1, rel=0.05)


def test_abba_pairs_neighbours_in_alternating_order() -> None:
    turns = np.arange(6.0).reshape(1, 6, 1)
    assert noise.abba(turns)[0, 0].tolist() == [1.0, -1.0, 1.0]


def test_the_command_prints_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    code = shell(main, ["--jobs", "700", "--power-jobs", "300", "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if all(goal["met"] for line in found for goal in line["goals"]) else 4)
    assert {line["levels"] for line in found} == {"typical", "harsh"}
    assert all(line["false_alarm"]["upper"] >= line["false_alarm"]["share"] for line in found)
    assert any("last run" in line["rule"] for line in found)


@pytest.mark.parametrize("wrong", ["--jobs 0", "--power-jobs -1", "--rounds 4", "--seed -1"])
def test_wrong_numbers_are_refused(wrong: str) -> None:
    assert shell(main, wrong.split()) == 2


# ---- --levels


def panels(levels_: Levels, rounds: int, runs: int = 6) -> list[levels.Panel]:
    turns = simulate(levels_, runs, rounds, np.random.default_rng(3))
    cells = [cell(batch=1 + place // 3, steps=1 + place % 3) for place in range(noise.CELLS)]
    workers = [place // 3 for place in range(noise.CELLS)]
    return [levels.Panel(str(n), turns[n], workers, cells) for n in range(runs)]


@pytest.mark.parametrize("levels_", [TYPICAL, HARSH], ids=lambda each: each.name)
def test_levels_are_found_again(levels_: Levels) -> None:
    found = levels.estimate(panels(levels_, 40))
    for name in ("drift", "process", "cell", "burst_rate", "burst_mean"):
        assert found[name] == pytest.approx(getattr(levels_, name), rel=0.45), name
    assert 0.03 < (found["machine"] or 0) < 0.30  # six draws, and the drift of forty turns


def test_levels_of_runs_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(4)
    cells = [cell(decoder=decoder, steps=steps) for decoder in ("vae", "taesd") for steps in (1, 2)]
    for _ in range(2):
        rows = [
            row(each, [10.0 * np.exp(rng.normal(0, 0.005))], round_)
            for round_ in range(12)
            for each in cells
        ]
        make_run(tmp_path, rows, rounds=12)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert shell(main, ["--levels", *names, "--jobs", "500", "--runs", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "0 of 4 cells slower" in text
    assert "beyond harsh" not in text
    assert text.count("false alarms 0.000%") == 4, "ab, and compare at three sizes"


def test_a_restless_machine_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(5)
    rows = [
        row(cell(steps=steps), [10.0 * np.exp(rng.normal(0, 0.2))], round_)
        for round_ in range(12)
        for steps in (1, 2, 4)
    ]
    name = make_run(tmp_path, rows, rounds=12).name
    assert shell(main, ["--levels", name, "--jobs", "500", "--runs", str(tmp_path)]) == 5
    assert "beyond harsh" in capsys.readouterr().out
    assert shell(main, ["--levels", name, "--jobs", "500", "--runs", str(tmp_path),
                              "--format", "json"]) == 5  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == [name]
    assert found["levels"]["cell"] > 0.1
    assert found["against_the_model"]["cell"] == "beyond harsh"
    assert {line["rule"] for line in found["rules_under_these_levels"]} >= {"compare, 5 + 5 rounds"}


def test_too_few_rounds_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = make_run(tmp_path, [row(cell(), [10.0], r) for r in range(3)], rounds=3).name
    assert shell(main, ["--levels", name, "--jobs", "500", "--runs", str(tmp_path)]) == 2
    assert "--rounds 20" in capsys.readouterr().err
