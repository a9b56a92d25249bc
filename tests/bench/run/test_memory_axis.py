"""Low memory as an axis of a sweep: cells of their own, a stage of its own, a column for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from made import cell, make_run, row

from bench.rows.cell import Cell
from bench.rows.fields import LATER
from bench.rows.store import ROWS, Run, open_run
from bench.rows.summary import by_cell
from bench.run.measure import Measurement
from bench.run.plan import make_cells, probe
from bench.run.request import Request
from bench.show import export as rows
from bench.show import table
from bench.show.page.figures import stages
from bench.worker import Worker, figures
from core.errors import PreconditionError
from export.bundle import Bundle

Sweep = Callable[..., int]
STAGES = {"text": 1.0, "unet_first": 2.0, "unet_step": None, "decode": 1.0, "rest": 0.5}


def test_cells_with_and_without_are_different_cells(tiny_bundle: Bundle) -> None:
    asked = Request(decoders=("taesd",), steps=(1, 2), low_memory=(False, True))
    cells = make_cells(tiny_bundle, probe(["null", "ort"]), asked)
    assert len(cells) == len(set(cells)) == 8
    assert len({one.group for one in cells}) == 4, "each is measured in a process of its own"
    assert [str(one) for one in cells[:2]] == [
        "null taesd batch 1 steps 1",
        "null taesd batch 1 steps 2",
    ]
    assert str(cells[2]) == "null taesd batch 1 steps 1 low memory"
    assert cells[0].differences(cells[2]) == ["low_memory"]


def test_rows_from_before_the_column_are_read_as_without(tmp_path: Path) -> None:
    made = make_run(tmp_path, [row(cell(steps=n), [10.0] * 3) for n in (1, 2)])
    old = [{k: v for k, v in one.items() if k not in LATER} for one in made.all_rows()]
    (made.path / ROWS).write_text("".join(json.dumps(one) + "\n" for one in old))
    again = Run(made.path, made.header)
    assert [Cell.of(one) for one in again.rows()] == made.plan
    assert {one["low_memory"] for one in again.rows()} == {False}


def test_loading_is_a_stage_that_adds_up() -> None:
    def measured(load_ms: float) -> Measurement:
        return Measurement(
            20.0, None, "measured", 1,  # type: ignore[arg-type]
            samples_ms=[10.0] * 3, text_ms=[1.0] * 3, unet_ms=[[2.0]] * 3, decode_ms=[1.0] * 3,
            rest_ms=[6.0 - load_ms] * 3, load_ms=[load_ms] * 3,
        )  # fmt: skip

    low, resident = (figures(measured(load), 1, 3) for load in (5.0, 0.0))
    assert low["stages_ms"]["load"] == 5.0
    assert low["stages_samples_ms"]["load"] == [5.0] * 3
    assert resident["stages_ms"]["load"] is None, "never 0: there is no such stage"
    assert resident["stages_samples_ms"]["load"] is None
    assert "stage_gap" not in low["flags"]
    lost = measured(5.0)
    lost.load_ms = [0.0] * 3
    assert "stage_gap" in figures(lost, 1, 3)["flags"]


def test_tables_parquet_and_page_tell_them_apart(tmp_path: Path) -> None:
    plain = row(cell(), [5.0] * 3)
    low = row(cell(low_memory=True), [9.0] * 3, stages_ms=STAGES | {"load": 4.0})
    made = make_run(tmp_path, [plain, low])
    text = table.markdown(made, made.rows())
    assert "| low memory |" in text
    assert "loading (ms)" in text
    assert "low memory" not in table.csv([plain]), "published tables stay as they are"
    assert "low memory yes" in table.markdown(made, [low])
    names = [entry["name"] for entry in json.loads(rows.smaller_is_better(made))]
    assert ["low_memory" in name for name in names] == [False, True]
    pq = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    file.write_bytes(rows.parquet(made))
    read = pq.read_table(file).to_pylist()
    assert [one["low_memory"] for one in read] == [False, True]
    assert [one["stages_ms"]["load"] for one in read] == [None, 4.0]
    lines = by_cell(made.rows())
    with_load, without = (
        [text.get_text() for text in stages(some).legends[0].get_texts()]
        for some in (lines, lines[:1])
    )
    assert set(with_load) - set(without) == {"loading parts (low memory)"}


def test_a_sweep_over_both(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--backend", "null:load_ms=25", "--decoder", "taesd", "--steps", "1", "--quick"]
    assert sweep(tmp_path, *flags, "--min-time", "0.01", "--low-memory") == 0
    (found,) = open_run("latest", tmp_path).rows()
    assert found["low_memory"] is True
    assert found["load_s"] == 0, "nothing is loaded before the first call"
    assert found["stages_ms"]["load"] >= 4 * 25
    assert min(found["samples_ms"]) >= 4 * 25, "end to end holds it"
    assert "stage_gap" not in found["flags"]
    capsys.readouterr()
    assert sweep(tmp_path, "--resume", "--low-memory", "0,1") == 2
    assert "--low-memory was [True] and is [False, True]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backend", "ort", "--backend", "torch:mode=graph", "--low-memory"], "on demand"),
        (["--backend", "null", "--low-memory", "2"], "is not 0, 1 or both"),
    ],
)
def test_what_cannot_be_done_starts_nothing(
    sweep: Sweep, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "runs", *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_worker_of_a_split_unet_names_both_artifacts(tiny_bundle: Bundle) -> None:
    from backends.registry import parse_backend
    from bench.run.measure import StopRule

    backend = parse_backend("ort:context=split,threads=1")
    one = cell(backend="ort", options="context=split,threads=1", low_memory=True)
    worker = Worker(tiny_bundle, backend, [one], StopRule())
    shared = worker.load()
    assert set(shared["artifacts"]) == {
        "text_encoder", "text_encoder_2", "unet_context", "unet", "taesd_decoder"
    }  # fmt: skip
    assert len(set(shared["artifacts"].values())) == 5
    assert (shared["load_s"], worker.pipe.low_memory) == (0, True)
    with pytest.raises(PreconditionError):
        Worker(tiny_bundle, parse_backend("torch:mode=graph"), [one], StopRule())
