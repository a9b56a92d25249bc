"""The table of stages: what is gathered, and what each figure is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.rows.store import Row, Run
from bench.show.stages import markdown, stages_of
from tests.bench.made import cell, make_run, row

CEILINGS = {
    "device": "cpu",
    "gb_per_s": 20.0,
    "provenance": "measured",
    "tflops": {"fp32": {"matmul": 0.4, "conv": 0.3}},
}


def timed(backend: str, steps: int, decoder: str, unet: float, **columns: Any) -> Row:
    stages = {
        "text": 3.0,
        "unet_first": unet,
        "unet_step": unet if steps > 1 else None,
        "decode": {"taesd": 2.0, "vae": 20.0}[decoder],
        "rest": 0.5,
        "load": None,
    }
    reached = {"tflops": 0.8 / unet, "gb_per_s": 1.0, "floor_ms": 2.0, "fraction": 2.0 / unet}
    asked = cell(backend=backend, steps=steps, decoder=decoder)
    return row(asked, [9.0] * 3, stages_ms=stages, roofline={"unet_step": reached}, **columns)


@pytest.fixture
def made(tmp_path: Path) -> Run:
    rows = [
        timed(backend, steps, decoder, unet, peak_memory_mb=memory)
        for backend, unet in (("null", 4.0), ("ort", 5.0))
        for steps, decoder, memory in ((1, "vae", 300.0), (2, "vae", 310.0), (2, "taesd", 100.0))
    ]
    run = make_run(tmp_path, rows)
    return replace(run, header=replace(run.header, roofline={"ceilings": [CEILINGS]}))


def test_cells_are_gathered_over_steps_and_decoders_but_for_the_decode(made: Run) -> None:
    found = stages_of(made, made.rows())
    names = [(each.name, each.lines[0].cell.backend, len(each.lines)) for each in found]
    assert names == [
        (name, backend, cells)
        for name, cells in (
            ("text", 3),
            ("UNet step", 3),
            ("decode (taesd)", 1),
            ("decode (vae)", 2),
        )
        for backend in ("null", "ort")
    ]


def test_what_the_figures_are(made: Run) -> None:
    first, second = [s for s in stages_of(made, made.rows()) if s.key == "unet_step"]
    assert (first.ms, second.ms) == (4.0, 5.0)
    assert (first.speed, second.speed) == (1.0, 0.8)
    assert first.rate == pytest.approx(200.0)
    assert first.share_of_peak == pytest.approx(50.0), "of 0.4 TFLOP/s"
    assert first.share_of_floor == pytest.approx(50.0)
    assert first.memory == 310.0
    text = stages_of(made, made.rows())[0]
    assert text.rate is None
    assert text.share_of_peak is None


def test_without_ceilings_the_times_stay_and_without_times_there_is_no_table(made: Run) -> None:
    bare = replace(made, header=replace(made.header, roofline=None))
    table = markdown(bare, made.rows())
    assert "share of peak (%)" not in table
    assert table.count("UNet step") == 2, "one a backend"
    failed = [one | {"status": "crashed"} for one in made.rows()]
    assert markdown(made, failed) == ""
