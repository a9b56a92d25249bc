"""What is drawn from a picture: its own columns, its picture over strength, its place on pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import cell, make_run, row
from PIL import Image

from bench.commands.show import main as show
from bench.rows.store import Row, Run
from bench.rows.summary import by_cell
from bench.show import quality, strength, table
from bench.show.blocks import Drawn, Published, fill
from bench.show.columns import COLUMNS
from bench.show.publish import publish, stale
from core.cli import run as shell
from core.errors import PreconditionError

PAGE = "# Page\n\n<!-- pictures -->\n<!-- /pictures -->\n"
FRAMES = {"count": 100, "per_s": 52.1, "encode_ms": 4.0, "unet_ms": 9.0, "decode_ms": 5.5,
          "rest_ms": 0.7}  # fmt: skip


def judged(share: float, shift: float = 1.1, **more: float) -> dict[str, float]:
    return {"captions": 600, "all": share, "kept_place": 0.9, "shift_px": shift, **more}


def redrawn(share: float, ms: float = 20.0, **of: Any) -> Row:
    usual = {"model": "shapes-turbo", "steps": 4, "encoder": "vae", "strength": 0.5}
    return row(cell(**(usual | of)), [ms] * 3, quality=judged(share))


def rows_of_a_curve() -> list[Row]:
    """Four steps at three strengths through two encoders, and text to image beside them."""
    curve = [
        redrawn(share - 0.1 * (encoder == "taesd"), encoder=encoder, strength=each)
        for encoder in ("vae", "taesd")
        for each, share in ((0.75, 0.99), (0.25, 0.4), (0.5, 0.95))
    ]
    plain = row(cell(model="shapes-turbo", steps=4), [15.0] * 3,
                quality={"captions": 600, "all": 0.8, "fid_shapes": None})  # fmt: skip
    return [*curve, plain]


def column(name: str) -> Any:
    return next(each for each in COLUMNS if each.header == name)


def test_two_tasks_have_two_columns(tmp_path: Path) -> None:
    made = make_run(tmp_path, rows_of_a_curve())
    *pictured, plain = by_cell(made.rows())
    assert {column("captions right (%)").value(line) for line in pictured} == {None}
    assert column("changes right (%)").value(pictured[0]) == pytest.approx(99)
    assert column("captions right (%)").value(plain) == pytest.approx(80)
    for name in ("changes right (%)", "kept place (%)", "shift (px)"):
        assert column(name).value(plain) is None
    text = table.markdown(made, made.rows())
    assert "captions right: of 600 held-out captions" in text
    assert "Changes right: of 600 drawn pictures" in text
    alone = table.csv([made.rows()[-1]])
    assert "changes" not in alone, "published tables stay as they are"
    assert "changes right: of" not in table.quality_words([plain])


def test_quality_against_speed_is_of_text_alone(tmp_path: Path) -> None:
    rows = rows_of_a_curve()
    ((key, points),) = quality.series_of(rows).items()
    assert key[0] == "shapes-turbo"
    assert points == [(4, 15.0, 0.8)]
    with pytest.raises(PreconditionError, match="nothing|no row says anything") as refused:
        quality.series_of(rows[:-1])
    assert "--as strength" in refused.value.next


def test_a_line_for_each_encoder_over_strength() -> None:
    series = strength.series_of(rows_of_a_curve())
    assert [[line.cell.strength for line in lines] for lines in series.values()] == [
        [0.25, 0.5, 0.75]
    ] * 2
    drawn = strength.figure(rows_of_a_curve(), "a machine")
    right, shift, latency = drawn.axes
    assert [list(map(float, line.get_ydata())) for line in right.lines] == [  # type: ignore[arg-type]
        pytest.approx([40, 95, 99]), pytest.approx([30, 85, 89])
    ]  # fmt: skip
    assert [list(line.get_ydata()) for line in shift.lines] == [[1.1] * 3] * 2  # type: ignore[arg-type]
    assert list(latency.lines[0].get_ydata()) == [20.0] * 3  # type: ignore[arg-type]
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert names == [f"null, encoder {each}, decoder taesd, 4 steps" for each in ("vae", "taesd")]


def test_the_command_draws_it_or_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(tmp_path, rows_of_a_curve())
    assert shell(show, [str(made.path), "--as", "strength"]) == 0
    pixels = np.asarray(Image.open(made.path / "strength.png").convert("RGB"))
    assert (pixels != 255).mean() > 0.01
    plain = make_run(tmp_path, rows_of_a_curve()[-1:])
    assert shell(show, [str(plain.path), "--as", "strength"]) == 2
    told = capsys.readouterr().err
    assert "no row says anything of changed pictures" in told
    assert "--strength" in told


def published(target: Run) -> Published:
    return Published(target, target.label, target.rows(), "")


def test_a_page_shows_every_run_from_pictures(tmp_path: Path) -> None:
    assert "published yet" in fill(PAGE, Drawn(), "results")
    plain = make_run(tmp_path, rows_of_a_curve()[-1:])
    assert "published yet" in fill(PAGE, Drawn([published(plain)]), "results")
    curve = make_run(tmp_path, rows_of_a_curve())
    frames = make_run(
        tmp_path, [row(cell(steps=2, encoder="vae", strength=0.5), [20.0] * 3, frames=FRAMES)]
    )
    text = fill(PAGE, Drawn([published(each) for each in (plain, curve, frames)]), "../results")
    assert (
        fill(text, Drawn([published(each) for each in (plain, curve, frames)]), "../results")
        == text
    )
    first, second = text.split(f"[{curve.label}](../results/tables/{curve.label}.md)")
    assert first.count("| vae") == first.count("| taesd   | taesd") == 3, "text alone is left out"
    assert "changes right (%)" in first
    assert "frames/s" not in first
    assert f"(../results/plots/{curve.label}-strength.svg)" in second
    assert "52.1" in second
    assert "frame: UNet (ms)" in second
    assert f"{frames.label}-strength" not in text


def test_publishing_draws_the_curve(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "page.md"
    (results / "published").mkdir(parents=True)
    page.write_text(PAGE)
    made = make_run(tmp_path / "runs", rows_of_a_curve())
    drawn = publish([made], results, [page], {"shapes-strength": made.name})
    assert "plots/shapes-strength-strength.svg" in drawn
    assert "plots/shapes-strength-strength.svg" in page.read_text()
    assert stale(results, [page]) == []
