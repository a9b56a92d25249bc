"""One table over machines: columns, marks, energy, prices, names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import cell, make_run, row

from bench.commands import show as show_command
from bench.rows.store import Row, Run
from bench.show import machines
from core.cli import run as shell


def of_machine(out: Path, name: str, rows: Sequence[Row], **more: Any) -> Run:
    """A run as a sweep over a fleet leaves it."""
    run = make_run(out, rows)
    fleet = {"sweep": "5" * 8, "machine": name, "labels": {"name": name}}
    return run.with_header(replace(run.header, fleet=fleet, **more))


@pytest.fixture
def two(tmp_path: Path) -> list[Run]:
    gpu = cell(backend="cuda", device="cuda", precision="fp16", steps=1)
    slow = of_machine(tmp_path, "slow", [
        row(cell(steps=1), [100.0, 101.0, 99.0]), row(cell(steps=2), [200.0, 200.0, 200.0]),
    ])  # fmt: skip
    fast = of_machine(tmp_path, "fast", [
        row(cell(steps=1), [40.0, 40.2, 39.8], energy_j=2.0), row(gpu, [10.0, 10.1, 9.9]),
        row(cell(steps=2), [205.0, 170.0, 240.0]),
    ])  # fmt: skip
    return [slow, fast]


def line(runs: Sequence[Run], backend: str, steps: int, **prices: float) -> dict[str, str]:
    names, lines = machines.lines_of(runs)
    columns = machines.columns_for(names, lines, prices)
    (found,) = [each for each in lines if (each.cell.backend, each.cell.steps) == (backend, steps)]
    return {column.header: column.text(found) for column in columns}


def test_a_column_for_each_machine_and_the_best_of_what_was_asked_is_marked(
    two: list[Run],
) -> None:
    on_cpu, on_gpu = line(two, "null", 1), line(two, "cuda", 1)
    assert (on_cpu["slow (ms)"], on_cpu["fast (ms)"]) == ("100.0", "40.0")
    assert (on_gpu["slow (ms)"], on_gpu["fast (ms)"]) == ("-", "10.0 *")


def test_machines_that_cannot_be_told_apart_are_both_marked(two: list[Run]) -> None:
    both = line(two, "null", 2)
    assert (both["slow (ms)"], both["fast (ms)"]) == ("200.0 *", "205.0 *")


def test_energy_and_cost_stand_beside(two: list[Run]) -> None:
    said = line(two, "null", 1, fast=3.6, slow=0.36)
    assert said["fast images/J"] == "0.500"
    assert "slow images/J" not in said
    # 25 images a second at 0.1 cents a second.
    assert said["fast images/USD"] == "25000"
    assert said["slow images/USD"] == "100000"
    text = machines.markdown(two, {"fast": 3.6})
    assert "as given (fast 3.6 USD/h)" in text
    assert "not judged" in text


def test_a_failed_cell_shows_its_status(tmp_path: Path) -> None:
    bad = row(cell(), [], status="oom", samples_ms=[], median_ms=None, images_per_s=None)
    run = of_machine(tmp_path, "small", [bad])
    assert line([run], "null", 1)["small (ms)"] == "oom"


def test_machines_without_a_name_are_called_by_their_hardware(tmp_path: Path) -> None:
    runs = []
    for number in range(2):
        run = make_run(tmp_path, [row(cell(), [10.0, 10.0])])
        environment = {**run.header.environment, "machine": f"{number}" * 12}
        runs.append(run.with_header(replace(run.header, environment=environment)))
    assert sorted(machines.names_of(runs).values()) == [
        "A CPU, 2 cores 0000", "A CPU, 2 cores 1111"]  # fmt: skip
    assert set(machines.names_of(runs[:1]).values()) == {"A CPU, 2 cores"}


def test_one_run_of_a_sweep_brings_the_others_along(
    two: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [two[0].name, "--runs", str(two[0].path.parent), "--as", "machines"]
    assert shell(show_command.main, [*words, "--format", "json", "--price", "fast=3.6/h"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {record["machine"] for record in records} == {"slow", "fast"}
    assert {r["usd_per_hour_as_given"] for r in records if r["machine"] == "fast"} == {3.6}
    assert shell(show_command.main, words) == 0
    assert "fast (ms)" in capsys.readouterr().out


@pytest.mark.parametrize("price", ["fast", "fast=", "=2", "fast=0", "fast=-1", "fast=nan",
                                   "fast=inf", "away=2"])  # fmt: skip
def test_a_price_that_is_none_is_refused(two: list[Run], price: str) -> None:
    words = [two[0].name, "--runs", str(two[0].path.parent), "--as", "machines"]
    assert shell(show_command.main, [*words, "--price", price]) == 2
