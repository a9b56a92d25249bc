"""The model that ships, as a user meets it: bundle, sweep with judged pictures, table, plots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backends.commands.image import main as generate
from bench.commands.gallery import main as gallery
from bench.commands.show import main as show
from bench.rows.store import Row, Run, open_run
from core.errors import PreconditionError
from core.files import ROOT, read_json
from distill.judge import following
from distill.shapes import parse_caption
from export.bundle import Bundle

SHIPPED = ROOT / "models" / "shapes-turbo"
CAPTIONS = 24


@pytest.fixture(scope="module")
def run(shapes_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from bench.sweep import main

    out = tmp_path_factory.mktemp("runs")
    words = ["--model", str(shapes_bundle.path), "--backend", "ort", "--backend", "torch"]
    words += ["--steps", "1,4", "--batch", "4", "--decoder", "vae", "--quality", str(CAPTIONS)]
    words += ["--rounds", "1"]
    words += ["--min-samples", "3", "--min-time", "0.01", "--max-time", "5", "--out", str(out)]
    assert main(words) == 0
    return open_run("latest", out)


def shares(rows: list[Row], steps: int) -> list[float]:
    return [row["quality"]["all"] for row in rows if row["steps"] == steps]


def test_every_backend_draws_what_captions_say(run: Run) -> None:
    """As right as the shipped model is on record to be, within three standard errors."""
    rows = run.rows()
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["image_check"]["status"] for row in rows} == {"ok"}
    recorded = {row["steps"]: row["all"] for row in read_json(SHIPPED / "quality.json")["student"]}
    for steps in (1, 4):
        least = recorded[steps] - 3 * np.sqrt(recorded[steps] * (1 - recorded[steps]) / CAPTIONS)
        found = shares(rows, steps)
        assert len(found) == 2
        assert min(found) >= least
        assert max(found) - min(found) <= 2 / CAPTIONS  # FP16 weights turn few captions
    assert all(row["quality"]["fid_shapes"] is None for row in rows)  # of so few captions


@pytest.mark.parametrize("wanted", [0.9, 1.0])
def test_a_picture_below_the_gate_of_pixels_is_held_against_the_judge(
    run: Run, shapes_bundle: Bundle, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that no picture passes; the shipped model's 200 captions are 95% right or more."""
    from backends.check import gate
    from backends.registry import parse_backend
    from bench import worker
    from bench.rows.cell import Cell
    from bench.run.measure import StopRule

    monkeypatch.setattr(gate, "gate_for", lambda *_: gate.Gate(0.0, 1000.0, 1.0))
    accepts = worker.judge_accepts
    monkeypatch.setattr(
        worker,
        "judge_accepts",
        lambda quality, root, cell: accepts({**quality, "all": wanted}, root, cell),
    )
    first = next(row for row in run.rows() if (row["backend"], row["steps"]) == ("ort", 1))
    rule = StopRule(min_samples=3, min_time=0.0, warmup=0, quality=200)
    work = worker.Worker(shapes_bundle, parse_backend("ort"), [Cell.of(first)], rule)
    work.load()
    with open("/dev/null", "w") as nothing:
        row = work.run(0, worker.Reporter(nothing))
    work.pipe.close()
    assert row["image_check"]["status"] == "mismatch"
    assert row["quality"]["captions"] == 200
    assert row["samples_ms"]  # kept, whatever becomes of the row
    if wanted == 1.0:
        assert (row["status"], row["error"]) == ("ok", None)
        assert "below_gate" in row["flags"]
    else:
        assert row["status"] == row["error"]["type"].lower() == "mismatch"
        assert "below_gate" not in row["flags"]


def test_quality_is_drawn_against_latency(run: Run, tmp_path: Path) -> None:
    assert show([str(run.path), "--as", "quality", "--out", str(tmp_path / "quality")]) == 0
    assert Image.open(tmp_path / "quality.png").width > 500


def test_an_image_shows_its_prompt(shapes_bundle: Bundle, tmp_path: Path) -> None:
    prompt, file = shapes_bundle.model.prompts[3], tmp_path / "image.png"
    words = [prompt, "--model", str(shapes_bundle.path), "--steps", "4", "--decoder", "vae"]
    assert generate([*words, "--seed", "1", "--out", str(file)]) == 0
    image = np.asarray(Image.open(file).convert("RGB"))[None]
    assert following(image, [parse_caption(prompt)])["all"] == 1.0


def test_the_gallery_has_a_row_per_step_count(
    shapes_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, words = tmp_path / "gallery.png", ["--model", str(shapes_bundle.path)]
    assert gallery([*words, "--steps", "1,2", "--prompts", "3", "--out", str(file)]) == 0
    assert "2 rows of 3 prompts" in capsys.readouterr().out
    assert Image.open(file).height > 200


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--out", "gallery.jpg"], "not a PNG"),
        (["--prompts", "0"], "draws nothing"),
        (["--backend", "nothing"], "nothing"),
        (["--beside", "no-model"], "no bundle of no-model"),
    ],
)
def test_a_gallery_that_cannot_be_drawn_says_so_first(
    words: list[str], what: str, shapes_bundle: Bundle
) -> None:
    with pytest.raises(PreconditionError, match=what):
        gallery(["--model", str(shapes_bundle.path), *words])
