"""What ends a sweep from outside: nothing measured is lost, no worker stays, resume goes on."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from made import gone

from bench.cell import Cell
from bench.store import ROWS, open_run, run_names

STEPS = ["--backend", "null", "--decoder", "taesd", "--steps", "1,2,4"]
SLOW = [*STEPS, "--min-samples", "3", "--min-time", "1.5", "--max-time", "5"]
"""A second and a half a cell: time to be interrupted between the first row and the last."""


def test_a_killed_sweep_keeps_its_rows_and_is_resumed(
    start: Callable[..., Any], sweep: Callable[..., int], tmp_path: Path
) -> None:
    victim = start(tmp_path, *SLOW)
    victim.wait_for(victim.rows)
    workers = victim.workers()
    assert workers
    victim.process.kill()
    victim.process.wait()
    assert all(gone(pid) for pid in workers)
    run = open_run("latest", tmp_path)
    kept = run.all_rows()
    assert 1 <= len(kept) < 3
    # As if the kill had come while a row was being written.
    with (run.path / ROWS).open("ab") as file:
        file.write(b'{"schema": 1, "row": "torn')
    assert sweep(tmp_path, "--resume") == 0
    rows = run.all_rows()
    assert rows[: len(kept)] == kept
    assert [Cell.of(row).steps for row in rows] == [1, 2, 4]


def test_ctrl_c_ends_one_of_two_sweeps(start: Callable[..., Any], tmp_path: Path) -> None:
    victim = start(tmp_path, *SLOW)
    other = start(tmp_path, *SLOW)  # into the same folder: each has a run of its own
    victim.wait_for(lambda: "[1/3]" in victim.text())
    workers = victim.workers()
    assert workers
    os.killpg(victim.process.pid, signal.SIGINT)  # as a terminal does; the worker is not in it
    assert victim.process.wait(timeout=30) == 130
    assert all(gone(pid) for pid in workers)
    text = victim.text()
    assert "interrupted: 1 of 3 cells are kept" in text
    assert "Traceback" not in text
    run = open_run(re.search(r"--resume (\S+)", text)[1], tmp_path)  # type: ignore[index]
    assert [row["steps"] for row in run.rows()] == [1]
    assert other.process.wait(timeout=120) == 0, other.text()
    runs = [open_run(name, tmp_path) for name in run_names(tmp_path)]
    assert sorted(len(found.rows()) for found in runs) == [1, 3]


def test_sigterm_ends_it_too(start: Callable[..., Any], tmp_path: Path) -> None:
    victim = start(tmp_path, *SLOW)
    victim.wait_for(lambda: "loading" in victim.text() and victim.workers())
    workers = victim.workers()
    victim.process.terminate()
    assert victim.process.wait(timeout=30) == 130
    assert all(gone(pid) for pid in workers)
