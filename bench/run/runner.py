"""The one loop: turns in an order, a worker for each, every row on disk before the next cell."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

from bench.limits.floors import beaten, measured_again, of_row
from bench.limits.modelled import figures_apart
from bench.machine.environment import git_state
from bench.rows.cell import Cell
from bench.rows.fields import MODELLED, NUMERICS, OK
from bench.rows.store import Row, RowWriter, Run, create_run, make_row
from bench.run import spawn
from bench.run.estimate import past, survey, with_rounds
from bench.run.orders import Turn, round_by_round
from bench.run.patience import again
from bench.run.plan import Candidate, Plan
from bench.run.progress import Display
from core.amounts import count_text
from core.files import ROOT

Listener = Callable[[Turn, Cell, Row], None]
Results = Callable[
    [spawn.Job, spawn.Limits, spawn.View], Generator[tuple[Cell, spawn.Result], None, None]
]


@dataclass(frozen=True)
class Seat:
    """Where a side's workers run.

    Attributes:
        interpreter: of the project's own environment; a backend may bring another.
        root: the checkout whose worker runs.
        build: its ADDBENCH_BUILD; None for this process's own.
        commit: `git_commit` and `git_dirty` of its rows; None for those of this checkout, each
            time a worker starts.
        results: what measures a job there; None for a process of this machine.
        look_again: what measures ceilings there again; None for this machine's.
    """

    interpreter: Path = Path(sys.executable)
    root: Path = ROOT
    build: Path | None = None
    commit: Mapping[str, Any] | None = None
    results: Results | None = None
    look_again: Callable[..., dict[str, Any]] | None = None


@dataclass
class Side:
    """A plan, the run that its rows go to, and where its workers run."""

    plan: Plan
    run: Run
    name: str = ""
    seat: Seat = Seat()
    modelled: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    """Figures of its modelled cells, all at once when the first is asked for."""
    surveyed: Mapping[str, Any] | None = None
    """What rows are held against, once a ceiling was measured again; until then the plan's."""
    looked_at: set[str] = field(default_factory=set)
    """Ceilings that were measured again, once each."""

    def model(self) -> None:
        """Work out the figures of every modelled cell, once."""
        cards = [cell for cell in self.plan.cells if self.plan.candidate(cell).modelled]
        if cards and not self.modelled:
            self.modelled = figures_apart(cards, self.plan.bundle)

    @property
    def roofline(self) -> Mapping[str, Any] | None:
        return self.surveyed or self.plan.roofline

    def doubt(self, rows: Sequence[Row], say: Callable[[str], None]) -> None:
        """Measure the ceilings again that rows show to be too low. The rows to come are held
        against the better ones, and the header says them, so that tables hold all rows to them.
        """
        low = beaten(rows, self.roofline) if self.roofline else {}
        names = [name for name in low if name not in self.looked_at]
        if not names or self.roofline is None:
            return
        say(f"a stage is faster than the ceiling of {', '.join(names)}: measuring it again")
        self.looked_at |= {*names}
        look_again = self.seat.look_again or measured_again
        self.surveyed = look_again(self.roofline, names)
        self.run = self.run.with_header(replace(self.run.header, roofline=self.surveyed))


class Runner:
    """Measures turns of one or two sides. Use as a context manager: it holds the runs' locks.

    Args:
        budget_s: seconds from now until everything ends; None for no end.
        timeout_s: seconds that loading, or one cell, may take.
        go_on: the words that a person types to go on with what was interrupted.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        display: Display,
        *,
        timeout_s: float,
        budget_s: float | None = None,
        go_on: str = "",
    ) -> None:
        deadline = None if budget_s is None else time.monotonic() + budget_s
        self.sides, self.display, self.go_on = sides, display, go_on
        self.limits = spawn.Limits(timeout_s, deadline)
        self.writers: list[RowWriter] = []
        self.stack = ExitStack()

    def __enter__(self) -> Runner:
        with ExitStack() as stack:
            for side in self.sides:
                self.writers.append(stack.enter_context(RowWriter(side.run.path)))
            stack.enter_context(self.display)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def measure(self, turns: Iterable[Turn], listener: Listener = lambda *_: None) -> bool:
        """Measure every turn; whether the budget was spent before the last one.

        Args:
            listener: is given each row once it is on disk, before the next turn is asked for.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM. The worker has been ended, all rows are kept.
        """
        with sigterm_as_ctrl_c():
            try:
                for turn in turns:
                    for cell, row in self.rows(turn):
                        self.writers[turn.side].append(row)
                        self.display.finished(row)
                        listener(turn, cell, row)
            except spawn.BudgetSpentError:
                return True
            except KeyboardInterrupt:
                kept = f"{self.display.done} of {self.display.total} cells are kept"
                self.display.say(f"interrupted: {kept}" + (self.go_on and f"; {self.go_on}"))
                raise
        return False

    def rows(self, turn: Turn) -> Iterator[tuple[Cell, Row]]:
        """The rows of one turn, each as its cell is done."""
        side = self.sides[turn.side]
        plan, candidate = side.plan, side.plan.candidate(turn.cells[0])
        context = {
            "run": side.run.name,
            "bundle_hash": plan.bundle.hash,
            "provenance": candidate.provenance,
            **(side.seat.commit or git_state()),
        }
        if candidate.modelled:
            side.model()
        known = without_worker(side, candidate, turn.cells)
        if known is not None:
            for cell in turn.cells:
                yield cell, make_row(cell, turn.round, context, known[cell])
            return
        if self.limits.deadline is not None and time.monotonic() >= self.limits.deadline:
            raise spawn.BudgetSpentError
        self.display.side = side.name
        measured_by = side.seat.results or spawn.results
        with closing(measured_by(job_of(side, candidate, turn), self.limits, self.display)) as (
            stream
        ):
            measured = []
            for cell, result in stream:
                if cell in side.modelled:
                    result = with_image(side.modelled[cell], result)
                if side.roofline:
                    result["roofline"] = of_row(result, cell, side.roofline)
                measured.append(make_row(cell, turn.round, context, result))
                yield cell, measured[-1]
        side.doubt(measured, self.display.say)  # its worker is gone


def job_of(side: Side, candidate: Candidate, turn: Turn) -> spawn.Job:
    """What a worker is told about a turn."""
    first, backend = turn.cells[0], candidate.backend
    recipe = first.recipe_text.replace(" ", "-")
    name = f"{candidate.key}-{first.decoder}-b{first.batch}-r{turn.round}"
    name += f"-{recipe}" if recipe else ""
    return spawn.Job(
        bundle=side.plan.bundle.path,
        backend=candidate.text,
        interpreter=(backend and backend.interpreter) or side.seat.interpreter,
        cells=turn.cells,
        round=turn.round,
        rule=side.plan.method.rule.of_round(turn.round),
        log=side.run.path / "logs" / f"{name.replace(':', '-').replace('/', '-')}.log",
        root=side.seat.root,
        build=side.seat.build,
        home=side.seat.interpreter,
    )


def without_worker(
    side: Side, candidate: Candidate, cells: Sequence[Cell]
) -> dict[Cell, dict[str, Any]] | None:
    """The results of cells that need no worker, or None where they do.

    They are those of an unusable backend, and of a modelled card whose images are not wanted or
    that has no figures.
    """
    found = candidate.found
    if not found.usable or candidate.backend is None:
        words = {"what": found.what, "why": found.why, "next": found.next}
        error = {"type": "UnavailableError", **words}
        return {cell: {"status": "unavailable", "error": error} for cell in cells}
    if not candidate.modelled:
        return None
    if side.plan.images and side.modelled[cells[0]]["status"] == OK:
        return None
    return {cell: side.modelled[cell] for cell in cells}


def with_image(modelled: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """A modelled cell with what the worker found that made its images: status, check, NFE."""
    kept = {name: result[name] for name in (*NUMERICS, "time_utc", "status") if name in result}
    if result["status"] in (OK, "mismatch"):
        return {**modelled, **kept}
    return {"provenance": MODELLED, **kept}


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM ends what runs inside as Ctrl-C does: worker ended, terminal restored."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, as in a notebook's kernel: it keeps what it has
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def sweep(
    plan: Plan,
    runs: Path,
    command: Sequence[str],
    resumed: Run | None = None,
    *,
    timeout_s: float,
    budget_s: float | None = None,
    patience_s: float = 0.0,
    ceilings: bool = True,
) -> tuple[Run, bool]:
    """Measure a plan in one run; the run, and whether the budget was spent before it was done.

    Args:
        runs: the folder that a new run is made in.
        command: what was typed, for the header.
        resumed: the run whose rest the plan is; None for a new one.
        patience_s: for measuring again what other programs disturbed.
        ceilings: measure the machine's first, for the rows' rooflines.
    """
    with sigterm_as_ctrl_c():
        started = time.monotonic()
        if resumed is None:
            plan = replace(plan, roofline=survey(plan) if ceilings else None)
            plan = with_rounds(plan, past(runs, plan))
        run = resumed or create_run(runs, plan.header(command))
        side = Side(plan, run)
        go_on = f"go on with addbench sweep --resume {run.argument}"
        print(f"run {run.name}: {count_text(len(plan.work), 'cell')}, in {run.path}", flush=True)
        display = Display(len(plan.work), plan.method.rounds)
        left_s = None if budget_s is None else budget_s - (time.monotonic() - started)
        with Runner([side], display, timeout_s=timeout_s, budget_s=left_s, go_on=go_on) as runner:
            order = chain(round_by_round(plan.work), again(run, patience_s, display))
            spent = runner.measure(order)
        return run, spent
