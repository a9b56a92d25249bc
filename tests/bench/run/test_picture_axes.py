"""Strength and encoder as axes of a sweep: cells of their own, a stage of its own, its floor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made import cell, make_run, row

from backends.base import Shapes
from backends.commands.parity import main as parity
from bench.limits.floors import STAGES, call_work, of_row, stage_work, survey
from bench.rows.cell import Cell
from bench.rows.fields import LATER
from bench.rows.store import ROWS, Run, open_run
from bench.rows.summary import by_cell
from bench.run.pictures import start_of, start_picture
from bench.run.plan import make_cells, probe
from bench.run.quality import changes, measure_quality
from bench.run.request import Request
from bench.show import table
from bench.show.page.figures import stages
from bench.show.stages import stages_of
from core.cli import run as shell
from core.errors import PreconditionError
from distill.judge import read_picture
from distill.shapes import layout, render
from export.bundle import Bundle
from export.models import PICTURE_PARTS

Sweep = Callable[..., int]
TIMES = {"text": 1.0, "encode": 3.0, "unet_first": 2.0, "unet_step": None, "decode": 1.0,
         "rest": 0.5}  # fmt: skip


def cells_of(bundle: Bundle, **asked: Any) -> list[Cell]:
    return list(make_cells(bundle, probe(["null"]), Request(decoders=("taesd",), **asked)))


def test_a_cell_for_each_strength_and_encoder(tiny_bundle: Bundle) -> None:
    cells = cells_of(tiny_bundle, steps=(2, 4), strengths=(0.5, 1), encoders=("vae", "taesd"))
    assert [(each.encoder, each.strength, each.steps) for each in cells] == [
        ("vae", 0.5, 2), ("vae", 0.5, 4), ("taesd", 0.5, 2), ("taesd", 0.5, 4),
        ("", 1.0, 2), ("", 1.0, 4),
    ]  # fmt: skip
    assert [each.kept for each in cells] == [1, 2, 1, 2, 2, 4]
    assert len({each.group for each in cells}) == 3
    assert str(cells[0]) == "null taesd batch 1 steps 2 from a picture (vae) strength 0.5"
    assert str(cells[4]) == "null taesd batch 1 steps 2", "text to image, as ever"
    assert cells[4] == cells_of(tiny_bundle, steps=(2,))[0]
    assert Cell.of(cells[0].columns()) == cells[0]


def test_the_encoder_is_that_of_the_decoder(tiny_bundle: Bundle) -> None:
    for decoder in ("vae", "taesd"):
        asked = Request(decoders=(decoder,), steps=(2,), strengths=0.5)
        assert [each.encoder for each in make_cells(tiny_bundle, probe(["null"]), asked)] == [
            decoder
        ]


def test_the_usual_steps_are_those_that_leave_one_to_run(tiny_bundle: Bundle) -> None:
    assert [each.steps for each in cells_of(tiny_bundle, strengths=(0.5,))] == [2, 4]
    assert [each.steps for each in cells_of(tiny_bundle, strengths=(0.25,))] == [4]
    with pytest.raises(PreconditionError, match="no step to run"):
        cells_of(tiny_bundle, strengths=(0.1,))
    with pytest.raises(PreconditionError, match="1 step at strength 0.5 leaves no step"):
        cells_of(tiny_bundle, steps=(1, 2), strengths=(0.5,))


def test_rows_of_before_start_from_noise(tmp_path: Path) -> None:
    made = make_run(tmp_path, [row(cell(steps=n), [10.0] * 3) for n in (1, 2)])
    old = [{k: v for k, v in one.items() if k not in LATER} for one in made.all_rows()]
    (made.path / ROWS).write_text("".join(json.dumps(one) + "\n" for one in old))
    again = Run(made.path, made.header)
    assert [Cell.of(one) for one in again.rows()] == made.plan
    assert {(one["encoder"], one["strength"]) for one in again.rows()} == {("", 1.0)}


def test_tables_and_page_tell_them_apart(tmp_path: Path) -> None:
    plain = row(cell(steps=2), [5.0] * 3)
    pictured = row(cell(steps=2, encoder="vae", strength=0.5), [9.0] * 3, stages_ms=TIMES)
    made = make_run(tmp_path, [plain, pictured])
    text = table.markdown(made, made.rows())
    for header in ("| encoder |", "| strength |", "encode (ms)"):
        assert header in text
    assert "encode" not in table.csv([plain]), "published tables stay as they are"
    assert "strength" not in table.csv([plain])
    assert [each.name for each in stages_of(made, [pictured])][:2] == ["text", "encode (vae)"]
    names = [text.get_text() for text in stages(by_cell(made.rows())).legends[0].get_texts()]
    assert "encoder of the picture" in names


def test_the_encoder_has_its_own_floor_and_the_call_holds_it(tiny_bundle: Bundle) -> None:
    ort = cell(backend="ort", steps=4, precision="fp32", storage="fp16", device="cpu")
    pictured = replace(ort, encoder="vae", strength=0.5)
    surveyed = survey(tiny_bundle.path, [ort, pictured])
    assert set(PICTURE_PARTS) <= set(surveyed["costs"])
    plain, works = stage_work(ort, surveyed), stage_work(pictured, surveyed)
    assert set(plain) == set(STAGES) - {"encode"}
    assert set(works) == set(STAGES)
    counted = surveyed["costs"]["vae_encoder"]["1"]
    assert works["encode"].flops == counted["flops"] > 0
    assert works["encode"].floor_ms > 0
    whole = call_work(pictured, works).flops
    assert whole == pytest.approx(
        works["text"].flops + works["encode"].flops + 2 * works["unet_step"].flops
        + works["decode"].flops
    )  # fmt: skip
    tiny = stage_work(replace(pictured, encoder="taesd"), surveyed)["encode"]
    assert 0 < tiny.flops != works["encode"].flops
    found = of_row({"stages_ms": TIMES, "median_ms": 9.0}, pictured, surveyed)
    assert found is not None
    assert set(found) == {"text", "encode", "unet_step", "decode"}
    assert found["encode"]["floor_ms"] == pytest.approx(works["encode"].floor_ms, abs=1e-4)


def test_a_sweep_from_a_picture(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--backend", "null:encode_ms=30", "--decoder", "taesd", "--steps", "4", "--quick"]
    flags += ["--min-time", "0.01", "--strength", "0.5,1", "--encoder", "vae"]
    assert sweep(tmp_path, *flags) == 0
    pictured, plain = open_run("latest", tmp_path).rows()
    assert (pictured["encoder"], pictured["strength"], pictured["nfe"]) == ("vae", 0.5, 2)
    assert (plain["encoder"], plain["strength"], plain["nfe"]) == ("", 1.0, 4)
    assert pictured["stages_ms"]["encode"] >= 30
    assert "encode" not in plain["stages_ms"]
    assert "stage_gap" not in pictured["flags"]
    assert set(pictured["artifacts"]) - set(plain["artifacts"]) == {"vae_encoder"}
    assert pictured["image_check"]["status"] == "ok"
    assert plain["image_check"]["status"] == "ok"
    capsys.readouterr()
    assert sweep(tmp_path, "--resume", "--strength", "0.25") == 2
    assert "--strength was [0.5, 1.0] and is [0.25]" in capsys.readouterr().err


def test_an_image_from_a_picture_is_held_against_its_own_reference(
    sweep: Sweep, tmp_path: Path
) -> None:
    flags = ["--decoder", "taesd", "--steps", "2,3", "--quick", "--min-time", "0.01"]
    flags += ["--strength", "0.5", "--encoder", "vae"]
    assert sweep(tmp_path, "--backend", "null:fail=wrong", *flags) == 4
    wrong, unknown = open_run("latest", tmp_path).rows()
    assert wrong["status"] == wrong["image_check"]["status"] == "mismatch"
    assert unknown["image_check"]["status"] == "no_reference", "of 3 steps none are drawn"
    assert sweep(tmp_path, "--backend", "ort", *flags, "--steps", "2") == 0
    (real,) = open_run("latest", tmp_path).rows()
    assert real["image_check"]["status"] == "ok"
    assert real["image_check"]["psnr_db"] >= 45


def test_parity_adds_references_from_a_picture(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    before = tiny_bundle.references()
    assert before is not None
    assert shell(parity, ["--model", str(copy), "--strength", "0.67", "--steps", "3"]) == 0
    assert "vae: 2 of 3 steps from a picture (vae)" in capsys.readouterr().out
    after = Bundle.open(copy).references()
    assert after is not None
    assert after.redrawn.keys() - before.redrawn.keys() == {
        ("vae", 3, "vae", 2), ("taesd", 3, "vae", 2)
    }  # fmt: skip
    for words, said in (
        (["--strength", "0.1", "--steps", "4"], "no step to run"),
        (["--strength", "1"], "from no picture"),
        (["--strength", "2"], "above 0 and at most 1"),
        (["--strength", "0.5", "--encoder", "clip"], "no encoder called"),
        (["--encoder", "vae"], "without --strength"),
    ):
        assert shell(parity, ["--model", str(copy), *words]) == 2
        assert said in capsys.readouterr().err


def test_frames_a_second_stand_in_the_row(sweep: Sweep, tmp_path: Path) -> None:
    flags = ["--backend", "null:encode_ms=5,unet_ms=10,decode_ms=5", "--decoder", "taesd"]
    flags += ["--steps", "4", "--quick", "--min-time", "0.01", "--strength", "0.5,1"]
    assert sweep(tmp_path, *flags, "--frames", "4") == 0
    pictured, plain = open_run("latest", tmp_path).rows()
    frames = pictured["frames"]
    assert frames["count"] == 4
    assert 0 < frames["per_s"] < 1000 / (5 + 2 * 10 + 5)
    assert frames["encode_ms"] >= 5
    assert frames["unet_ms"] >= 20
    assert plain["frames"] is None, "it starts from nothing"


def test_changes_are_of_one_attribute_and_held_out() -> None:
    asked = changes(40)
    assert len(asked) == 40
    for scene, wanted, kind in asked:
        (before,), (after,) = scene.objects, wanted.objects
        same = {"reshape": ("size", "colour"), "recolour": ("size", "shape")}[kind]
        assert before != after
        assert all(getattr(before, name) == getattr(after, name) for name in same)
        assert wanted.held_out
        assert wanted.positions == (None,), "the caption names no place"
        assert wanted.background == scene.background != after.colour
    assert [kind for _, _, kind in asked].count("reshape") == 20
    assert changes(10) == asked[:10]


class Retouched:
    """A pipeline that changes what it is told to and moves it so many pixels (a test double)."""

    def __init__(self, pixels: int, right: bool) -> None:
        self.shapes, self.pixels, self.right = Shapes(1, 64, 64), pixels, right

    def __call__(self, prompts: list[str], *, images: Any, **_: Any) -> Any:
        (prompt,), (image,) = prompts, images
        wanted = next(each for each in changes(20) if each[1].caption == prompt)
        scene = replace(wanted[0], objects=wanted[1].objects) if self.right else wanted[0]
        place = read_picture(image)[1][0]
        rng = np.random.default_rng(0)
        (centres, radii) = layout(scene, rng)
        centres = np.array([[place.x + self.pixels, place.y]], centres.dtype)
        return SimpleNamespace(images=render([scene], [(centres, radii)], 64))


def test_the_judge_tells_what_changed_and_what_stayed() -> None:
    one = cell(encoder="vae", strength=0.5, steps=2)
    for pixels, right in ((0, True), (0, False), (6, True)):
        found = measure_quality(Retouched(pixels, right), one, 20, None)  # type: ignore[arg-type]
        assert found["captions"] == 20
        assert found["all"] == (1.0 if right else 0.0)
        assert found["shift_px"] == pytest.approx(pixels, abs=1.0)
        assert (found["kept_place"] > 0.9) == (pixels == 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backend", "null", "--strength", "0"], "above 0 and at most 1"),
        (["--backend", "null", "--strength", "half"], "invalid"),
        (["--backend", "null", "--strength", "0.5", "--steps", "1"], "no step to run"),
        (["--backend", "null", "--encoder", "vae"], "none is started from"),
        (["--backend", "null", "--frames"], "none is started from"),
        (["--backend", "null", "--frames", "5", "--strength", "1"], "none is started from"),
        (["--backend", "null", "--strength", "0.5", "--encoder", "clip"], "no encoder called"),
        (
            ["--backend", "qaic", "--device", "ai100-ultra", "--strength", "0.5"],
            "prices no encoder",
        ),
    ],
)
def test_what_cannot_be_done_starts_nothing(
    sweep: Sweep, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "runs", *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_picture_is_the_reference_or_a_slope(tiny_bundle: Bundle, tmp_path: Path) -> None:
    references = tiny_bundle.references()
    assert references is not None
    assert np.array_equal(start_picture(tiny_bundle), references.images["vae", 4])
    bare = Bundle(tmp_path, tiny_bundle.manifest)
    width, height = tiny_bundle.size
    assert start_picture(bare).shape == (height, width, 3)
    assert start_of(bare, cell()) == {}
    start = start_of(bare, cell(encoder="vae", strength=0.5, batch=2))
    assert (len(start["images"]), start["strength"]) == (2, 0.5)
