"""Two runs of the same cells, measured one after the other: did it become slower?"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from operator import itemgetter
from typing import Any

from bench.rows.cell import Cell
from bench.rows.fields import EMULATED, KEY_COLUMNS, OK
from bench.rows.stats import median_or_none
from bench.rows.store import Row, Run, calmness, is_noisy, is_timed
from bench.verdict.outcome import (
    FAILED,
    INCONCLUSIVE,
    MISSING,
    Line,
    Outcome,
    decided,
)
from core.errors import AddbenchError, PreconditionError

CONDITIONS = (
    "versions",
    "cores_allowed",
    "threads_env",
    "governor",
    "isa",
    "os",
)
"""What of the environment is named where two runs differ in it."""
FAR_APART_H = 24.0
DOUBTS = frozenset(("disturbed", "throttled"))
"""Flags that say that a row's time is not the program's alone."""


@dataclass
class Cells:
    """What one run says of a cell: medians of the rounds that are ok, statuses of all."""

    medians: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    provenances: set[str] = field(default_factory=set)
    disturbed: int = 0
    """Rounds in which other processes or the card's clock took part."""
    uncompiled: int = 0
    """Rounds without the operators that a backend builds where there is a compiler."""

    @property
    def bad(self) -> str:
        """The statuses that are not ok, with their number of rounds; "" for none."""
        total = self.statuses.total()
        return ", ".join(
            f"{status} in {number} of {total} rounds"
            for status, number in sorted(self.statuses.items())
            if status != OK
        )


def gather(rows: Iterable[Row], name: str) -> dict[Cell, Cells]:
    """Rows by cell, one a round: of several attempts the calm one, as `last_rows` has it.

    Raises:
        AddbenchError: a cell was measured twice in one round, though the first time was calm.
    """
    key = itemgetter(*KEY_COLUMNS, "round")
    latest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        place = key(row)
        earlier = latest.get(place)
        if earlier is None or calmness(row) >= calmness(earlier):
            latest[place] = row
        if (
            earlier is not None
            and earlier["status"] == OK == row["status"]
            and not is_noisy(earlier)
        ):
            raise AddbenchError(
                f"run {name} has two results of {Cell.of(row)} in round {row['round'] + 1}",
                f"rows {earlier['row']} and {row['row']}: a sweep measures a cell once a round",
                "remove the row that does not belong there",
            )
    by_key: dict[tuple[Any, ...], Cells] = {}
    for place, row in latest.items():
        cells = by_key.setdefault(place[:-1], Cells())
        cells.statuses[row["status"]] += 1
        if row["status"] == OK:
            cells.provenances.add(row["provenance"])
        if is_timed(row):
            cells.medians.append(row["median_ms"])
        if row["flags"]:
            cells.disturbed += not DOUBTS.isdisjoint(row["flags"])
            cells.uncompiled += "no_compiler" in row["flags"]
    return {Cell(*place): cells for place, cells in by_key.items()}


def judge(
    base: dict[Cell, Cells],
    head: dict[Cell, Cells],
    cells: Sequence[Cell],
    max_slowdown: float,
) -> list[Line]:
    """A line for each of `cells`. Cells with equal numbers of rounds are judged at once."""
    import numpy as np

    from bench.verdict.rules import runs

    lines: dict[Cell, Line] = {}
    shapes: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        mine, theirs = base.get(cell, Cells()), head.get(cell, Cells())
        verdict, why = unusable(mine, theirs)
        lines[cell] = Line(
            cell,
            verdict,
            why,
            base_ms=median_or_none(mine.medians),
            head_ms=median_or_none(theirs.medians),
            base_rounds=len(mine.medians),
            head_rounds=len(theirs.medians),
        )
        if not verdict:
            shapes.setdefault((len(mine.medians), len(theirs.medians)), []).append(cell)
    for group in shapes.values():
        judged = runs(
            np.log([base[cell].medians for cell in group]),
            np.log([head[cell].medians for cell in group]),
            max_slowdown,
        )
        for place, cell in enumerate(group):
            lines[cell] = decided(lines[cell], judged, place, max_slowdown)
    return [lines[cell] for cell in cells]


def unusable(base: Cells, head: Cells) -> tuple[str, str]:
    """(verdict, reason) of a cell that cannot be compared; ("", "") of one that can."""
    from bench.verdict.rules import RUN_ROUNDS

    for name, side in (("HEAD", head), ("BASE", base)):
        if not side.statuses:
            return MISSING, f"{name} has no row of it"
    if head.bad:
        return FAILED, f"HEAD: {head.bad}"
    if EMULATED in base.provenances | head.provenances:
        return INCONCLUSIVE, "an emulation has no speed to compare"
    if not base.medians:
        return FAILED, f"BASE: {base.bad}"
    if base.provenances != head.provenances:
        words = [" and ".join(sorted(side.provenances)) for side in (base, head)]
        return INCONCLUSIVE, f"BASE is {words[0]}, HEAD {words[1]}: no ratio mixes the two"
    if min(len(base.medians), len(head.medians)) < RUN_ROUNDS:
        return INCONCLUSIVE, (
            f"{len(base.medians)} and {len(head.medians)} rounds, {RUN_ROUNDS} a side are needed:"
            f" sweep with --rounds {RUN_ROUNDS}, or use addbench ab"
        )
    return "", ""


# ---- two runs


def accelerators(target: Run) -> dict[str, str]:
    """Device of the rows -> the driver's name for it."""
    named: dict[str, str] = target.header.environment.get("accelerators") or {}
    return named


def machine_of(target: Run) -> tuple[str, dict[str, str]]:
    """What tells machines apart. The hash knows CPU and installation: where containers come and
    go, the GPU behind the same two may be another."""
    return target.header.environment["machine"], accelerators(target)


def on_one_machine(base: Run, head: Run) -> bool:
    """Whether both were measured on one machine: machines of a fleet that are called differently
    are two, even where they are set up from one image."""
    names = {(each.header.fleet or {}).get("machine") for each in (base, head)} - {None}
    return machine_of(base) == machine_of(head) and len(names) < 2


def check_pair(base: Run, head: Run, allow_other_machine: bool) -> bool:
    """Whether both ran on one machine.

    Raises:
        PreconditionError: the two are one run, are of different models, or of different machines
            without `allow_other_machine`.
    """
    if base.path.resolve() == head.path.resolve():
        raise PreconditionError(
            f"BASE and HEAD are both run {base.name}",
            "a run is always the same as itself",
            "name two runs",
        )
    models = [
        " ".join(str(target.header.bundle[name]) for name in ("name", "weights", "dtype"))
        for target in (base, head)
    ]
    if models[0] != models[1]:
        raise PreconditionError(
            "BASE and HEAD are runs of different models",
            f"BASE measured {models[0]}, HEAD {models[1]}",
            "compare runs of one model and its weights",
        )
    one_machine = on_one_machine(base, head)
    if not one_machine and not allow_other_machine:
        names = [
            " and ".join([target.header.environment["cpu"], *accelerators(target).values()])
            for target in (base, head)
        ]
        raise PreconditionError(
            "BASE and HEAD were measured on different machines",
            f"BASE on {names[0]}, HEAD on {names[1]}: machines of one kind already differ by 8%",
            "measure both on one, or pass --allow-other-machine for a table without a regression",
        )
    return bool(one_machine)


def notes_on(base: Run, head: Run, one_machine: bool) -> list[str]:
    """What differs between two runs and may explain a difference."""
    notes = []
    if not one_machine:
        notes.append("the runs are from different machines: no verdict here is a regression")
    for name in CONDITIONS:
        was, now = (target.header.environment.get(name) for target in (base, head))
        if was != now:
            notes.append(f"{name} differs: {difference(was, now)}")
    if (was := base.header.settings) != (now := head.header.settings):
        notes.append(f"settings differ: {difference(was, now)}")
    if base.header.bundle.get("hash") != head.header.bundle.get("hash"):
        notes.append("the bundles differ in content: what was exported changed")
    for side, target in (("BASE", base), ("HEAD", head)):
        if target.header.git_dirty:
            notes.append(f"{side} was measured with uncommitted changes")
    hours = apart_h(base, head)
    if hours is not None and hours > FAR_APART_H:
        notes.append(
            f"the runs lie {hours / 24:.1f} days apart; the rule is for runs one after the other"
        )
    return notes


def doubts(side: str, target: Run, by_cell: dict[Cell, Cells]) -> list[str]:
    """What of a run's rows is missing, or was not measured in peace."""
    count = sum(cells.statuses.total() for cells in by_cell.values())
    disturbed = sum(cells.disturbed for cells in by_cell.values())
    uncompiled = sum(cells.uncompiled for cells in by_cell.values())
    missing = target.rounds * len(target.plan) - count
    notes = []
    if disturbed:
        notes.append(f"{side}: {disturbed} of {count} rows are flagged disturbed or throttled")
    if uncompiled:
        notes.append(
            f"{side}: {uncompiled} of {count} rows ran without the operators that a compiler builds"
        )
    if missing > 0:
        notes.append(f"{side} is not complete: {missing} of its planned rows are missing")
    return notes


def difference(was: Any, now: Any) -> str:
    """What changed; of two dicts only the entries that differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        return ", ".join(
            f"{name} {was.get(name)} -> {now.get(name)}"
            for name in {**was, **now}
            if was.get(name) != now.get(name)
        )
    return f"{was} -> {now}"


def apart_h(base: Run, head: Run) -> float | None:
    """Hours between the starts of two runs; None where a header does not say."""
    try:
        was, now = (datetime.fromisoformat(each.header.created_utc) for each in (base, head))
        return abs((now - was).total_seconds()) / 3600
    except (KeyError, TypeError, ValueError):
        return None


def compare(base: Run, head: Run, max_slowdown: float, allow_other_machine: bool) -> Outcome:
    """Judge every cell that either run planned or measured."""
    from bench.verdict.rules import RUN_SPREADS

    one_machine = check_pair(base, head, allow_other_machine)
    gc.disable()  # rows are trees, nothing in them is cyclic: a third of the time of reading many
    try:
        mine, theirs = (gather(target.all_rows(), target.name) for target in (base, head))
    finally:
        gc.enable()
    notes = notes_on(base, head, one_machine)
    for side, target, by_cell in (("BASE", base, mine), ("HEAD", head, theirs)):
        notes += doubts(side, target, by_cell)
    planned = [*base.plan, *head.plan, *mine, *theirs]
    return Outcome(
        base=base.name,
        head=head.name,
        rule=f"slower: the two-sample Hodges-Lehmann estimate on round medians, with its whole 95%"
        f" interval, is above {max_slowdown:+.0%}, and exceeds {RUN_SPREADS:g} times the spread of"
        " a run's own rounds.",
        lines=judge(mine, theirs, list(dict.fromkeys(planned)), max_slowdown),
        notes=notes,
        accusing=one_machine,
    )
