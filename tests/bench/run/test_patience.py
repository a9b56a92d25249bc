"""A noisy minute: measured again when the machine is quiet, and the calm attempt counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made import cell, make_run, row

from bench.rows.store import ROWS, Run, last_rows
from bench.rows.summary import by_cell
from bench.run import patience
from bench.run.progress import Display
from bench.show.notes import notes

ONE, TWO = cell(steps=1), cell(steps=2)


class Machine:
    """A test double of the machine: how busy others keep it, and a clock that waiting moves."""

    def __init__(self, *busy: float | None) -> None:
        self.busy, self.now = list(busy), 0.0

    def others(self) -> float | None:
        return self.busy.pop(0) if len(self.busy) > 1 else self.busy[0]

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        share = type("Share", (), {"SHORTEST_S": 1.0, "others": lambda _: self.others()})
        monkeypatch.setattr(patience, "CpuShare", share)
        clock = type("Clock", (), {"monotonic": lambda: self.now, "sleep": self.sleep})
        monkeypatch.setattr(patience, "time", clock)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def add(run: Run, *rows: dict[str, Any]) -> None:
    with (run.path / ROWS).open("a") as file:
        file.write("".join(json.dumps(each) + "\n" for each in rows))


@pytest.fixture
def noisy(tmp_path: Path) -> Run:
    return make_run(
        tmp_path,
        [
            row(ONE, [30.0] * 3, flags=["disturbed"]),
            row(TWO, [20.0] * 3),
        ],
    )


@pytest.fixture
def display() -> Iterator[Display]:
    with Display(2, 1) as shown:
        yield shown


def test_what_was_disturbed_is_measured_again_when_it_is_quiet(
    noisy: Run,
    display: Display,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = Machine(0.6, 0.6, 0.01)
    machine.use(monkeypatch)
    turns = patience.again(noisy, 60.0, display)
    turn = next(turns)
    assert (turn.cells, turn.round) == ((ONE,), 0)
    assert machine.now > 3, "it waited for a quiet second"
    assert display.total == 3
    add(noisy, row(ONE, [10.0] * 3))
    assert list(turns) == []
    assert "1 cells were disturbed" in capsys.readouterr().out
    assert [each["median_ms"] for each in noisy.rows()] == [10.0, 20.0]
    assert len(noisy.all_rows()) == 3, "both attempts are kept"


def test_it_gives_up_after_a_while(
    noisy: Run, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(0.5).use(monkeypatch)
    assert list(patience.again(noisy, 60.0, display)) == []
    assert list(patience.again(noisy, 0.0, display)) == [], "no patience"
    Machine(None).use(monkeypatch)  # a kernel that counts nothing: nothing to wait for
    turns = patience.again(noisy, 60.0, display)
    for _ in range(patience.RETRIES):
        next(turns)
        add(noisy, row(ONE, [40.0] * 3, flags=["disturbed"]))
    assert list(turns) == [], "a cell that stays disturbed is not measured for ever"


def test_what_takes_longer_than_there_is_patience_is_not_begun(
    tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(0.0).use(monkeypatch)
    slow = make_run(tmp_path, [row(ONE, [20_000.0] * 3, flags=["disturbed"])])
    assert list(patience.again(slow, 60.0, display)) == []


def test_a_calm_attempt_counts_whichever_came_first() -> None:
    calm, loud = row(ONE, [10.0]), row(ONE, [11.0], flags=["disturbed"])
    open_ = row(ONE, [12.0], flags=["unstable"])
    failed = row(ONE, [], status="failed", median_ms=None)
    for attempts, counted in (
        ([loud, calm], calm),
        ([calm, loud], calm),
        ([loud, open_], open_),
        ([open_, loud], open_),
        ([loud, failed], loud),
        ([failed, loud], loud),
        ([calm, again := row(ONE, [9.0])], again),
        ([failed, later := failed | {"row": "later"}], later),
    ):
        assert last_rows(attempts) == [counted]


def test_ci_has_no_patience_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert patience.usual_patience_s() == 0
    monkeypatch.delenv("CI")
    assert patience.usual_patience_s() == 60


def test_what_stayed_doubtful_is_said_once_in_words() -> None:
    rows = [row(ONE, [10.0], flags=["disturbed"]), row(TWO, [10.0], flags=["unstable"])]
    said = " ".join(notes(by_cell(rows)))
    for words in ("1 of 2 times were taken while other programs", "leave the median open",
                  "is not established; --rounds 5"):  # fmt: skip
        assert words in said
    calm = [row(each, [10.0], round_) for each in (ONE, TWO) for round_ in range(2)]
    assert notes(by_cell(calm)) == []
    assert notes(by_cell(calm[:1])) == [], "one cell has no order"
