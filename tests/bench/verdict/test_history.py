"""A run against the machine's earlier ones: the band, the exit codes, what is left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from made import cell, make_run, row

from bench.commands.compare import main
from bench.rows.store import HEADER, ROWS, Run
from bench.verdict.history import Band
from core.cli import run as shell


def runs(out: Path, medians: Sequence[float], **columns: object) -> list[Run]:
    """One run for each median, in that order."""
    return [make_run(out, [row(cell(), [each], **columns)]) for each in medians]


def judged(out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    code = shell(main, ["--history", "--runs", str(out), "--format", "json"])
    return code, json.loads(capsys.readouterr().out)


QUIET = [10 + 0.05 * (n % 3) for n in range(10)]


def test_the_band() -> None:
    assert Band(QUIET).limit == 0.08
    rng = np.random.default_rng(0)
    wild = Band([10 * np.exp(rng.normal(0, 0.05)) for _ in range(500)])
    assert wild.limit == pytest.approx(4 * 0.05, rel=0.15)


@pytest.mark.parametrize(
    ("last", "verdict", "code"),
    [(10.5, "same", 0), (11.5, "slower", 3), (8.0, "faster", 0)],
)
def test_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], last: float, verdict: str, code: int
) -> None:
    made = runs(tmp_path, [*QUIET, last])
    found, outcome = judged(tmp_path, capsys)
    assert (found, outcome["cells"][0]["verdict"]) == (code, verdict)
    assert outcome["cells"][0]["base_rounds"] == 10
    assert (made[-1].path / "history.svg").stat().st_size > 1000


def test_an_unquiet_past_widens_the_band(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(tmp_path, [*(10 + (n % 5) * 0.8 for n in range(12)), 13.5])
    assert judged(tmp_path, capsys)[0] == 0


def test_nine_runs_are_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs(tmp_path, [*QUIET[:9], 30.0])
    code, outcome = judged(tmp_path, capsys)
    assert code == 5
    assert "10 are needed" in outcome["cells"][0]["reason"]


def test_only_earlier_runs_of_this_machine_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = runs(tmp_path, [*QUIET, *QUIET, 10.0])
    for place, run in enumerate(made[:10]):
        header = json.loads((run.path / HEADER).read_text())
        if place % 2:
            header["environment"]["machine"] = "another"
        else:
            header["ab"] = {"side": "base"}
        (run.path / HEADER).write_text(json.dumps(header))
    assert judged(tmp_path, capsys)[1]["cells"][0]["base_rounds"] == 10
    code = shell(main, ["--history", made[15].name, "--runs", str(tmp_path), "--format", "json"])
    assert code == 5  # five before it
    capsys.readouterr()


def test_a_damaged_run_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = runs(tmp_path, [*QUIET, 10.0, 10.0])
    (made[3].path / ROWS).write_text("nonsense\n")
    code = shell(main, ["--history", "--runs", str(tmp_path), "--format", "json"])
    text = capsys.readouterr()
    assert code == 0
    assert made[3].name in text.err


def test_failed_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs(tmp_path, QUIET)
    make_run(tmp_path, [row(cell(), [], status="crashed", median_ms=None)])
    code, outcome = judged(tmp_path, capsys)
    assert (code, outcome["cells"][0]["verdict"]) == (4, "failed")


def test_what_has_no_speed_and_what_is_modelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(tmp_path, QUIET, provenance="modelled")
    make_run(tmp_path, [row(cell(), [], provenance="emulated")])
    code, outcome = judged(tmp_path, capsys)
    assert code == 5
    assert "no speed" in outcome["cells"][0]["reason"]
    runs(tmp_path, [100.0])
    code, outcome = judged(tmp_path, capsys)
    assert code == 5
    assert "0 earlier runs have it" in outcome["cells"][0]["reason"]


def test_it_takes_one_run(tmp_path: Path) -> None:
    assert shell(main, ["--history", "a", "b", "--runs", str(tmp_path)]) == 2
    assert shell(main, ["--history", "--max-slowdown", "20", "--runs", str(tmp_path)]) == 2
    assert shell(main, ["--history", "--runs", str(tmp_path)]) == 2
