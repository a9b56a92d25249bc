"""`addbench compare` on made runs: every verdict, every exit code, and bad input."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import cell, make_run, row

from bench.commands.compare import main
from bench.rows.cell import Cell
from bench.rows.header import Header
from bench.rows.store import HEADER, ROWS, Row, Run
from bench.verdict import compare
from core.cli import run as shell
from core.cli import share
from core.errors import AddbenchError

CELLS = [cell(steps=steps) for steps in (1, 2, 4)]


def rows_of(
    factors: Sequence[float], rounds: int = 5, jitter: float = 0.004, seed: int = 0, **columns: Any
) -> list[Row]:
    """Rows of CELLS: 10 ms a step by a factor for each cell, and a little noise."""
    rng = np.random.default_rng(seed)
    return [
        row(each, [10.0 * each.steps * factor * np.exp(rng.normal(0, jitter))], round_, **columns)
        for round_ in range(rounds)
        for each, factor in zip(CELLS, factors, strict=True)
    ]


def changed(run: Run, **fields: Any) -> Run:
    """The run with other values in its header; a dict is merged into what is there."""
    header = json.loads((run.path / HEADER).read_text())
    for name, value in fields.items():
        header[name] = header.get(name, {}) | value if isinstance(value, dict) else value
    (run.path / HEADER).write_text(json.dumps(header))
    return Run(run.path, Header.of(header))


class Compared:
    """Exit code, stdout and stderr of one comparison."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def verdicts(self) -> list[str]:
        return [line["verdict"] for line in self.json["cells"]]

    @property
    def reasons(self) -> str:
        return "; ".join(line["reason"] for line in self.json["cells"])


@pytest.fixture
def both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(base: Run | Path, head: Run | Path, *arguments: str) -> Compared:
        names = [str(one.path if isinstance(one, Run) else one) for one in (base, head)]
        form = () if "--format" in arguments else ("--format", "json")
        code = shell(main, [*names, "--runs", str(tmp_path), *form, *arguments])
        text = capsys.readouterr()
        return Compared(code, text.out, text.err)

    return run


@pytest.fixture
def base(tmp_path: Path) -> Run:
    return make_run(tmp_path, rows_of([1, 1, 1]), rounds=5)


def head(tmp_path: Path, factors: Sequence[float], **more: Any) -> Run:
    rounds = more.pop("rounds", 5)
    return make_run(tmp_path, rows_of(factors, rounds, seed=1, **more), rounds=rounds)


def test_no_change(both: Any, base: Run, tmp_path: Path) -> None:
    found = both(base, head(tmp_path, [1, 1.05, 0.95]))
    assert found.code == 0
    assert found.verdicts == ["same"] * 3
    first = found.json["cells"][0]
    assert first["low"] <= first["ratio"] <= first["high"]
    assert first["steps"] == 1
    assert (first["base_rounds"], first["head_rounds"]) == (5, 5)


def test_slower_and_faster(both: Any, base: Run, tmp_path: Path) -> None:
    found = both(base, head(tmp_path, [1.3, 1, 0.7]))
    assert found.code == 3
    assert found.verdicts == ["slower", "same", "faster"]
    assert found.json["cells"][0]["ratio"] == pytest.approx(1.3, rel=0.02)
    assert both(base, head(tmp_path, [1, 1, 0.5])).code == 0


def test_the_limit_is_a_flag(both: Any, base: Run, tmp_path: Path) -> None:
    run = head(tmp_path, [1.3, 1, 1])
    assert both(base, run, "--max-slowdown", "50").code == 0
    assert both(base, run, "--max-slowdown", "10%").code == 3


def test_few_rounds_are_inconclusive_and_name_ab(both: Any, base: Run, tmp_path: Path) -> None:
    found = both(base, head(tmp_path, [2, 2, 2], rounds=4))
    assert found.code == 5
    assert found.verdicts == ["inconclusive"] * 3
    assert "addbench ab" in found.reasons


def test_noise_is_inconclusive(both: Any, tmp_path: Path) -> None:
    noisy = [make_run(tmp_path, rows_of([1, 1, 1], 5, 0.3, seed), 5) for seed in (1, 2)]
    found = both(*noisy)
    assert found.code == 5
    assert "exclude" in found.reasons


def test_missing_and_failed_cells(both: Any, base: Run, tmp_path: Path) -> None:
    rows = rows_of([1, 1, 1])
    without = make_run(tmp_path, [one for one in rows if one["steps"] != 2], 5)
    found = both(base, without)
    assert found.code == 4
    assert found.verdicts == ["same", "missing", "same"]
    assert both(without, base).verdicts == ["same", "same", "missing"]

    def broken(status: str, rounds: range) -> Run:
        return make_run(
            tmp_path,
            [
                row(CELLS[1], [], one["round"], status=status, median_ms=None)
                if one["steps"] == 2 and one["round"] in rounds
                else one
                for one in rows
            ],
            5,
        )

    found = both(base, broken("mismatch", range(3, 4)))
    assert (found.code, found.verdicts[1]) == (4, "failed")
    assert "mismatch in 1 of 5 rounds" in found.reasons
    assert both(broken("oom", range(5)), base).verdicts[1] == "failed"
    # A base that failed once has fewer rounds, and that is what is said.
    assert "4 and 5 rounds" in both(broken("crashed", range(1)), base).reasons


def test_a_regression_comes_before_a_failure(both: Any, base: Run, tmp_path: Path) -> None:
    rows = [one for one in rows_of([2, 1, 1], seed=1) if one["steps"] != 4]
    assert both(base, make_run(tmp_path, rows, 5)).code == 3


def test_a_retried_row_counts(both: Any, base: Run, tmp_path: Path) -> None:
    bad = row(CELLS[0], [], 0, status="crashed", median_ms=None)
    assert both(base, make_run(tmp_path, [bad, *rows_of([1, 1, 1], seed=1)], 5)).code == 0


def test_nothing_to_compare_is_no_pass(both: Any, tmp_path: Path) -> None:
    empty = [make_run(tmp_path, [], 5) for _ in range(2)]
    found = both(*empty)
    assert found.code == 5
    assert "nothing to compare" in found.json["summary"]


def test_empty_rows_are_missing_cells(both: Any, base: Run, tmp_path: Path) -> None:
    empty = head(tmp_path, [1, 1, 1])
    (empty.path / ROWS).write_bytes(b"")
    found = both(base, empty)
    assert (found.code, set(found.verdicts)) == (4, {"missing"})
    (empty.path / ROWS).unlink()
    assert both(base, empty).code == 4


def test_other_machines(both: Any, base: Run, tmp_path: Path) -> None:
    other = changed(head(tmp_path, [2, 1, 1]), environment={"machine": "f" * 12, "cpu": "Another"})
    found = both(base, other)
    assert found.code == 2
    assert "--allow-other-machine" in found.err
    allowed = both(base, other, "--allow-other-machine")
    assert allowed.code == 5
    assert allowed.verdicts[0] == "slower"
    same = changed(head(tmp_path, [1, 1, 1]), environment={"machine": "f" * 12})
    assert both(base, same, "--allow-other-machine").code == 0


def test_another_gpu_in_the_same_host_is_another_machine(
    both: Any, base: Run, tmp_path: Path
) -> None:
    def gpu(run: Run, name: str) -> Run:
        return changed(run, environment={"accelerators": {"cuda": name}})

    one = gpu(base, "NVIDIA H100 80GB HBM3")
    found = both(one, gpu(head(tmp_path, [1, 1, 1]), "NVIDIA A100-SXM4-80GB"))
    assert found.code == 2
    assert "A CPU and NVIDIA A100" in found.err
    assert both(one, gpu(head(tmp_path, [1, 1, 1]), "NVIDIA H100 80GB HBM3")).code == 0


def test_times_of_two_kinds_are_not_apart(both: Any, base: Run, tmp_path: Path) -> None:
    other = changed(head(tmp_path, [1, 1, 1]), created_utc="2020-01-01T00:00:00")
    assert both(base, other).code == 0


def test_other_models_are_refused(both: Any, base: Run, tmp_path: Path) -> None:
    other = changed(head(tmp_path, [1, 1, 1]), bundle={"name": "sdxl-turbo"})
    found = both(base, other)
    assert found.code == 2
    assert "sdxl-turbo" in found.err


def test_one_run_twice_is_refused(both: Any, base: Run) -> None:
    assert both(base, base).code == 2


def test_provenances_do_not_mix(both: Any, base: Run, tmp_path: Path) -> None:
    found = both(base, head(tmp_path, [0.1, 0.1, 0.1], provenance="modelled"))
    assert found.code == 5
    assert "no ratio mixes" in found.reasons


def test_differences_in_the_environment_are_noted(both: Any, base: Run, tmp_path: Path) -> None:
    other = changed(
        head(tmp_path, [1, 1, 1]),
        environment={"versions": {"torch": "2.14.0"}},
        created_utc="2020-01-01T00:00:00Z",
        git_dirty=True,
    )
    notes = " ".join(both(base, other).json["notes"])
    assert "torch 2.13.0 -> 2.14.0" in notes
    assert "days apart" in notes
    assert "uncommitted" in notes


def test_rows_that_are_missing_or_disturbed_are_noted(both: Any, base: Run, tmp_path: Path) -> None:
    assert both(base, head(tmp_path, [1, 1, 1])).json["notes"] == []
    rows = rows_of([1, 1, 1], rounds=7, seed=1)
    rows[4]["flags"] = ["unstable", "disturbed"]
    rows[5]["flags"] = ["unstable"]
    rows[6]["flags"] = ["no_compiler"]
    found = both(base, make_run(tmp_path, rows, rounds=8))
    notes = found.json["notes"]
    assert "HEAD: 1 of 21 rows are flagged disturbed or throttled" in notes
    assert "HEAD: 1 of 21 rows ran without the operators that a compiler builds" in notes
    assert "HEAD is not complete: 3 of its planned rows are missing" in notes
    assert found.code == 0


def test_markdown_and_table(both: Any, base: Run, tmp_path: Path) -> None:
    run = head(tmp_path, [1.3, 1, 1])
    text = both(base, run, "--format", "markdown")
    assert text.code == 3
    assert f"## {run.name} against {base.name}" in text.out
    assert "**regression: 1 slower, 2 same of 3 cells**" in text.out
    rows = [line for line in text.out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert len({line.count("|") for line in rows}) == 1
    assert "slower" in both(base, run, "--format", "table").out


# ---- bad input


def damaged(run: Run, change: Any) -> Run:
    file = run.path / ROWS
    file.write_bytes(change(file.read_bytes()))
    return run


def test_a_torn_last_line_is_left_out(both: Any, base: Run, tmp_path: Path) -> None:
    found = both(base, damaged(head(tmp_path, [1, 1, 1], rounds=6), lambda data: data[:-40]))
    assert found.code == 0
    assert found.json["cells"][2]["head_rounds"] == 5


def test_of_two_attempts_at_a_round_the_calm_one_counts() -> None:
    """What --patience leaves: a disturbed row, and another of the same cell and round."""
    calm, loud = row(cell(), [10.0] * 5, flags=[]), row(cell(), [30.0] * 5, flags=["disturbed"])
    for attempts in ([loud, calm], [loud, loud, calm]):
        (gathered,) = compare.gather(attempts, "a run").values()
        assert (gathered.medians, gathered.disturbed) == ([10.0], 0)
    with pytest.raises(AddbenchError, match="two results of"):
        compare.gather([calm, calm], "a run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.replace(b'"schema": 1', b'"schema": 7', 1), "schema is 7"),
        (lambda data: b"\x00\xff garbage\n" + data, "is not a row"),
        (lambda data: b'{"name": "other"}\n' + data, "has no `schema`"),
        (lambda data: b"[1, 2]\n" + data, "not an object"),
        (lambda data: data + data.splitlines(keepends=True)[0], "two results of"),
    ],
    ids=["another schema", "binary", "foreign JSON", "no object", "a cell twice"],
)
def test_files_that_are_no_rows(
    both: Any, base: Run, tmp_path: Path, change: Any, words: str
) -> None:
    bad = damaged(head(tmp_path, [1, 1, 1]), change)
    before = (bad.path / ROWS).read_bytes()
    found = both(base, bad)
    assert found.code == 4
    assert words in found.err
    assert (bad.path / ROWS).read_bytes() == before


@pytest.mark.parametrize("value", ["NaN", "-1.0", "Infinity", "null", '"fast"'])
def test_times_that_are_none(both: Any, base: Run, tmp_path: Path, value: str) -> None:
    bad = head(tmp_path, [1, 1, 1])
    line = json.loads((bad.path / ROWS).read_text().splitlines()[0])
    text = json.dumps(line | {"median_ms": "@"}).replace('"@"', value)
    damaged(bad, lambda data: text.encode() + b"\n" + data.split(b"\n", 1)[1])
    found = both(base, bad)
    assert found.code == 4
    assert f"{ROWS}:1 is not a row" in found.err


def test_headers_that_are_none(both: Any, base: Run, tmp_path: Path) -> None:
    run = head(tmp_path, [1, 1, 1])
    header = json.loads((run.path / HEADER).read_text())
    for broken, words in (
        ({**header, "schema": 9}, "schema 9"),
        ({key: value for key, value in header.items() if key != "environment"}, "environment"),
        ({**header, "plan": [{"model": "x"}]}, "plan"),
        ([], "schema None"),
    ):
        (run.path / HEADER).write_text(json.dumps(broken))
        found = both(base, run)
        assert found.code == 2, found.err
        assert words in found.err
    assert both(base, tmp_path / "nowhere").code == 2


def test_wrong_command_lines(both: Any, base: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(main, [str(base.path)]) == 2
    assert "BASE HEAD" in capsys.readouterr().err
    for text in ("0.15", "x", "-5", "nan"):
        assert shell(main, ["a", "b", "--max-slowdown", text]) == 2
    assert share("15") == share("15%") == 0.15


def test_cells_of_unequal_rounds_are_judged_each_by_its_own() -> None:
    sides: list[dict[Cell, compare.Cells]] = []
    for factor, seed in ((1.0, 2), (1.4, 3)):
        rows = rows_of([factor] * 3, 9, seed=seed)
        kept = [one for one in rows if one["round"] < 4 + one["steps"]]
        sides.append(compare.gather(kept, "made"))
    lines = compare.judge(sides[0], sides[1], CELLS, 0.15)
    assert [line.base_rounds for line in lines] == [5, 6, 8]
    assert {line.verdict for line in lines} == {"slower"}


def test_a_long_table_lists_what_is_not_the_same(both: Any, tmp_path: Path) -> None:
    many = [cell(options=f"threads={n}") for n in range(300)]
    sides = [
        [row(each, [10.0 * (1 + 0.5 * side * (n == 7))], r) for r in range(5)
         for n, each in enumerate(many)]
        for side in (0, 1)
    ]  # fmt: skip
    found = both(*(make_run(tmp_path, rows, 5) for rows in sides), "--format", "table")
    assert found.code == 3
    assert "threads=7 " in found.out
    assert "threads=8 " not in found.out
    assert "1 of 300 cells shown" in found.out


@pytest.mark.slow
def test_runs_of_many_rows(both: Any, tmp_path: Path) -> None:
    """100,000 rows a side in well under a minute of this process, whatever else runs."""
    cells = [cell(options=f"threads={n}") for n in range(20_000)]
    made = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        usual = row(cells[0], [10.0] * 10)
        rows = [
            usual | each.columns() | {"round": r, "median_ms": 10 * float(np.exp(jitter))}
            for r in range(5)
            for each, jitter in zip(cells, rng.normal(0, 0.02, len(cells)), strict=True)
        ]
        made.append(make_run(tmp_path, rows, 5))
    started = time.process_time()
    found = both(*made, "--format", "table")
    assert time.process_time() - started < 40
    assert "of 20000 cells" in found.out
