"""What ends a sweep from outside: nothing measured is lost, no worker stays, resume goes on."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from made import gone

from bench.rows.cell import Cell
from bench.rows.store import ROWS, open_run, run_names

STEPS = ["--decoder", "taesd", "--steps", "1,2,4", "--min-samples", "3", "--min-time", "0.01"]
STUCK = ["--backend", "null:at=10,fail=hang", *STEPS]
"""Five calls a cell: the third cell hangs until it is ended. In a fresh process it would not."""


def test_a_killed_sweep_keeps_its_rows_and_is_resumed(
    start: Callable[..., Any], sweep: Callable[..., int], tmp_path: Path
) -> None:
    victim = start(tmp_path, *STUCK)
    victim.wait_for(lambda: "[2/3]" in victim.text())
    workers = victim.workers()
    assert workers
    victim.process.kill()
    victim.process.wait()
    assert all(gone(pid) for pid in workers)
    run = open_run("latest", tmp_path)
    kept = run.all_rows()
    assert [row["steps"] for row in kept] == [1, 2]
    # As if the kill had come while a row was being written.
    with (run.path / ROWS).open("ab") as file:
        file.write(b'{"schema": 1, "row": "torn')
    assert sweep(tmp_path, "--resume") == 0
    rows = run.all_rows()
    assert rows[:2] == kept
    assert [Cell.of(row).steps for row in rows] == [1, 2, 4]


def test_ctrl_c_ends_one_of_two_sweeps(start: Callable[..., Any], tmp_path: Path) -> None:
    victim = start(tmp_path, *STUCK)
    other = start(tmp_path, "--backend", "null", *STEPS)  # same folder: each has its own run
    victim.wait_for(lambda: "[2/3]" in victim.text())
    workers = victim.workers()
    assert workers
    os.killpg(victim.process.pid, signal.SIGINT)  # as a terminal does; the worker is not in it
    assert victim.process.wait(timeout=60) == 130
    assert all(gone(pid) for pid in workers)
    text = victim.text()
    assert "interrupted: 2 of 3 cells are kept" in text
    assert "Traceback" not in text
    found = re.search(r"--resume (\S+)", text)
    assert found
    run = open_run(found[1], tmp_path)
    assert [row["steps"] for row in run.rows()] == [1, 2]
    assert other.process.wait(timeout=120) == 0, other.text()
    runs = [open_run(name, tmp_path) for name in run_names(tmp_path)]
    assert sorted(len(one.rows()) for one in runs) == [2, 3]


def test_sigterm_ends_it_too(start: Callable[..., Any], tmp_path: Path) -> None:
    victim = start(tmp_path, *STUCK)
    victim.wait_for(lambda: "loading" in victim.text() and victim.workers())
    workers = victim.workers()
    victim.process.terminate()
    assert victim.process.wait(timeout=60) == 130
    assert all(gone(pid) for pid in workers)
