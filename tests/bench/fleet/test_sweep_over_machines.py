"""Sweeps over machines of a fleet whose engine is a double: plans, refusals, deaths, resuming."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fleet_double import FleetDouble

from bench.commands import fleet as fleet_command
from bench.fleet import drive, engines, node
from bench.fleet.protocol import Call
from bench.rows.cell import Cell
from bench.rows.store import Run, open_run, run_names, with_siblings
from bench.verdict.compare import compare, on_one_machine
from core.cli import run as shell
from core.errors import PreconditionError
from export.bundle import Bundle

Sweep = Callable[..., int]
FAST = ["--backend", "null", "--steps", "1,2", "--batch", "1", "--decoder", "taesd",
        "--min-samples", "3", "--min-time", "0.01", "--max-time", "5", "--no-roofline"]  # fmt: skip


@pytest.fixture
def over(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Type `addbench sweep --fleet double ...` with a double of the engine; the exit code."""

    def run(fleet: FleetDouble, *arguments: str) -> int:
        monkeypatch.setattr(engines, "fleet_at", lambda _: fleet)
        # The usual --patience 0 of these tests is what a fleet has anyway.
        words = ["--fleet", "double", *arguments]
        return sweep(tmp_path, *(words if "--resume" in words else [*FAST, *words]))

    return run


def runs_in(folder: Path) -> dict[str, Run]:
    """The runs of a folder by the machine that they are of."""
    runs = [open_run(name, folder) for name in run_names(folder)]
    return {str((run.header.fleet or {})["machine"]): run for run in runs}


def places(run: Run) -> list[tuple[Cell, int]]:
    """What every row on disk is of; a cell that was measured twice stands there twice."""
    return [(Cell.of(row), row["round"]) for row in run.all_rows()]


def test_each_machine_measures_the_whole_plan_in_a_run_of_its_own(
    over: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = FleetDouble("left", "right")
    assert over(fleet, "--price", "left=2/h") == 0
    runs = runs_in(tmp_path)
    assert set(runs) == {"left", "right"}
    for name, run in runs.items():
        assert sorted(places(run)) == sorted((cell, 0) for cell in run.plan)
        assert {row["status"] for row in run.rows()} == {"ok"}
        assert {row["bundle_hash"] for row in run.rows()} == {run.header.bundle["hash"]}
        assert all(row["git_commit"] == run.header.git_commit for row in run.rows())
        assert (run.header.fleet or {})["labels"] == {"name": name}
        assert list((run.path / "logs").iterdir())
    assert {each.name for each in with_siblings(runs["left"])} == {
        each.name for each in runs.values()
    }
    out = capsys.readouterr().out
    assert "left (ms)" in out
    assert "right (ms)" in out
    assert "left images/USD" in out
    assert "right images/USD" not in out
    assert "as given" in out


def test_machines_of_one_image_are_two_to_comparisons(
    over: Callable[..., int], tmp_path: Path
) -> None:
    """Both ran here, so their hashes are equal: their names say that they are two."""
    over(FleetDouble("left", "right"))
    left, right = runs_in(tmp_path).values()
    assert not on_one_machine(left, right)
    with pytest.raises(PreconditionError, match="different machines"):
        compare(left, right, 0.05, False)
    outcome = compare(left, right, 1e-6, True)
    assert outcome.exit_code == 0 or not outcome.accusing


def test_what_a_dead_machine_did_not_give_is_missing_and_resumed(
    over: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = FleetDouble("left", "right")
    fleet.dies["right"] = 1
    assert over(fleet) == 4
    runs = runs_in(tmp_path)
    assert len(places(runs["left"])) == 2
    assert len(places(runs["right"])) == 1
    assert {row["status"] for row in runs["right"].rows()} == {"ok"}
    said = capsys.readouterr().err
    assert "right is gone" in said
    assert "1 cell missing" in said
    command = next(line for line in said.splitlines() if "go on with" in line)
    resumed = command.partition("--resume ")[2].split()[0]

    assert over(fleet, "--resume", resumed) == 4  # it is away: what it lacks stays missing
    assert "1 cell missing, the machine is not there" in capsys.readouterr().err
    fleet.dies.clear()
    assert over(fleet, "--resume", resumed) == 0
    for run in runs_in(tmp_path).values():
        assert sorted(places(run)) == sorted((cell, 0) for cell in run.plan)


def test_an_impossible_selector_is_refused_with_the_labels_that_there_are(
    over: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = FleetDouble("left", "right", device="cpu")
    assert over(fleet, "--on", "device=h100") == 2
    said = capsys.readouterr().err
    assert "left (device=cpu,name=left)" in said
    assert "right (device=cpu,name=right)" in said
    assert not fleet.titles
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("selector", ["device", "=cpu", "device=", "device=a||b", ""])
def test_what_is_no_selector_is_refused(over: Callable[..., int], selector: str) -> None:
    assert over(FleetDouble("left"), "--on", selector) == 2


def test_a_selector_takes_one_of_several_values(over: Callable[..., int], tmp_path: Path) -> None:
    assert over(FleetDouble("a", "b", "c"), "--on", "name=a|c") == 0
    assert set(runs_in(tmp_path)) == {"a", "c"}


def changed(call: Call) -> Call:
    """The call, whose answers are those of another revision."""

    def run() -> Iterator[Any]:
        for message in call():
            known = isinstance(message, node.CodeState)
            yield replace(message, code="0" * 64) if known else message

    return run


def test_a_machine_of_another_revision_is_refused_by_name(
    over: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = FleetDouble("left", "right")
    fleet.wraps["right"] = changed
    assert over(fleet) == 2
    said = capsys.readouterr().err
    assert "right cannot take part" in said
    assert "another revision" in said
    assert not list(tmp_path.iterdir())


def test_a_machine_that_does_not_know_what_it_is_asked_is_refused(
    over: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(_call: Call) -> Call:
        def run() -> Iterator[Any]:
            raise ModuleNotFoundError("No module named 'bench.fleet'")
            yield

        return run

    fleet = FleetDouble("old")
    fleet.wraps["old"] = unknown
    assert over(fleet) == 2
    assert "does not know what it is asked" in capsys.readouterr().err


def test_two_sweeps_share_machines_and_mix_nothing(tiny_bundle: Bundle, tmp_path: Path) -> None:
    from bench.run.measure import StopRule
    from bench.run.request import Request, Sampling

    fleet = FleetDouble("left", "right")
    request = Request(
        str(tiny_bundle.path), backends=("null",), steps=(1, 2), decoders=("taesd",),
        method=Sampling(StopRule(min_samples=3, min_time=0.01, max_time=5.0), rounds=2),
    )  # fmt: skip

    def one() -> None:
        each = drive.Drive(fleet, fleet.machines())
        each.sweep(each.plans(request), tmp_path, ["test"], timeout_s=300, ceilings=False)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = [open_run(name, tmp_path) for name in run_names(tmp_path)]
    assert len(runs) == 4
    assert len({(run.header.fleet or {})["sweep"] for run in runs}) == 2
    for run in runs:
        assert sorted(places(run)) == sorted((c, r) for c in run.plan for r in range(2))
        assert {row["run"] for row in run.rows()} == {run.name}
    assert set(fleet.alone.values()) == {1}


def test_a_spent_budget_ends_the_call_on_the_machine(over: Callable[..., int]) -> None:
    fleet = FleetDouble("left")
    assert over(fleet, "--budget", "0.01s") == 4
    assert fleet.busy["left"] == 0


def test_an_interrupt_ends_the_calls_everywhere_and_keeps_the_rows(
    over: Callable[..., int], tmp_path: Path
) -> None:
    def cut(call: Call) -> Call:
        def run() -> Iterator[Any]:
            for message in call():
                yield message
                if isinstance(message, tuple):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(2)

        return run

    fleet = FleetDouble("left", "right")
    fleet.wraps["left"] = cut
    assert over(fleet, "--min-time", "3") == 130
    assert len(places(runs_in(tmp_path)["left"])) == 1
    until = time.monotonic() + 30
    while fleet.busy["right"] or fleet.busy["left"]:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("words", [["--on", "name=left"], ["--price", "left=2/h"]])
def test_what_is_of_a_fleet_needs_one(sweep: Sweep, tmp_path: Path, words: list[str]) -> None:
    assert sweep(tmp_path, *FAST, *words) == 2


def test_the_list_of_a_fleet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = FleetDouble("left", "right", device="cpu")
    fleet.all[1] = replace(fleet.all[1], running=("RUN null-taesd-b1-r0",))
    monkeypatch.setattr(engines, "fleet_at", lambda _: fleet)
    assert shell(fleet_command.main, ["--format", "json"]) == 0
    left, right = json.loads(capsys.readouterr().out)
    assert left == {"machine": "left", "labels": "device=cpu,name=left", "hardware": "a double",
                    "running": ""}  # fmt: skip
    assert right["running"] == "RUN null-taesd-b1-r0"
    assert shell(fleet_command.main, ["--on", "name=right"]) == 0
    assert "left" not in capsys.readouterr().out
    fleet.all.clear()
    assert shell(fleet_command.main, []) == 0
    assert "no machine measures" in capsys.readouterr().out


# ---- the bundle on a machine


def test_a_bundle_that_lies_elsewhere_is_found_by_its_content(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's path means nothing there."""
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    (tmp_path / "tiny-sdxl-random-fp16").symlink_to(tiny_bundle.path)
    away = Bundle(Path("/nowhere"), tiny_bundle.manifest)
    assert node.bundle_here(away).hash == tiny_bundle.hash


def test_a_bundle_that_comes_out_different_is_refused(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    files = {**tiny_bundle.manifest["files"]}
    other = Bundle(Path("/nowhere"), {**tiny_bundle.manifest, "files": {**files, "more": {
        "sha256": "0" * 64, "bytes": 1}}})  # fmt: skip
    monkeypatch.setattr(node, "exported", lambda *_: tiny_bundle)
    with pytest.raises(PreconditionError, match="is another") as refused:
        node.bundle_here(other)
    assert "1 files differ: more" in refused.value.why


@pytest.mark.slow
def test_a_bundle_is_made_again_from_its_manifest(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    made = node.bundle_here(Bundle(Path("/nowhere"), tiny_bundle.manifest))
    assert made.hash == tiny_bundle.hash
    assert made.path.is_relative_to(tmp_path)
