"""Judging a cell's pictures, and drawing quality against speed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import cell

from bench.run.progress import Display
from bench.run.quality import (
    JUDGE_CAPTIONS,
    JUDGE_TOLERANCE,
    full_batches,
    judge_accepts,
    measure_quality,
    require_judge,
)
from bench.show.quality import figure, series_of
from core.errors import PreconditionError
from core.files import ROOT, sha256_file, write_json
from distill.fidelity import LEAST_PICTURES
from distill.shapes import draw, parse_caption


class DrawingPipeline:
    """A double of a pipeline: draws what the captions say, and nothing for every `blank`-th."""

    def __init__(self, batch: int, blank: int = 0) -> None:
        self.batch, self.blank = batch, blank

    def __call__(self, prompts: Sequence[str], *, steps: int, seed: Sequence[int]) -> Any:
        assert len(prompts) == len(seed) == self.batch  # a static graph takes no other number
        images = np.stack(
            [draw([parse_caption(p)], s)[0] for p, s in zip(prompts, seed, strict=True)]
        )
        for place, number in enumerate(seed):
            if self.blank and number % self.blank == 0:
                images[place] = 128
        return SimpleNamespace(images=images)


def judged(pipe: DrawingPipeline, captions: int) -> dict[str, Any]:
    of = cell(batch=pipe.batch)
    return measure_quality(pipe, of, captions, None)  # type: ignore[arg-type]


def test_drawn_pictures_are_all_right_whatever_the_batch() -> None:
    found = judged(DrawingPipeline(batch=4), 30)
    assert found["all"] == found["all_1"] == found["all_3"] == 1.0
    assert found["captions"] == 30
    assert found["fid_shapes"] is None
    assert judged(DrawingPipeline(batch=7), 30) == found


def test_a_fid_wants_a_least_number_of_pictures_and_names_its_network() -> None:
    of = cell(batch=8)
    fid = ROOT / "models" / "shapes-turbo" / "fid"
    few, enough = (
        measure_quality(DrawingPipeline(batch=8), of, count, fid)  # type: ignore[arg-type]
        for count in (LEAST_PICTURES - 1, LEAST_PICTURES)
    )
    assert few["fid_shapes"] is None
    assert "fid_network" not in few
    assert 0 < enough["fid_shapes"] < 4  # drawings of the same scenes from other seeds
    assert enough["fid_network"] == int(sha256_file(fid / "fid.safetensors")[:8], 16)


@given(
    share=st.floats(0.0, 1.0),
    recorded=st.floats(0.0, 1.0),
    captions=st.integers(1, 600),
    decoder=st.sampled_from(["vae", "taesd"]),
    steps=st.sampled_from([1, 2, 3]),
)
def test_the_judge_accepts_what_it_knows_and_nothing_else(
    share: float, recorded: float, captions: int, decoder: str, steps: int
) -> None:
    judged: Any = {"all": share, "captions": captions}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        assert not judge_accepts(judged, root, cell(decoder=decoder, steps=steps))
        rows = [{"steps": count, "all": recorded} for count in (1, 2)]
        empty: list[Any] = []
        record = {"student": rows, "tiny": empty} if decoder == "vae" else {"tiny": rows}
        write_json(root / "quality.json", record)
        accepted = judge_accepts(judged, root, cell(decoder=decoder, steps=steps))
        pictured = cell(decoder=decoder, steps=steps, encoder="vae", strength=0.5)
        assert not judge_accepts(judged, root, pictured)
    good = captions >= JUDGE_CAPTIONS and share >= recorded - JUDGE_TOLERANCE
    assert accepted == (good and steps in (1, 2))


def test_how_far_the_judging_is_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    counts: list[int] = []
    pipe: Any = DrawingPipeline(batch=4)
    measure_quality(pipe, cell(batch=4), 10, None, counts.append)  # type: ignore[arg-type]
    assert counts == [4, 8, 10]
    with Display(1, 1) as display:
        display.begin(cell(steps=2))
        display.drawn = -1e9
        display.sampled(4, 10)
        display.sampled(8, 10)  # no more often than every ten seconds
        display.sampled(12)
    said = capsys.readouterr().out
    assert said.count("4 of 10 captions") == said.count("captions") == 1


def test_blank_pictures_count_as_wrong() -> None:
    assert judged(DrawingPipeline(batch=1, blank=3), 30)["all"] == pytest.approx(2 / 3, abs=1e-4)


@given(st.integers(1, 40), st.integers(1, 9))
def test_batches_are_full_and_hold_every_caption_once(count: int, batch: int) -> None:
    captions = [str(number) for number in range(count)]
    parts = list(full_batches(captions, batch))
    assert all(len(part) == batch for _, _, part in parts)
    assert [text for _, wanted, part in parts for text in part[:wanted]] == captions


def test_a_model_that_nothing_can_judge_is_refused() -> None:
    with pytest.raises(PreconditionError, match="does not judge sdxl-turbo"):
        require_judge("sdxl-turbo")


def row(model: str, steps: int, latency: float, share: float | None) -> dict[str, Any]:
    quality = None if share is None else {"all": share, "captions": 600, "fid_shapes": None}
    return {"model": model, "backend": "ort", "options": "", "precision": "fp32", "batch": 2,
            "decoder": "taesd", "steps": steps, "status": "ok", "median_ms": latency,
            "quality": quality}  # fmt: skip


def test_the_plot_has_a_line_per_model_with_points_by_steps() -> None:
    rows = [row("turbo", 4, 80.0, 0.9), row("turbo", 1, 30.0, 0.8), row("teacher", 50, 999.0, 0.95)]
    rows += [row("turbo", 1, latency, 0.8) for latency in (40.0, 200.0)]  # other rounds
    found = series_of(rows)
    assert found["turbo", "ort", "fp32", "taesd"] == [(1, 20.0, 0.8), (4, 40.0, 0.9)]
    drawn = figure(rows, "a machine")
    assert [len(axes.lines) for axes in drawn.axes] == [2, 2]


def test_rows_without_quality_draw_nothing() -> None:
    with pytest.raises(PreconditionError, match="no row says anything of quality"):
        series_of([row("turbo", 1, 30.0, None)])


def test_an_emulated_row_is_judged_and_has_no_place_against_latency() -> None:
    emulated = row("turbo", 1, 30.0, 0.8) | {"median_ms": None}
    with pytest.raises(PreconditionError, match="no row says anything of quality"):
        series_of([emulated])
