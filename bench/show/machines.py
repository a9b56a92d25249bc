"""One table over machines: a column for each, the best of what was asked marked.

Machines are shown beside each other and never judged: a difference between two is no regression.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.rows.cell import Cell
from bench.rows.store import Run
from bench.rows.summary import CellRounds, by_cell
from bench.show.columns import COLUMNS, images_per_joule
from bench.verdict.choosing.contenders import place_of
from core.errors import PreconditionError
from core.table import EMPTY, Column, as_json, draw, markdown_lines

BEST = "*"
ABOUT = (
    f"median (ms) by machine; {BEST} the fastest of what was asked, or within what their rounds"
    " scatter of it. Machines are shown beside each other, not judged: none is a regression of"
    " another."
)
GIVEN = "images/USD: at the machine's price an hour as given ({prices}); it is nobody's offer."
KEY = ("model", "weights", "backend", "numerics", "size (px)", "scheduler", "guidance",
       "low memory", "encoder", "strength", "decoder", "batch", "steps")  # fmt: skip
"""Columns that say what was measured, in the order of the table of one run."""


@dataclass(frozen=True)
class Across:
    """A cell on every machine that has it.

    Attributes:
        cell: the cell without its device.
        on: its rounds by the machine's name.
        best: the machines that no other one and no other backend beats at what was asked.
    """

    cell: Cell
    on: Mapping[str, CellRounds]
    best: frozenset[str] = frozenset()

    @property
    def asked(self) -> Cell:
        """What a person wants of the cell: all of it but what computes it."""
        nothing = dict.fromkeys(("backend", "options", "device", "precision", "storage"), "")
        return replace(self.cell, **nothing)  # type: ignore[arg-type]


def names_of(runs: Sequence[Run]) -> dict[str, str]:
    """What the machine of each run is called, by the run's name.

    It is its name in the fleet, or else its hardware; two of equal hardware get a piece of their
    hash.
    """
    names = {run.name: str((run.header.fleet or {}).get("machine") or place_of(run))
             for run in runs}  # fmt: skip
    hashes: dict[str, set[str]] = {}
    for run in runs:
        hashes.setdefault(names[run.name], set()).add(run.header.machine)
    return {
        run.name: names[run.name]
        if len(hashes[names[run.name]]) == 1
        else f"{names[run.name]} {run.header.machine[:4]}"
        for run in runs
    }


def lines_of(runs: Sequence[Run]) -> tuple[list[str], list[Across]]:
    """The machines and the lines of their table; of two runs of a cell on one the later counts."""
    names = names_of(runs)
    machines = sorted(set(names.values()))
    gathered: dict[Cell, dict[str, CellRounds]] = {}
    for run in sorted(runs, key=lambda run: run.name):
        for rounds in by_cell(run.rows()):
            gathered.setdefault(replace(rounds.cell, device=""), {})[names[run.name]] = rounds
    lines = [Across(cell, on) for cell, on in gathered.items()]
    asked: dict[Cell, list[Across]] = {}
    for line in lines:
        asked.setdefault(line.asked, []).append(line)
    return machines, [replace(line, best=best_of(line, of)) for of in asked.values() for line in of]


def best_of(line: Across, of: Sequence[Across]) -> frozenset[str]:
    """The machines of a line on which the fastest of several lines may be, given their scatter."""
    times = [(ms, rounds.error_ms) for each in of for rounds in each.on.values()
             if (ms := rounds.median("median_ms")) is not None]  # fmt: skip
    if len(times) < 2:
        return frozenset()
    least, error = min(times)
    return frozenset(
        name
        for name, rounds in line.on.items()
        if (ms := rounds.median("median_ms")) is not None and ms - rounds.error_ms <= least + error
    )


def images_per_dollar(price: float) -> Callable[[CellRounds], float | None]:
    """Images for a dollar where an hour costs `price`, calls made one after the other."""

    def value(rounds: CellRounds) -> float | None:
        rate = rounds.median("images_per_s")
        return None if rate is None else 3600 * rate / price

    return value


def of_any(value: Callable[[CellRounds], Any]) -> Callable[[Across], Any]:
    """What a column of the table of one run says of a cell, whatever machine it is on."""
    return lambda line: value(replace(next(iter(line.on.values())), cell=line.cell))


def columns_for(
    machines: Sequence[str], lines: Sequence[Across], prices: Mapping[str, float]
) -> list[Column]:
    """What was measured, then a column for each machine, then energy and cost of each."""

    def on(name: str, figure: Callable[[CellRounds], Any]) -> Callable[[Across], Any]:
        return lambda line: figure(line.on[name]) if name in line.on else None

    def time(name: str) -> Callable[[Across], str | None]:
        def text(line: Across) -> str | None:
            if name not in line.on:
                return None
            ms = line.on[name].median("median_ms")
            if ms is None:
                return line.on[name].status
            return f"{ms:.1f}{f' {BEST}' * (name in line.best)}"

        return text

    key = [replace(column, value=of_any(column.value)) for column in COLUMNS
           if column.header in KEY]  # fmt: skip
    beside = [Column(f"{name} images/J", on(name, images_per_joule), 3) for name in machines]
    beside += [Column(f"{name} images/USD", on(name, images_per_dollar(prices[name])), 0)
               for name in machines if name in prices]  # fmt: skip
    told = [
        column for column in key
        if column.header in ("backend", "numerics", "decoder", "batch", "steps")
        or len({column.text(line) for line in lines}) > 1
    ]  # fmt: skip
    times = [Column(f"{name} (ms)", time(name), whole=True) for name in machines]
    return [*told, *times, *(column for column in beside if column.says(lines))]


def check_prices(machines: Sequence[str], prices: Mapping[str, float]) -> None:
    """Refuse a price of a machine that is not there."""
    for name in prices:
        if name not in machines:
            raise PreconditionError(
                f"--price {name}={prices[name]:g} is of no machine here",
                f"there are: {', '.join(machines)}",
                "name one of them",
            )


def notes(prices: Mapping[str, float]) -> list[str]:
    """What stands below the table."""
    said = ", ".join(f"{name} {price:g} USD/h" for name, price in prices.items())
    return [ABOUT, *([GIVEN.format(prices=said)] if prices else [])]


def show(runs: Sequence[Run], prices: Mapping[str, float]) -> None:
    """Print the table."""
    machines, lines = lines_of(runs)
    check_prices(machines, prices)
    if not lines:
        print("no rows yet")
        return
    draw(columns_for(machines, lines, prices), lines)
    print(*notes(prices), sep="\n")


def markdown(runs: Sequence[Run], prices: Mapping[str, float]) -> str:
    """The table in Markdown."""
    machines, lines = lines_of(runs)
    check_prices(machines, prices)
    if not lines:
        return "No rows.\n"
    text = ["# Machines", "", *markdown_lines(columns_for(machines, lines, prices), lines), ""]
    return "\n".join([*text, "\n\n".join(notes(prices))]) + "\n"


def json_lines(runs: Sequence[Run], prices: Mapping[str, float]) -> list[dict[str, Any]]:
    """A record for each cell and machine, unrounded; prices are labelled as given."""
    machines, lines = lines_of(runs)
    check_prices(machines, prices)
    records = []
    for line in lines:
        for name, rounds in line.on.items():
            (figures,) = as_json(COLUMNS, [rounds])
            price = prices.get(name)
            record = {
                "machine": name, **rounds.cell.columns(), "best": name in line.best,
                "columns": {key: value for key, value in figures.items()
                            if value not in (None, "", EMPTY)},
            }  # fmt: skip
            if price is not None:
                record |= {"usd_per_hour_as_given": price,
                           "images_per_usd": images_per_dollar(price)(rounds)}  # fmt: skip
            records.append(record)
    return records
