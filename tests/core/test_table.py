"""Tables: the same columns in every form, nothing cut."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.table import (
    EMPTY,
    Column,
    as_json,
    csv_text,
    draw,
    markdown_lines,
    print_json,
    terminal_table,
)


@dataclass(frozen=True)
class Thing:
    name: str
    size: float | None
    flags: str = ""


COLUMNS = (
    Column("flags", lambda thing: thing.flags, whole=True),
    Column("name", lambda thing: thing.name),
    Column("size (m)", lambda thing: thing.size, 1),
)
THINGS = (Thing("a star", 3.14159, "unstable, disturbed (1 of 3)"), Thing("pipe|d", None))


def test_markdown_is_padded_and_numbers_stand_right() -> None:
    header, rule, first, second = markdown_lines(COLUMNS, THINGS)
    assert header == "| flags                        | name    | size (m) |"
    assert rule == "| ---------------------------- | ------- | -------: |"
    assert first == "| unstable, disturbed (1 of 3) | a star  |      3.1 |"
    assert second == f"| {EMPTY:<28} | pipe\\|d |        {EMPTY} |"


def test_csv_and_json_are_unrounded(capsys: pytest.CaptureFixture[str]) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(COLUMNS, THINGS))))
    assert lines[0]["size (m)"] == "3.14159"
    assert lines[1]["size (m)"] == lines[1]["flags"] == ""
    print_json(as_json(COLUMNS, THINGS))
    first, second = json.loads(capsys.readouterr().out)
    assert first == {"flags": THINGS[0].flags, "name": "a star", "size (m)": 3.14159}
    assert second["size (m)"] is None


@pytest.mark.parametrize("width", [50, 80, 200, None])
def test_what_is_whole_is_never_broken(
    width: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(COLUMNS, THINGS, "things", width)
    text = capsys.readouterr().out
    assert text.startswith("things")
    assert "unstable, disturbed (1 of 3)" in text
    assert "3.1" in text


def test_in_a_log_a_line_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    wide = [Column(f"column {n}", lambda _: "some words that could go on") for n in range(9)]
    dispensable = [column.header for column in wide[3:]]
    draw([*COLUMNS, *wide], THINGS, least_needed=dispensable)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 200
    assert sum("a star" in line or "pipe|d" in line for line in text.splitlines()) == 2
    assert text.count("│") == 2 * (text.splitlines()[0].count("┳") + 2)
    assert "column 0" in " ".join(text.split())


@given(st.lists(st.tuples(st.text(max_size=9), st.none() | st.floats(-1e6, 1e6)), max_size=5))
def test_every_line_of_markdown_is_as_long(pairs: list[tuple[str, float | None]]) -> None:
    things = [Thing(name.replace("\n", " "), size) for name, size in pairs]
    lines = markdown_lines(COLUMNS, things)
    assert len(lines) == len(things) + 2
    assert len({len(line) for line in lines}) == 1


def test_a_table_without_lines_has_its_header() -> None:
    assert len(terminal_table(COLUMNS, ()).columns) == 3
    assert len(markdown_lines(COLUMNS, ())) == 2


def test_a_dimmed_line_is_drawn_faint() -> None:
    table = terminal_table(COLUMNS, THINGS, dimmed=lambda thing: "disturbed" in thing.flags)
    assert [row.style for row in table.rows] == ["dim", None]
