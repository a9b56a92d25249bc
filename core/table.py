"""A table: its columns said once, then as Markdown, in the terminal, as CSV or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EMPTY = "-"
"""What stands for a value that is not known, in every form for people."""
FORMATS = ("table", "markdown", "json")
"""What `--format` takes: for the terminal, for a page, for a program."""
PIPE_WIDTH = 200
"""Characters of a line where no terminal says how wide it is: in a log, a file, a pipe."""


@dataclass(frozen=True)
class Column:
    """One column of a table, whatever its lines are.

    Attributes:
        header: its name, with the unit.
        value: what it shows of a line; None or "" where that is not known.
        digits: after the point, of a number; such a column is set to the right.
        whole: its words are never cut or broken in a terminal, whatever room that takes.
    """

    header: str
    value: Callable[[Any], Any]
    digits: int | None = None
    whole: bool = False

    def text(self, line: Any) -> str:
        value = self.value(line)
        if value is None or value == "":
            return EMPTY
        return f"{value:.{self.digits}f}" if self.digits is not None else str(value)

    def says(self, lines: Sequence[Any]) -> bool:
        """Whether any line has a value here."""
        return any(self.text(line) != EMPTY for line in lines)


def markdown_lines(columns: Sequence[Column], lines: Sequence[Any]) -> list[str]:
    """The table in Markdown, padded so that it reads as plain text too."""
    cells = [[column.header for column in columns]]
    cells += [[column.text(line).replace("|", "\\|") for column in columns] for line in lines]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    right = [column.digits is not None for column in columns]

    def join(row: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(row, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * (width - number) + ":" * number for width, number in zip(widths, right, strict=True)
    )
    return [join(cells[0]), f"| {' | '.join(rule)} |", *(join(row) for row in cells[1:])]


def csv_text(columns: Sequence[Column], lines: Sequence[Any]) -> str:
    """Every value unrounded, one line of text per line; nothing where it is not known."""
    import pandas as pd

    values = {column.header: [column.value(line) for line in lines] for column in columns}
    text: str = pd.DataFrame(values).to_csv(index=False, lineterminator="\n")
    return text


def as_json(columns: Sequence[Column], lines: Sequence[Any]) -> list[dict[str, Any]]:
    """A record per line, every value unrounded under its header."""
    return [{column.header: column.value(line) for column in columns} for line in lines]


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    print()


# ---- in the terminal


def console(width: int | None = None) -> Console:
    """Where tables are drawn: as wide as the terminal, PIPE_WIDTH without one, or `width`."""
    from rich.console import Console

    room = width or (None if sys.stdout.isatty() else PIPE_WIDTH)
    return Console(width=room, highlight=False, markup=False)


def terminal_table(
    columns: Sequence[Column],
    lines: Sequence[Any],
    title: str = "",
    one_line: bool = False,
    dimmed: Callable[[Any], bool] = lambda line: False,
) -> Table:
    """The table for `rich` to draw; `title` stands above it. No figure and no word is cut.

    `one_line`: nothing but headers goes on several lines, and these do. `dimmed`: whether a line is
    drawn faint.
    """
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", title_style="")
    for column in columns:
        table.add_column(
            column.header,
            justify="left" if column.digits is None else "right",
            min_width=(full_width if one_line else least_width)(column, lines),
            max_width=full_width(column, lines) if one_line else None,
        )
    for line in lines:
        style = "dim" if dimmed(line) else None
        table.add_row(*(column.text(line) for column in columns), style=style)
    return table


def draw(
    columns: Sequence[Column],
    lines: Sequence[Any],
    title: str = "",
    width: int | None = None,
    least_needed: Sequence[str] = (),
    dimmed: Callable[[Any], bool] = lambda line: False,
) -> None:
    """Print the table. Of `least_needed`, first to last, go as many as there is no room for.

    In a log, where nobody can widen the window, they go before a line of the table takes two.
    """
    drawn_on = console(width)
    one_line = not width and not sys.stdout.isatty()
    needs = full_width if one_line else least_width
    kept = list(columns)
    for header in least_needed:
        if total([needs(column, lines) for column in kept]) <= drawn_on.width:
            break
        kept = [column for column in kept if column.header != header]
    if one_line:  # where there is room for headers too they need not break
        natural = [max(full_width(column, lines), len(column.header)) for column in kept]
        least = [full_width(column, lines) for column in kept]
        one_line = total(least) <= drawn_on.width < total(natural)
    drawn_on.print(terminal_table(kept, lines, title, one_line, dimmed))


def total(widths: Sequence[int]) -> int:
    """Characters of a line of columns that wide, with the lines between them."""
    return sum(width + 3 for width in widths) + 1


def least_width(column: Column, lines: Sequence[Any]) -> int:
    """Characters a column needs if its header, and words that may, go on several lines."""
    texts = [column.text(line) for line in lines]
    if column.digits is None and not column.whole:
        texts = [word for text in texts for word in text.split()]
    return max(map(len, (*column.header.split(), *texts)), default=1)


def full_width(column: Column, lines: Sequence[Any]) -> int:
    """Characters a column needs if only its header goes on several lines."""
    return max(map(len, (*column.header.split(), *(column.text(line) for line in lines))))
