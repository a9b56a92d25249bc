"""Searching: what is measured and what is dropped, on simulated noise and on real workers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import cell, make_run, row

from bench.commands.choose import main
from bench.rows.cell import Cell
from bench.rows.fields import OK
from bench.rows.store import open_run
from bench.run import search as searching
from bench.run.estimate import Past
from bench.run.plan import Plan, groups
from bench.run.regret import regret, spent_s
from bench.run.search import Search, batches_for, candidates, in_order, thinned
from bench.verdict.choosing.choice import MOST_ROUNDS, decide
from bench.verdict.choosing.contenders import Contender, contenders_of
from bench.verdict.choosing.wants import Wants, wants_of
from bench.verdict.noise import TYPICAL, simulate
from core.cli import run as shell
from export.bundle import Bundle

NOISE = 64
"""Rounds of noise that are drawn at once."""


class Machine:
    """Stands for workers: rows from the noise model, and a clock that goes on with what they take.

    Attributes:
        ms: what a call of each cell truly takes.
        start_s: seconds before a worker's first call.
    """

    def __init__(self, ms: Mapping[Cell, float], folder: Path, seed: int = 0, start_s: float = 5.0,
                 **figures: Mapping[Cell, Any]) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        self.ms, self.folder, self.start_s, self.now = ms, folder, start_s, 0.0
        self.figures, self.rows, self.turns, self.said = figures, [], 0, []
        drawn = simulate(TYPICAL, 1, NOISE, rng, 3 * len(ms))[0, :, ::3]
        self.noise = {each: drawn[:, place] for place, each in enumerate(ms)}

    def look(self, wants: Wants) -> list[Contender]:
        run = make_run(self.folder, self.rows, rounds=1)
        return contenders_of([run], wants)

    def search(self, wants: Wants, **more: Any) -> Search:
        order = Search(
            list(self.ms), wants, lambda: self.look(wants), clock=lambda: self.now,
            say=self.said.append, **more,
        )  # fmt: skip
        for turn in order.turns():
            self.turns += 1
            self.now += self.start_s
            for each in turn.cells:
                ms = self.ms[each] * math.exp(self.noise[each][turn.round])
                self.now += 3 * ms / 1e3
                own: dict[str, Any] = {name: by[each] for name, by in self.figures.items()
                                       if each in by}  # fmt: skip
                self.rows.append(row(each, [ms], turn.round, **own))
                order.note(turn, each, self.rows[-1])
        return order

    def rounds(self, of: Cell) -> int:
        return sum(Cell.of(each) == of for each in self.rows)


def cells(*options: str, **more: Any) -> list[Cell]:
    return [cell(options=each, **more) for each in options]


def test_what_is_far_behind_is_measured_once_and_close_ones_are_told_apart(tmp_path: Path) -> None:
    best, near, far = cells("c=1", "a=1", "b=1")
    machine = Machine({near: 1100.0, far: 2500.0, best: 1000.0}, tmp_path)
    order = machine.search(Wants())
    assert machine.rounds(far) == 1
    assert 3 <= machine.rounds(near) <= MOST_ROUNDS
    assert order.decision.taken is not None
    assert order.decision.taken.contender.cell == best
    assert order.decision.settled
    assert any("dropped after 1 round: null:b=1" in text and "slower" in text
               for text in machine.said)  # fmt: skip


def test_a_tie_ends_with_the_simpler_before_the_last_round(tmp_path: Path) -> None:
    simple, other = cells("", "a=1")
    machine = Machine({other: 1000.0, simple: 1000.0}, tmp_path, seed=4)
    order = machine.search(Wants())
    assert order.decision.taken is not None
    assert order.decision.taken.contender.cell == simple
    assert 5 <= machine.rounds(simple) < MOST_ROUNDS


def test_what_misses_a_limit_is_dropped_and_what_fails_is_measured_once(tmp_path: Path) -> None:
    fine, large, wrong = cells("a=1", "b=1", "c=1")
    machine = Machine(
        {large: 500.0, wrong: 400.0, fine: 1000.0}, tmp_path,
        peak_memory_mb={large: 9000.0}, status={wrong: "mismatch"},
    )  # fmt: skip
    order = machine.search(wants_of("memory<=8GB"))
    assert {each: machine.rounds(each) for each in machine.ms} == {large: 1, wrong: 1, fine: 1}
    assert order.decision.taken is not None
    assert order.decision.taken.contender.cell == fine
    assert "misses" in " ".join(machine.said)


def test_the_rounds_turn_so_that_a_drift_cancels(tmp_path: Path) -> None:
    one, other = cells("a=1", "b=1")
    order = Search([one, other], Wants(), list)
    assert order.groups(0) == [[one], [other]]
    assert order.groups(1) == [[other], [one]]


def test_a_budget_begins_nothing_that_it_has_no_room_for(tmp_path: Path) -> None:
    one, other = cells("a=1", "b=1")
    machine = Machine({one: 1000.0, other: 1001.0}, tmp_path, start_s=10.0)
    machine.search(Wants(), budget_s=60.0)
    assert 0 < machine.now <= 60.0
    assert "no room for round" in machine.said[-1]


def test_what_was_known_before_is_not_measured_again(tmp_path: Path) -> None:
    best, far = cells("a=1", "b=1")
    machine = Machine({best: 1000.0, far: 9000.0}, tmp_path)
    order = machine.search(Wants(), expected={best: 1000.0, far: 9000.0})
    assert machine.rounds(far) == 0
    assert "9.0 times the best" in order.left_out()[0]
    limited = Machine({best: 1000.0, far: 9000.0}, tmp_path, peak_memory_mb={best: 9000.0})
    order = limited.search(wants_of("memory<=8GB"), expected={best: 1000.0, far: 9000.0})
    assert limited.rounds(far) >= 1, "the fast one misses the limit: the slow one is the choice"
    assert order.decision.taken is not None


@pytest.mark.parametrize("seed", range(3))
def test_regret_and_time_against_a_grid(tmp_path: Path, seed: int) -> None:
    """Thirty candidates as a machine may have them, none known before. With calls as costly in the
    grid as in the search a round of each is a fifth of the grid by itself; a sweep takes ten
    samples a cell where a search takes one."""
    rng = np.random.default_rng(seed)
    options = [f"a={number}" for number in range(30)]
    ms = {each: 1000.0 * math.exp(spread)
          for each, spread in zip(cells(*options), rng.uniform(0, 2, 30), strict=True)}  # fmt: skip
    machine = Machine(ms, tmp_path, seed)
    order = machine.search(Wants())
    run = make_run(tmp_path, machine.rows, rounds=1)
    grid = make_run(
        tmp_path, [row(each, [ms[each]], round_) for round_ in range(5) for each in ms], rounds=5
    )
    against = regret(order.decision, run, grid)
    assert against.share <= 0.05
    assert 0.2 <= against.time_share <= 0.4
    assert against.time_share == pytest.approx(spent_s(run.rows()) / spent_s(grid.rows()))
    assert "regret" in str(against)
    swept = [row(each, [ms[each]] * 10, round_, warmup_calls=1)
             for round_ in range(5) for each in ms]  # fmt: skip
    warm = make_run(tmp_path, [dict(each, warmup_calls=1) for each in machine.rows], rounds=1)
    usual = regret(order.decision, warm, make_run(tmp_path, swept, rounds=5))
    assert usual.time_share <= 0.15


def test_regret_is_zero_for_the_best_and_says_what_is_missed(tmp_path: Path) -> None:
    one, other = cells("", "a=1")
    rows = [row(each, [ms], round_) for each, ms in ((one, 100.0), (other, 103.0))
            for round_ in range(6)]  # fmt: skip
    grid = make_run(tmp_path, rows, rounds=6)
    wants = wants_of("memory<=1GB", best="latency")
    choice = decide(contenders_of([grid], wants), wants)
    assert regret(choice, grid, grid).share == 0.0
    swapped = [row(each, [ms], round_) for each, ms in ((one, 103.0), (other, 100.0))
               for round_ in range(6)]  # fmt: skip
    assert regret(choice, grid, make_run(tmp_path, swapped, rounds=6)).share == pytest.approx(0.03)


# ---- what could be taken


def test_candidates_are_what_can_be_used_here_and_the_rest_has_a_reason() -> None:
    texts, left_out = candidates(wants_of("memory<=8GB"))
    assert {"ort", "ort:precision=int8", "ort:storage=int8", "torch"} <= {*texts}
    assert not any(text.startswith(("null", "optimum", "qnn", "qaic")) for text in texts)
    assert any(text.startswith("null: ") for text in left_out)
    assert all(": " in text for text in left_out)
    assert "ort:storage=int8" not in candidates(wants_of("latency<=1s"))[0]


def test_batches_are_tried_where_throughput_counts() -> None:
    assert batches_for(wants_of("latency<=1s")) == (1,)
    assert len(batches_for(wants_of("images/s>=1"))) > 1


def plan_of(of: Sequence[Cell]) -> Plan:
    return Plan(bundle=None, candidates=(), cells=tuple(of), method=searching.METHOD,  # type: ignore[arg-type]
                environment={})  # fmt: skip


def test_more_steps_are_tried_only_where_captions_count() -> None:
    steps = [cell(steps=count, decoder=decoder) for decoder in ("vae", "taesd")
             for count in (1, 2, 4)]  # fmt: skip
    kept, left_out = thinned(plan_of(steps), wants_of("latency<=1s"), Past({}))
    assert {each.steps for each in kept} == {1}
    assert "2, 4 steps" in left_out[0]
    assert thinned(plan_of(steps), wants_of("captions>=90%"), Past({})) == (steps, [])


def test_the_most_promising_group_goes_first() -> None:
    slow, fast, unknown = cells("a=1", "b=1", "c=1")
    order = in_order([slow, fast, unknown], {slow: 9.0, fast: 1.0})
    assert order == [fast, slow, unknown]
    assert len(groups(order)) == 3


# ---- with workers


@pytest.fixture
def choose(tiny_bundle: Bundle, tmp_path: Path) -> Callable[..., int]:
    def go(*words: str) -> int:
        return shell(main, [*words, "--runs", str(tmp_path / "runs"), "--model",
                            str(tiny_bundle.path)])  # fmt: skip

    return go


FAST = ["--backend", "null:unet_ms=300", "--steps", "1", "--decoder", "taesd", "--no-roofline"]


def test_a_search_on_workers(
    choose: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = ["--backend", "null:unet_ms=1000", "--backend", "null:fail=wrong"]
    assert choose(*FAST, *others, "--within", "psnr>=40dB", "--json") == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert "candidates, in" in told.err
    assert found["taken"]["options"] == "unet_ms=300"
    assert {each["options"]: each["state"] for each in found["contenders"]} == {
        "unet_ms=300": "taken", "unet_ms=1000": "behind", "fail=wrong": "failed",
    }  # fmt: skip
    run = open_run("latest", tmp_path / "runs")
    assert len(run.rows()) == 3, "one round tells them apart"
    assert run.header.extra["choose"]["within"] == "psnr>=40dB"
    assert {"choice.md", "table.md", "rows.jsonl"} <= {file.name for file in run.path.iterdir()}
    assert shell(main, [run.name, "--runs", str(tmp_path / "runs"), "--best", "memory"]) == 0


def test_a_search_that_was_ended_goes_on(
    choose: Callable[..., int], start: Callable[..., Any], tmp_path: Path
) -> None:
    other = ["--backend", "null:unet_ms=1000"]
    victim = start(tmp_path / "runs", *FAST, *other, module="addbench choose")
    victim.wait_for(victim.rows)
    victim.process.terminate()
    assert victim.process.wait(timeout=60) == 130
    run = open_run("latest", tmp_path / "runs")
    assert f"go on with addbench choose --resume {run.argument}" in victim.text()
    first = run.rows()
    assert [each["status"] for each in first] == [OK]
    assert choose("--resume", run.name) == 0
    assert open_run("latest", tmp_path / "runs").name == run.name
    assert {each["row"] for each in first} < {each["row"] for each in run.rows()}
    assert len(run.rows()) == 2


def test_a_budget_holds_and_what_was_not_tried_is_said(
    choose: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import time

    started = time.monotonic()
    code = choose(*FAST, "--backend", "null:unet_ms=100000", "--budget", "25s")
    assert time.monotonic() - started < 60
    out = capsys.readouterr().out
    assert "the budget was spent before" in out or code == 0
    assert code in (0, 5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["latest", "--budget", "1m"], "--budget"),
        (["latest", "--device", "x"], "--device"),
        (["latest", "--resume"], "--resume"),
        (["--resume", "latest", "--within", "latency<=1s"], "--resume"),
        (["--within", "captions>=1%", "--backend", "null"], "does not judge"),
        (["--backend", "nul"], "no backend"),
        (["--dry-run", "--save", "r.toml"], "--dry-run with --save"),
        (["--dry-run", "--resume"], "--dry-run with --resume"),
        (["latest", "--dry-run"], "--dry-run does not go with runs"),
        (["--dry-run", "--backend", "null", "--steps", "2", "--strength", "0.5"],
         "--strength does not go with a choice"),
        (["--backend", "null", "--steps", "2", "--strength", "0.5"],
         "--strength does not go with a choice"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    choose: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], said: str,
) -> None:  # fmt: skip
    assert choose(*words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_what_would_be_measured_and_writes_nothing(
    choose: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*FAST, "--backend", "null:unet_ms=1000", "--backend", "null"]
    asked += ["--within", "latency<=10s"]
    dry = [*asked, "--dry-run", "--budget", "10m"]
    assert choose(*dry) == 0
    told = capsys.readouterr().out
    assert "3 candidates, not measured now" in told
    assert "at least" in told
    assert "--budget ends it after 10 min" in told
    assert not (tmp_path / "runs").exists()
    assert choose(*asked) == 0
    run = open_run("latest", tmp_path / "runs")
    capsys.readouterr()
    assert choose(*dry) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == [
        "null", "null:unet_ms=300", "null:unet_ms=1000"
    ], "the most promising first"  # fmt: skip
    assert all(f"(run {run.name})" in line for line in lines[1:4])
    assert "left out once a faster one meets the limits" in lines[3]
    assert lines[4].startswith("about ")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]


def test_a_sweep_is_no_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, [row(cell(), [1.0])])
    assert shell(main, ["--resume", run.name, "--runs", str(tmp_path)]) == 2
    assert "no search" in capsys.readouterr().err
