"""`addbench choose --model NAME`: which candidates to measure, in which order, and which once more.

Rounds are what tells cells apart, so each is short: a cold call whose image is held against the
reference, and a sample or a few. After every round the cells that are surely behind, surely outside
the limits, or wrong are dropped, and the rest get another one, until the choice is settled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backends.registry import each_backend, parse_backend
from bench.limits.floors import call_work, stage_work
from bench.rows.cell import Cell
from bench.rows.store import Row, Run, create_run
from bench.run.estimate import (
    TYPICAL_FRACTION,
    Past,
    duration_text,
    estimate,
    past,
    survey,
    total,
)
from bench.run.measure import StopRule
from bench.run.orders import Turn
from bench.run.plan import Plan, groups
from bench.run.progress import Display
from bench.run.request import CAPTIONS, Sampling
from bench.run.runner import Runner, Side, sigterm_as_ctrl_c
from bench.verdict.choosing.choice import MOST_ROUNDS, Decision, decide, still_open
from bench.verdict.choosing.contenders import REACH, Contender, contenders_of
from bench.verdict.choosing.wants import Wants, wants_of
from bench.verdict.rules import RUN_SLOWDOWN
from core.amounts import count_text
from core.errors import PreconditionError

METHOD = Sampling(StopRule(min_samples=1, min_time=0.5, max_time=20.0), rounds=1)
"""Many short rounds: samples of one process are alike, processes are not."""
SURVEY_S = 300.0
"""The shortest budget that has room to measure the machine's ceilings."""
HOPELESS = (1 + RUN_SLOWDOWN) * math.exp(REACH[1])
"""How many times slower than the best an earlier run has to have a cell for it not to be tried."""
ROUNDS = 5
"""Rounds that a search of close candidates usually takes: `addbench noise --choices`."""
ASIDE = {
    "null": "a scripted device for tests",
    "optimum": "another library's pipeline, to compare with",
    "web": "a browser, to see what a page gives",
    "ep": "any provider of onnxruntime: name one, as ep:provider=openvino",
    "qnn": "an NPU that the CPU emulates: it has no speed",
}
"""Backends that are not candidates unless they are named, and why."""
MANY = (1, 2, 4, 8)
"""Batches to try where throughput is wanted."""


# ---- what could be taken


def batches_for(wants: Wants) -> tuple[int, ...]:
    """The batches to try where none are named: several where throughput or its price counts."""
    rate = any(wants.asks(name) for name in ("images/s", "usd/1000", "joule/image"))
    return MANY if rate else (1,)


def captions_for(wants: Wants) -> int:
    """How many captions of each candidate are judged."""
    return CAPTIONS if wants.asks("captions") else 0


def candidates(wants: Wants) -> tuple[list[str], list[str]]:
    """The backends that can be used here, in each of their precisions, as `--backend` takes them;
    and what is not tried, with the reason.

    Stored integers are tried where memory counts.
    """
    texts, left_out = [], []
    for name, backend, probe in each_backend():
        if name in ASIDE:
            left_out.append(f"{name}: {ASIDE[name]}")
            continue
        if backend is None or not probe.usable:
            left_out.append(f"{name}: {probe.what} (addbench backends says what it takes)")
            continue
        if backend.provenance != "measured":
            left_out.append(f"{name}: no such device is here; --backend {name} models one")
            continue
        texts.append(name)
        for key in ("precision", "storage") if wants.asks("memory") else ("precision",):
            option = backend.option_types.get(key)
            for value in option.texts if option else ():
                if option is None or value in (option.text, "auto"):
                    continue
                try:
                    found = parse_backend(f"{name}:{key}={value}").probe()
                except PreconditionError as error:
                    left_out.append(f"{name}:{key}={value}: {error.what}")
                else:
                    if found.usable:
                        texts.append(f"{name}:{key}={value}")
                    else:
                        left_out.append(f"{name}:{key}={value}: {found.what}")
    return texts, left_out


def thinned(plan: Plan, wants: Wants, known: Past) -> tuple[list[Cell], list[str]]:
    """The cells of a plan that could be the choice, and what is left out before it is tried."""
    cells, left_out = list(plan.cells), []
    if not wants.asks("captions"):
        fewest = {cell.group: cell.steps for cell in sorted(cells, key=lambda cell: -cell.steps)}
        more = sorted({cell.steps for cell in cells if cell.steps > fewest[cell.group]})
        cells = [cell for cell in cells if cell.steps == fewest[cell.group]]
        if more:
            left_out.append(
                f"{', '.join(map(str, more))} steps: slower than {min(fewest.values())}, and"
                " nothing that is asked for is better with more; a limit on captions, or --steps"
                " with one number, takes them"
            )
    surveyed = plan.roofline or known.roofline
    kept = []
    for cell in cells:
        least = least_ms(cell, surveyed) if surveyed else None
        limit = most_ms(cell, wants)
        if least is not None and limit is not None and least > limit:
            left_out.append(f"{cell}: no algorithm takes less than {least:,.0f} ms here")
        else:
            kept.append(cell)
    return kept, left_out


def least_ms(cell: Cell, surveyed: Mapping[str, Any]) -> float | None:
    """What no algorithm that is known goes below on this machine; None where that is not known."""
    works = stage_work(cell, surveyed) if cell.backend != "null" else {}
    return call_work(cell, works).least_ms or None


def most_ms(cell: Cell, wants: Wants) -> float | None:
    """The longest call that the limits allow; None where none of them is about time."""
    found = []
    for limit in wants.limits:
        if limit.name == "latency":
            found.append(limit.value)
        elif limit.name == "images/s":
            found.append(1e3 * cell.batch / limit.value)
        elif limit.name == "usd/1000" and wants.price:
            found.append(limit.value * 3600 / wants.price * cell.batch)
    return min(found, default=None)


def expected_ms(cell: Cell, known: Past, surveyed: Mapping[str, Any] | None) -> float | None:
    """What a call takes by an earlier run of this machine, or by the floor; None without either."""
    if cell in known.rows:
        return float(known.rows[cell]["median_ms"])
    works = stage_work(cell, surveyed) if surveyed and cell.backend != "null" else {}
    floor = call_work(cell, works).floor_ms
    return floor / TYPICAL_FRACTION if floor else None


def no_less_ms(cell: Cell, known: Past, surveyed: Mapping[str, Any] | None) -> float | None:
    """What a call takes by an earlier run, or at least: a floor is no bound, algorithms beat it."""
    if cell in known.rows or not surveyed:
        return expected_ms(cell, known, None)
    return least_ms(cell, surveyed)


# ---- what is measured, and how often


@dataclass
class Search:
    """Candidates, and how many rounds of them the choice takes.

    `turns` is an order that looks at what came of it, as `orders.Trial` is.

    Attributes:
        cells: the candidates, the most promising first.
        look: the contenders as the rows so far have them.
        budget_s: seconds for all of it; None for no end.
        expected: milliseconds of a call by an earlier run of this machine, or at least.
        dropped: why a cell is measured no more.
        untried: why a cell was never measured.
        full: whether the budget had no room for a turn: a round that is not whole is the last.
    """

    cells: Sequence[Cell]
    wants: Wants
    look: Callable[[], Sequence[Contender]]
    budget_s: float | None = None
    expected: Mapping[Cell, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    say: Callable[[str], None] = print
    more: Callable[[int], None] = lambda _: None
    dropped: dict[Cell, str] = field(default_factory=dict)
    untried: dict[Cell, str] = field(default_factory=dict)
    cost_s: dict[Cell, float] = field(default_factory=dict)
    said: set[Cell] = field(default_factory=set)
    full: bool = False

    def turns(self, done: Iterable[tuple[Cell, int]] = ()) -> Iterator[Turn]:
        """Measure, judge, drop, until the choice is settled, the budget spent, or MOST_ROUNDS.

        Args:
            done: cells and rounds that an earlier attempt has measured.
        """
        self.started, have = self.clock(), set(done)
        if have:
            self.judge()
        for round_ in range(MOST_ROUNDS):
            if round_ and (self.settled or self.full):
                return
            for group in self.groups(round_):
                cells = tuple(cell for cell in group if (cell, round_) not in have)
                cells = tuple(cell for cell in cells if round_ or not self.hopeless(cell))
                if not cells:
                    continue
                if self.left_s < sum(self.cost_s.get(cell, 0.0) for cell in cells):
                    self.say(f"the budget has no room for round {round_ + 1} of {cells[0]}")
                    self.full = True
                    continue
                if round_:
                    self.more(len(cells))
                self.before = self.clock()
                yield Turn(0, round_, cells)
            self.judge()

    def groups(self, round_: int) -> list[list[Cell]]:
        """What one worker measures each, in an order that turns round by round: drift cancels."""
        alive = [cell for cell in self.cells if cell not in self.dropped]
        ordered = groups(alive)
        return ordered[::-1] if round_ % 2 else ordered

    def note(self, turn: Turn, cell: Cell, row: Row) -> None:
        """Keep what a cell took; a wrong or failed one is measured no more."""
        now = self.clock()
        self.cost_s[cell] = now - self.before
        self.before = now
        if row["status"] != "ok":
            self.dropped[cell] = row["status"]

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return float("inf") if self.budget_s is None else (
            self.budget_s - (self.clock() - self.started)
        )  # fmt: skip

    def judge(self) -> None:
        """Drop what cannot be the choice by what was measured, and say so."""
        self.decision = decide(self.look(), self.wants)
        alive = {each.cell for each in still_open(self.decision)}
        for each in self.decision.standings:
            cell = each.contender.cell
            if cell in alive or cell in self.said:
                continue
            self.said.add(cell)
            self.dropped[cell] = each.why
            after = (
                f"dropped after {count_text(each.contender.rounds, 'round')}: {cell}: {each.state}"
            )
            on = ", on the frontier" if each.frontier else ""
            self.say(f"{after}{on}: {' '.join(each.why.split())[:160]}")

    @property
    def settled(self) -> bool:
        """Whether another round would change nothing that matters."""
        alive = [cell for cell in self.cells if cell not in self.dropped]
        return not alive or self.decision.settled

    def hopeless(self, cell: Cell) -> bool:
        """Whether what is known before says that a cell is far behind the best that was measured.

        Earlier rows of this machine are trusted so far.
        """
        expected = self.expected.get(cell)
        choice = decide(self.look(), self.wants) if expected else None
        if expected is None or choice is None or choice.taken is None:
            return False
        if choice.objective.name not in ("latency", "images/s", "usd/1000"):
            return False
        best = choice.taken.contender
        times = expected / cell.batch / (best.spans["latency"].mid / best.cell.batch)
        if times < HOPELESS:
            return False
        self.untried[cell] = f"{times:.1f} times the best, by what was known before"
        self.dropped[cell] = self.untried[cell]
        return True

    def left_out(self) -> list[str]:
        """What has no row, by reason."""
        have = {each.cell for each in self.look()}
        texts: dict[str, list[str]] = {}
        for cell in self.cells:
            if cell not in have:
                why = self.untried.get(cell, "the budget was spent before")
                texts.setdefault(why, []).append(str(cell))
        return [f"{'; '.join(cells)}: {why}" for why, cells in texts.items()]


# ---- the whole of it


def search(
    plan: Plan,
    wants: Wants,
    runs: Path,
    command: Sequence[str],
    left_out: Sequence[str],
    resumed: Run | None = None,
    *,
    timeout_s: float,
    budget_s: float | None = None,
    ceilings: bool = True,
) -> tuple[Run, list[str]]:
    """Measure what a choice takes, in one run; the run, and what was not tried and why.

    Args:
        command: what was typed, for the header.
        left_out: what is known not to be tried.
        resumed: the run that is gone on with, which `plan` is the plan of.
    """
    with sigterm_as_ctrl_c():
        started = time.monotonic()
        known = past(runs, plan)
        refuse_other_tasks(plan)
        if resumed is None:
            unknown = any(cell not in known.rows for cell in plan.cells)
            room = budget_s is None or budget_s >= SURVEY_S
            if ceilings and room and unknown and known.roofline is None:
                plan = replace(plan, roofline=survey(plan))
            plan, without, expected = arranged(plan, wants, known)
            left_out = [*left_out, *without]
            run = create_run(runs, plan.header(command, extra={"choose": asked(wants, left_out)}))
        else:
            run, expected = resumed, {}
        display = Display(len(plan.cells), 1)
        go_on = f"go on with addbench choose --resume {run.argument}"
        print(f"run {run.name}: {len(plan.cells)} candidates, in {run.path}", flush=True)
        left_s = None if budget_s is None else budget_s - (time.monotonic() - started)
        order = Search(
            plan.cells, wants, lambda: contenders_of([run], wants), left_s, expected,
            say=display.say, more=display.more,
        )  # fmt: skip
        done = [(Cell.of(row), row["round"]) for row in run.rows()]
        with Runner(
            [Side(plan, run)], display, timeout_s=timeout_s, budget_s=left_s, go_on=go_on
        ) as runner:
            if runner.measure(order.turns(done), order.note) and budget_s is not None:
                display.say(f"the budget of {duration_text(budget_s)} is spent; {go_on}")
        return run, [*left_out, *order.left_out()]


def refuse_other_tasks(plan: Plan) -> None:
    """Refuse a search among images that start from a picture, or lead away from a prompt.

    Raises:
        PreconditionError: a choice is among images of text alone.
    """
    for flag, cells in (
        ("--strength", [cell for cell in plan.cells if cell.encoder]),
        ("--negative", [cell for cell in plan.cells if cell.negative]),
    ):
        if cells:
            raise PreconditionError(
                f"{flag} does not go with a choice", "it is among images of a prompt alone: other"
                " pictures are another task, and their figures do not compare",
                f"drop {flag}; addbench sweep {flag} measures such cells",
            )  # fmt: skip


def arranged(plan: Plan, wants: Wants, known: Past) -> tuple[Plan, list[str], dict[Cell, float]]:
    """The plan of what is tried, the most promising first; what is left out and why; and what a
    call takes at least, in milliseconds, of the cells of which that is known.

    Raises:
        PreconditionError: nothing is left.
    """
    kept, without = thinned(plan, wants, known)
    if not kept:
        raise PreconditionError(
            "no candidate can meet the limits", "; ".join(without),
            "loosen --within, or name others with --backend",
        )  # fmt: skip
    surveyed = plan.roofline or known.roofline
    expected = {cell: ms for cell in kept if (ms := expected_ms(cell, known, surveyed))}
    least = {cell: ms for cell in kept if (ms := no_less_ms(cell, known, surveyed))}
    return replace(plan, cells=tuple(in_order(kept, expected))), without, least


def describe(
    plan: Plan, wants: Wants, runs: Path, left_out: Sequence[str], budget_s: float | None
) -> None:
    """Print what a search would measure, in its order, and about how long it takes; nothing is
    measured or written.

    Raises:
        PreconditionError: no candidate can meet the limits, or they are of another task.
    """
    refuse_other_tasks(plan)
    known = past(runs, plan)
    plan, without, least = arranged(plan, wants, known)
    surveyed = plan.roofline or known.roofline
    expected = {cell: ms / cell.batch for cell in plan.cells
                if (ms := expected_ms(cell, known, surveyed))}  # fmt: skip
    best = min(expected.values(), default=0.0)
    far: dict[Cell, float] = {}
    for cell in plan.cells if best else ():
        times = least.get(cell, 0.0) / cell.batch / best
        if times >= HOPELESS:
            far[cell] = times
    print(f"{count_text(len(plan.cells), 'candidate')}, not measured now; in the first round:")
    for cell in plan.cells:
        guess = estimate(cell, plan.method.rule, known.rows, surveyed)
        behind = far.get(cell)
        only = "" if behind is None else (
            f"; left out once a faster one meets the limits: {behind:.1f} times the best"
        )  # fmt: skip
        print(f"  {cell}: {guess.words} ({guess.source}){only}")
    tried = [cell for cell in plan.cells if cell not in far]
    first = total(plan, known, [(cell, 0) for cell in tried])
    close = [cell for cell in tried
             if cell in expected and expected[cell] <= best * math.exp(REACH[1])]  # fmt: skip
    later = total(plan, known, [(cell, round_) for cell in close for round_ in range(1, ROUNDS)])
    print(f"{first.words} for the first round")
    if close and not first.bound:
        seconds = first.seconds + later.seconds * (len(close) > 1)
        print(f"about {duration_text(seconds)} in all: {count_text(len(close), 'candidate')} may be"
              f" too close to tell by one round, and {ROUNDS} rounds usually settle that (at most"
              f" {MOST_ROUNDS})")  # fmt: skip
    else:
        print("how many are close enough for more rounds is not known: at most"
              f" {MOST_ROUNDS} of each")  # fmt: skip
    if budget_s is not None:
        print(f"--budget ends it after {duration_text(budget_s)}")
    for text in [*left_out, *without]:
        print(f"not tried: {text}")


def in_order(cells: Sequence[Cell], expected: Mapping[Cell, float]) -> list[Cell]:
    """The most promising groups first, those of which nothing is known behind them."""
    ordered = groups(cells)
    ordered.sort(key=lambda group: min(expected.get(cell, float("inf")) / cell.batch
                                       for cell in group))  # fmt: skip
    return [cell for group in ordered for cell in group]


def asked(wants: Wants, left_out: Sequence[str]) -> dict[str, Any]:
    """What the header of a search says of it."""
    return {
        "within": wants.text, "best": wants.best, "price": wants.price, "left_out": list(left_out)
    }  # fmt: skip


def asked_of(run: Run) -> tuple[Wants, list[str]]:
    """What a run was a search for, and what it left out.

    Raises:
        PreconditionError: it is no run of `addbench choose --model NAME`.
    """
    said = run.header.extra.get("choose")
    if not isinstance(said, dict):
        raise PreconditionError(
            f"run {run.name} is no search of `addbench choose`", "its header names no limits",
            f"addbench choose {run.name} chooses from it as it is",
        )  # fmt: skip
    return wants_of(said["within"], said["best"], said["price"]), list(said["left_out"])


def final(run: Run, wants: Wants, across: str = "") -> Decision:
    """The decision by what a run holds."""
    return decide(contenders_of([run], wants), wants, across)
