"""Worker processes from the parent's side: start, wait, bury. The parent does nothing else."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from backends.artifacts.child import HOME_PYTHON, environment_for
from bench.rows.cell import Cell
from bench.run.measure import StopRule
from bench.worker import LAST_STATUSES, PROTOCOL
from core.files import ROOT
from core.process import end_group, obituary, oom_kills

Result = dict[str, Any]
"""Status and figures of one row, as the worker gave them."""


class BudgetSpentError(Exception):
    """The sweep's time is up; the worker has been ended."""


MAX_SLEEP_S = 60.0
GRACE_S = 10.0
"""What a worker that closed its output may still take to end by itself."""


class View(Protocol):
    """What the waiting parent tells a person. Called at most once a second while a cell runs."""

    redraws: bool
    """Whether `tick` wants to be called every second; if not, the parent sleeps until news."""

    def loading(self, cells: Sequence[Cell], round_: int) -> None: ...
    def begin(self, cell: Cell) -> None: ...
    def sampled(self, count: int, captions: int | None) -> None: ...
    def tick(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """One group of cells in one round."""

    bundle: Path
    backend: str
    interpreter: Path
    cells: Sequence[Cell]
    round: int
    rule: StopRule
    log: Path
    """Where the worker's stderr goes, appended."""
    root: Path = ROOT
    """The checkout whose worker runs."""
    build: Path | None = None
    """Its ADDBENCH_BUILD; None for this process's own."""
    home: Path = Path(sys.executable)
    """The interpreter of the project's own environment, where `interpreter` is another's."""


@dataclass(frozen=True)
class Limits:
    """Seconds that loading, or one cell, may take; the moment (monotonic) at which all must end."""

    timeout_s: float
    deadline: float | None


class Child:
    """A worker process in a process group of its own, so that Ctrl-C reaches only the parent."""

    def __init__(self, job: Job, cells: Sequence[Cell]) -> None:
        self.oom_kills = oom_kills()
        request = {
            "protocol": PROTOCOL,
            "parent": os.getpid(),
            "bundle": str(job.bundle),
            "backend": job.backend,
            "cells": [cell.columns() for cell in cells],
            "rule": job.rule.columns(),
        }
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self.pipe, write_end = os.pipe()
        with tempfile.TemporaryFile() as stdin, job.log.open("ab") as log:
            stdin.write(json.dumps(request).encode())
            stdin.seek(0)
            try:
                self.process = subprocess.Popen(
                    [str(job.interpreter), "-m", "bench.worker"],
                    stdin=stdin,
                    stdout=write_end,
                    stderr=log,
                    cwd=job.root,
                    env=environment_of(job),
                    process_group=0,
                )
            except BaseException:
                os.close(self.pipe)
                raise
            finally:
                os.close(write_end)
        self.lines: deque[bytes] = deque()
        self.partial = b""

    def next(self, until: float, view: View) -> dict[str, Any] | None:
        """The worker's next message, or None at its end.

        Raises:
            TimeoutError: none by `until` (monotonic).
        """
        while not self.lines:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            wait = min(left, 1.0 if view.redraws else MAX_SLEEP_S)
            if select.select([self.pipe], [], [], wait)[0]:
                piece = os.read(self.pipe, 1 << 16)
                if not piece:
                    return None
                *whole, self.partial = (self.partial + piece).split(b"\n")
                self.lines.extend(whole)
            view.tick()
        message: dict[str, Any] = json.loads(self.lines.popleft())
        return message

    def end(self, grace_s: float = 0.0) -> int:
        """The worker's exit status; what of it and its children is left after `grace_s` is killed.

        Calling it again does nothing.
        """
        if self.process.returncode is None:
            end_group(self.process, grace_s)
            os.close(self.pipe)
        return self.process.returncode


def with_build(build: Path) -> dict[str, str]:
    """This process's environment with bundles and cache elsewhere."""
    return {**os.environ, "ADDBENCH_BUILD": str(build)}


def environment_of(job: Job) -> dict[str, str]:
    """The worker's variables. In another environment it is told where the project's own is, and
    nothing that would give it our packages."""
    found = environment_for(job.interpreter, job.home) | {HOME_PYTHON: str(job.home)}
    return found if job.build is None else found | {"ADDBENCH_BUILD": str(job.build)}


def not_started(job: Job, error: OSError) -> Result:
    """The result of cells whose interpreter, that of another environment most likely, is gone."""
    return {
        "status": "unavailable",
        "error": {
            "type": "UnavailableError",
            "what": f"the worker of {job.backend} could not be started",
            "why": f"{job.interpreter}: {error.strerror or error}",
            "next": "`addbench backends` says how its environment is made",
        },
    }


def timed_out(timeout_s: float, loading: bool) -> Result:
    what = "compile and load" if loading else "the cell"
    return {
        "status": "timeout",
        "error": {
            "type": "Timeout",
            "what": f"{what} did not end within {timeout_s:g} s, and the worker was killed",
            "why": "it hangs, or it is slower than --timeout allows",
            "next": "raise --timeout, or leave the cell out",
        },
    }


def results(job: Job, limits: Limits, view: View) -> Generator[tuple[Cell, Result], None, None]:
    """Measure a group: every cell of it with its result, as each is done.

    A cell that takes its worker down is the last one of that process; those after it get a fresh
    one. What fails before the first cell (compile, load) is the result of every cell.

    Raises:
        BudgetSpentError: `limits.deadline` has come; the cell at work is lost.
    """
    pending = list(job.cells)
    while pending:
        view.loading(pending, job.round)
        try:
            child = Child(job, pending)
        except OSError as error:
            for cell in pending:
                yield cell, not_started(job, error)
            return
        try:
            done = yield from one_process(child, job, pending, limits, view)
        finally:
            child.end()
        pending = pending[done:]


def one_process(
    child: Child, job: Job, cells: Sequence[Cell], limits: Limits, view: View
) -> Generator[tuple[Cell, Result], None, int]:
    """The results that one worker gives before it ends; returns how many."""
    shared: Result | None = None
    done = 0
    while True:
        until = time.monotonic() + limits.timeout_s
        try:
            message = next_step(child, until, limits, view)
        except TimeoutError:
            result = timed_out(limits.timeout_s, loading=shared is None)
            break
        if message is None:
            result = obituary(child.end(GRACE_S), child.oom_kills, f"logs/{job.log.name}")
            break
        if message["event"] == "loaded":
            shared = message["shared"]
        elif message["event"] == "begin":
            view.begin(cells[done])
        elif message["event"] == "refused":
            result = message["result"]
            break
        else:
            yield cells[done], message["result"]
            done += 1
            if done == len(cells) or message["result"]["status"] in LAST_STATUSES:
                child.end(GRACE_S)
                return done
    victims = cells if shared is None else cells[done : done + 1]
    for cell in victims:
        yield cell, result | (shared or {})
    return done + len(victims)


def next_step(child: Child, until: float, limits: Limits, view: View) -> dict[str, Any] | None:
    """The next message that is more than a sample's: progress does not extend the timeout."""
    while True:
        soonest = until if limits.deadline is None else min(until, limits.deadline)
        try:
            message = child.next(soonest, view)
        except TimeoutError:
            if soonest < until:
                raise BudgetSpentError from None
            raise
        if message is None or message["event"] != "sample":
            return message
        view.sampled(message["count"], message.get("captions"))
