"""What a fleet adds: the same cells with its engine and without, in alternating rounds.

Both ways measure on this machine, which must be in the fleet. Their samples must agree by the rule
of `addbench ab`, and a group may take little longer through the engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.fleet.drive import Drive
from bench.fleet.protocol import Fleet, Machine
from bench.machine.environment import git_state
from bench.rows.cell import Cell
from bench.rows.store import create_run
from bench.run import spawn
from bench.run.orders import BASE, HEAD, Trial
from bench.run.plan import Plan
from bench.run.progress import Display
from bench.run.request import Request
from bench.run.runner import Results, Runner, Seat, Side
from bench.verdict.outcome import FASTER, SLOWER, Outcome
from core.errors import PreconditionError
from core.machine import this_machine

LIMIT_S = 2.0
"""Seconds that a group may take longer through the engine."""
RULE = (
    "base: a process of this machine; head: the same through the fleet. slower, faster: over"
    " alternating rounds, by the rule of addbench ab."
)


@dataclass
class Timed:
    """What measures a job, with how long every job took it."""

    measure: Results
    seconds: list[float] = field(default_factory=list)

    def __call__(
        self, job: spawn.Job, limits: spawn.Limits, view: spawn.View
    ) -> Generator[tuple[Cell, spawn.Result], None, None]:
        began = time.monotonic()
        yield from self.measure(job, limits, view)
        self.seconds.append(time.monotonic() - began)


def compare_ways(
    fleet: Fleet,
    machine: Machine,
    request: Request,
    runs: Path,
    command: Sequence[str],
    *,
    max_slowdown: float,
    timeout_s: float,
    say: Callable[[str], None] = print,
) -> tuple[Outcome, dict[str, Any]]:
    """Measure both ways; the verdict on the samples, and what a group took each way.

    Raises:
        PreconditionError: the machine is another one.
    """
    drive = Drive(fleet, [machine])
    (plan,) = drive.plans(request)
    if plan.environment["machine"] != this_machine():
        raise PreconditionError(
            f"{machine.name} is not this machine",
            "with the fleet and without must differ in nothing else",
            "join this machine to the fleet, and choose it with --on",
        )
    (post,) = drive.posts
    direct, through = Timed(spawn.results), Timed(post.results)
    commit = post.seat.commit or git_state()
    seats = [Seat(commit=commit, results=direct), replace(post.seat, results=through)]
    sides = [side(plan, runs, command, name, seat)
             for name, seat in zip(("base", "head"), seats, strict=True)]  # fmt: skip
    cells, rounds = plan.cells, plan.method.rounds
    trial = Trial(cells, rounds, max_slowdown, float("inf"), say=say)
    with Runner(sides, Display(2 * rounds * len(cells), rounds), timeout_s=timeout_s) as runner:
        runner.measure(trial.turns(), trial.note)
    medians = [statistics.median(way.seconds) for way in (direct, through)]
    added = [b - a for a, b in zip(direct.seconds, through.seconds, strict=False)]
    told = {line.verdict for line in trial.lines}
    record = {
        "direct_s": direct.seconds,
        "through_s": through.seconds,
        "added_s": statistics.median(added),
        "limit_s": LIMIT_S,
        "verdicts": [line.verdict for line in trial.lines],
        "runs": [each.run.name for each in sides],
        "within": statistics.median(added) <= LIMIT_S and not told & {SLOWER, FASTER},
    }
    notes = [
        f"a group took {medians[BASE]:.2f} s here and {medians[HEAD]:.2f} s through the fleet:"
        f" {record['added_s']:+.2f} s in the median of {len(added)} pairs, of {LIMIT_S:g} s allowed"
    ]
    outcome = Outcome("here", f"through {machine.name}", RULE, trial.lines, notes)
    return outcome, record


def side(plan: Plan, runs: Path, command: Sequence[str], name: str, seat: Seat) -> Side:
    """One way, with a run of its own."""
    commit = dict(seat.commit or {})
    run = create_run(runs, plan.header(command, ab={"side": name, "commits": []}, **commit))
    return Side(plan, run, name, seat)
