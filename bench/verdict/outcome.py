"""What a comparison found, cell by cell: its exit code, and how it is shown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.rows.cell import Cell
from bench.rows.fields import KEY_COLUMNS, LATER
from core.errors import EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_OK, EXIT_REGRESSION
from core.table import Column, draw, markdown_lines, print_json

if TYPE_CHECKING:
    from bench.verdict.rules import Judgement

SLOWER, FAILED, MISSING, INCONCLUSIVE = "slower", "failed", "missing", "inconclusive"
FASTER, SAME = "faster", "same"
VERDICTS = (SLOWER, FAILED, MISSING, INCONCLUSIVE, FASTER, SAME)
"""The verdicts, in the order in which they matter to the exit code."""
SCHEMA = 1
LONG = 200
"""More cells than this nobody reads in a terminal: only what is not the same is listed."""
ALWAYS = ("backend", "options", "decoder", "batch", "steps")
"""Key columns that are printed even where all cells agree."""


@dataclass(frozen=True)
class Line:
    """One cell. `ratio`, `low`, `high`: latency HEAD / BASE and its interval; None if not known."""

    cell: Cell
    verdict: str
    reason: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    base_ms: float | None = None
    head_ms: float | None = None
    base_rounds: int = 0
    head_rounds: int = 0


@dataclass(frozen=True)
class Outcome:
    """A whole comparison.

    Attributes:
        base, head: names of the runs or revisions.
        rule: the rule in a sentence, with the confidence of the intervals.
        notes: what a reader should know besides.
        accusing: False where a `slower` must not end in a regression (another machine).
    """

    base: str
    head: str
    rule: str
    lines: Sequence[Line]
    notes: Sequence[str] = field(default=())
    accusing: bool = True

    @property
    def counts(self) -> dict[str, int]:
        counted = Counter(line.verdict for line in self.lines)
        return {verdict: counted[verdict] for verdict in VERDICTS if counted[verdict]}

    @property
    def exit_code(self) -> int:
        """3, then 4, then 5; 0 only if something was compared and nothing is wrong."""
        counts = self.counts
        if SLOWER in counts and self.accusing:
            return EXIT_REGRESSION
        if FAILED in counts or MISSING in counts:
            return EXIT_FAILED
        if SLOWER in counts or INCONCLUSIVE in counts or not counts:
            return EXIT_INCONCLUSIVE
        return EXIT_OK

    @property
    def summary(self) -> str:
        if not self.lines:
            return "inconclusive: there was nothing to compare"
        counts = ", ".join(f"{number} {verdict}" for verdict, number in self.counts.items())
        words = {
            EXIT_OK: "no regression",
            EXIT_REGRESSION: "regression",
            EXIT_FAILED: "cells failed or are missing",
            EXIT_INCONCLUSIVE: "inconclusive",
        }
        return f"{words[self.exit_code]}: {counts} of {len(self.lines)} cells"

    def columns(self) -> dict[str, Any]:
        """The outcome as JSON."""
        return {
            "schema": SCHEMA,
            "base": self.base,
            "head": self.head,
            "rule": self.rule,
            "summary": self.summary,
            "exit_code": self.exit_code,
            "counts": self.counts,
            "notes": list(self.notes),
            "cells": [
                line.cell.columns()
                | {key: value for key, value in vars(line).items() if key != "cell"}
                for line in self.lines
            ],
        }


def decided(line: Line, judged: Judgement, place: int, max_slowdown: float) -> Line:
    """`line` with what a rule says at `place` of a one-axis judgement."""
    from bench.verdict.rules import reason

    verdict, why = INCONCLUSIVE, ""
    if judged.slower[place]:
        verdict = SLOWER
    elif judged.faster[place]:
        verdict = FASTER
    elif judged.same[place]:
        verdict = SAME
    else:
        why = reason(judged, place, max_slowdown)
    ratio, low, high = (
        math.exp(part[place]) for part in (judged.estimate, judged.low, judged.high)
    )
    return replace(line, verdict=verdict, reason=why, ratio=ratio, low=low, high=high)


def change(line: Line) -> str:
    return "" if line.ratio is None else f"{line.ratio - 1:+.1%}"


def interval(line: Line) -> str:
    if line.low is None or line.high is None:
        return ""
    return f"{line.low - 1:+.1%} to {line.high - 1:+.1%}"


def key(name: str) -> Column:
    def value(line: Line) -> Any:
        shown = getattr(line.cell, name)
        return ("no", "yes")[shown] if isinstance(shown, bool) else shown

    return Column(name, value)


FIGURES = (
    Column("base (ms)", lambda line: line.base_ms, 2),
    Column("head (ms)", lambda line: line.head_ms, 2),
    Column("change", change),
    Column("interval", interval),
    Column("rounds", lambda line: f"{line.base_rounds} + {line.head_rounds}"),
    Column("verdict", lambda line: line.verdict),
    Column("reason", lambda line: line.reason),
)


def printed(lines: Sequence[Line]) -> tuple[list[Column], str]:
    """(columns to print, the key columns that say the same everywhere in a sentence)."""
    same = [
        name
        for name in KEY_COLUMNS
        if name not in ALWAYS and len({getattr(line.cell, name) for line in lines}) == 1
    ]
    empty = "options" if not any(line.cell.options for line in lines) else None
    keys = [key(name) for name in KEY_COLUMNS if name not in (*same, empty)]
    figures = [column for column in FIGURES if any(column.value(line) for line in lines)]
    said = ((name, getattr(lines[0].cell, name)) for name in same)
    above = ", ".join(f"{name} {value}" for name, value in said if LATER.get(name) != value)
    return [*keys, *figures], above


def markdown(outcome: Outcome) -> str:
    """A summary, the table, the rule and the notes; for a pull request too."""
    text = [f"## {outcome.head} against {outcome.base}", "", f"**{outcome.summary}**", ""]
    if outcome.lines:
        columns, above = printed(outcome.lines)
        text += [f"{above}.", "", *markdown_lines(columns, outcome.lines), ""]
    text += [outcome.rule, ""]
    text += [f"- {note}" for note in outcome.notes]
    return "\n".join(text).rstrip() + "\n"


def show(outcome: Outcome, form: str) -> None:
    """Print `outcome` to stdout as one of FORMATS."""
    if form == "json":
        print_json(outcome.columns())
        return
    if form == "markdown":
        print(markdown(outcome), end="")
        return
    if outcome.lines:
        columns, above = printed(outcome.lines)
        long = len(outcome.lines) > LONG
        lines = [line for line in outcome.lines if not long or line.verdict != SAME]
        draw(columns, lines[:LONG], f"{outcome.head} against {outcome.base}: {above}")
        if long:
            print(f"{min(len(lines), LONG)} of {len(outcome.lines)} cells shown, none that is the"
                  " same; --format json has all")  # fmt: skip
    print(outcome.rule)
    for note in outcome.notes:
        print(f"note: {note}")
    print(outcome.summary)
