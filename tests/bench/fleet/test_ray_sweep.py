"""Whole sweeps over a Ray cluster of two nodes on this machine: deaths, revisions, company."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import Cluster

from bench.fleet.drive import Drive
from bench.fleet.node import ROOMS
from bench.rows.cell import Cell
from bench.rows.store import Run, open_run, run_names
from bench.run.measure import StopRule
from bench.run.request import Request, Sampling
from core.files import ROOT
from export.bundle import Bundle

pytestmark = pytest.mark.slow
Sweep = Callable[..., int]
FAST = ["--backend", "null", "--steps", "1,2,3", "--batch", "1", "--decoder", "taesd",
        "--min-samples", "3", "--min-time", "2", "--max-time", "5", "--no-roofline"]  # fmt: skip


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver as a person starts it: nothing that a node's workers do not have either."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def runs_in(folder: Path) -> dict[str, Run]:
    runs = [open_run(name, folder) for name in run_names(folder)]
    return {str((run.header.fleet or {})["machine"]): run for run in runs}


def places(run: Run) -> list[tuple[Cell, int]]:
    return sorted((Cell.of(row), row["round"]) for row in run.all_rows())


def test_a_node_that_is_killed_in_mid_group_loses_and_doubles_nothing(
    cluster: Cluster, sweep: Sweep, tmp_path: Path
) -> None:
    def cut() -> None:
        until = time.monotonic() + 500
        while time.monotonic() < until:
            if "right" in (runs := runs_in(tmp_path)) and runs["right"].rows():
                cluster.kill("right")
                return
            time.sleep(0.2)

    killer = threading.Thread(target=cut)
    killer.start()
    over = ["--fleet", cluster.cluster.address]
    assert sweep(tmp_path, *FAST, *over) == 4
    killer.join()
    runs = runs_in(tmp_path)
    planned = sorted((cell, 0) for cell in runs["left"].plan)
    assert places(runs["left"]) == planned
    had = runs["right"].all_rows()
    assert 1 <= len(had) < len(planned)
    assert {row["status"] for row in had} == {"ok"}

    cluster.nodes["right"] = cluster.add("right")
    assert sweep(tmp_path, *over, "--resume", runs["left"].name) == 0
    runs = runs_in(tmp_path)
    assert len(runs) == 2
    assert places(runs["left"]) == places(runs["right"]) == planned
    assert runs["right"].all_rows()[: len(had)] == had


def test_a_node_of_another_revision_and_a_label_that_none_has_are_refused(
    cluster: Cluster, sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    for room in ROOMS:
        shutil.copytree(ROOT / room, other / room, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "bench" / "worker.py").open("a") as worker:
        worker.write("# another revision\n")
    cluster.nodes["other"] = cluster.add("other", PYTHONPATH=str(other))
    runs = tmp_path / "runs"
    over = ["--fleet", cluster.cluster.address]
    assert sweep(runs, *FAST, *over) == 2
    said = capsys.readouterr().err
    assert "other cannot take part" in said
    assert "another revision" in said
    assert sweep(runs, *FAST, *over, "--on", "device=h100") == 2
    assert "device=cpu-left,name=left" in capsys.readouterr().err
    assert not runs.exists()
    cluster.kill("other")


def test_two_sweeps_at_once_take_turns(
    cluster: Cluster, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    request = Request(
        str(tiny_bundle.path), backends=("null",), steps=(1, 2), decoders=("taesd",),
        method=Sampling(StopRule(min_samples=3, min_time=0.5, max_time=5.0), rounds=2),
    )  # fmt: skip

    def one() -> None:
        drive = Drive(cluster.fleet, cluster.fleet.machines())
        drive.sweep(drive.plans(request), tmp_path, ["test"], timeout_s=500, ceilings=False)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    seen: set[str] = set()
    while any(thread.is_alive() for thread in threads):
        seen |= {title for each in cluster.fleet.machines() for title in each.running}
        time.sleep(0.2)
    runs = [open_run(name, tmp_path) for name in run_names(tmp_path)]
    assert len(runs) == 4
    for run in runs:
        assert places(run) == sorted((cell, round_) for cell in run.plan for round_ in range(2))
        assert {row["run"] for row in run.rows()} == {run.name}
        assert any(title.startswith(run.name) for title in seen)


def test_a_sweep_through_submitit(sweep: Sweep, tmp_path: Path, tiny_bundle: Bundle) -> None:
    """Its local executor: the jobs are real, and Slurm is not there."""
    pytest.importorskip("submitit", reason="submitit is not installed: the extra `slurm`")
    assert sweep(tmp_path, *FAST, "--fleet", "local") == 0
    (run,) = runs_in(tmp_path).values()
    assert places(run) == sorted((cell, 0) for cell in run.plan)
    assert {row["bundle_hash"] for row in run.rows()} == {tiny_bundle.hash}


def test_ceilings_are_those_of_the_node(cluster: Cluster, sweep: Sweep, tmp_path: Path) -> None:
    words = [word for word in FAST if word != "--no-roofline"]
    words[words.index("null")] = "ort"
    over = ["--fleet", cluster.cluster.address, "--on", "name=left"]
    assert sweep(tmp_path, *words, *over) == 0
    (run,) = runs_in(tmp_path).values()
    assert run.header.roofline
    assert all(row["roofline"] for row in run.rows())
