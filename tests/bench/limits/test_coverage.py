"""What others published, against the modelled ranges: the data, the counts, the picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.commands.claims import main
from bench.limits import coverage
from bench.limits.coverage import BELOW, FASTER, INSIDE, SLOWER, Held, groups, held, left_out
from bench.limits.ledger import ELSEWHERE, MODELS, read_claims
from bench.limits.ranges import COSTED, EFFICIENCY, Modelled, models_of
from bench.show.canvas import image_bytes
from bench.show.coverage import PICTURE, figure, fresh_pictures, is_same
from core.cli import run as shell
from core.devices import devices
from core.files import ROOT

CLAIMS = coverage.published()
LINES = held(CLAIMS)
BY_ID = {line.claim.id: line for line in LINES}


def test_what_others_published_is_clean() -> None:
    """Every figure is a time at stated conditions, on a known device, with a source; and each row
    that is not used says why."""
    elsewhere = read_claims(ELSEWHERE)
    assert len(elsewhere) > 70
    for claim in elsewhere:
        assert claim.source, claim.id
        assert claim.software, claim.id
        assert claim.hardware in devices(), claim.id
        assert claim.model in COSTED, claim.id
        assert claim.call_ms is not None, claim.id
        assert claim.counted, claim.id
        assert claim.batch, claim.id
        assert claim.batch % claim.accelerators == 0 or claim.metric == "latency", claim.id
    out = left_out()
    assert all(each["reason"] and each["source"] for each in out)
    names = [claim.id for claim in CLAIMS] + [each["id"] for each in out]
    assert len(names) == len(set(names))
    assert set(MODELS) <= {*COSTED, "SD-Turbo"}


def test_no_published_figure_is_below_its_floor_and_most_are_inside() -> None:
    assert len(LINES) > 100
    assert not [line.claim.id for line in LINES if line.state == BELOW]
    inside = [line for line in LINES if line.state == INSIDE]
    assert len(inside) >= 0.8 * len(LINES)


def test_the_range_of_gpus_was_not_set_by_what_it_is_held_against() -> None:
    """Its ends are what was assumed and measured elsewhere: some figures are outside of them, and
    each of these has a reason."""
    assert EFFICIENCY["NVIDIA"].compute == (0.10, 0.80)
    gpus = [line for line in LINES if devices()[line.claim.hardware].vendor == "NVIDIA"]
    outside = {line.claim.id for line in gpus if line.state != INSIDE}
    assert outside == set(coverage.MISSES) == {x.claim.id for x in LINES if x.state != INSIDE}
    assert (len(gpus), len(outside)) == (102, 7)


def test_sources_are_counted_beside_figures() -> None:
    every = coverage.Group("all", LINES)
    assert len(every.sources) == 12
    # The many submissions to one round of MLPerf are one source, and so are the three quotations of
    # one announcement and the two revisions of one card.
    counts = {name: len(lines) for name, lines in every.sources.items()}
    assert counts["MLPerf Inference v4.1"] == 35
    assert counts["Stability AI's announcement"] == 3
    assert counts["model card of onnxruntime/sd-turbo"] == 12
    assert sum(counts.values()) == len(LINES)
    wholly = [name for name, lines in every.sources.items()
              if {line.state for line in lines} == {INSIDE}]  # fmt: skip
    assert every.sources_inside == len(wholly) == 7
    for group in groups(LINES, lambda line: line.claim.hardware):
        assert 1 <= len(group.sources) <= len(group.lines)
        assert group.sources_inside <= len(group.sources)


def test_ends_from_the_other_sources_by_hand() -> None:
    """Two sources of one card: each is held against the shares of the other."""
    base = BY_ID["f-or-1-1"]
    one = [replace(base, call_ms=base.model.floor / share) for share in (0.2, 0.4)]
    claim = replace(base.claim, source="another page")
    other = [Held(claim, base.model, base.model.floor / share) for share in (0.1, 0.3)]
    assert coverage.by_other_sources([*one, *other]) == (4, 2)  # 0.2 and 0.3 are between the others
    assert coverage.by_other_sources(one) == (2, 0)


def test_figures_that_are_not_what_the_range_is_of_are_left_out() -> None:
    """A VAE that is not in FP16, and a latency in a queue."""
    reasons = {each["id"]: each["reason"] for each in left_out()}
    assert "not in FP16" in reasons["f-tt-h100-3"]
    assert "a latency in a queue" in reasons["q-k16-v5"]
    assert not {"f-tt-h100-3", "q-k16-v5"} & {claim.id for claim in CLAIMS}
    assert not [claim.id for claim in CLAIMS if "Server" in claim.qualifier]


def test_geforce_cards_add_up_in_two_ways() -> None:
    """The floor and the fast end in FP16, the slow end in FP32 at half the rate."""
    for name in ("rtx-4090", "rtx-3090", "rtx-2080-ti"):
        card = devices()[name]
        assert card.slower_fp16_tflops == pytest.approx(card.fp16_tflops_dense / 2, rel=0.01)
        # 8 bits are twice as fast as FP16 at its fastest.
        assert card.int8_tops_dense == pytest.approx(2 * card.fp16_tflops_dense, rel=0.01)
    assert devices()["h100-sxm"].slower_fp16_tflops == devices()["h100-sxm"].fp16_tflops_dense
    line = BY_ID["f-ll-rtx-4090-25"]
    assert line.model.fast == pytest.approx(line.model.floor / 0.8, rel=0.02)
    assert line.model.slow == pytest.approx(2 * line.model.floor / 0.1, rel=0.02)


def test_every_device_has_a_document_and_says_what_was_not_read_in_it() -> None:
    for device in devices().values():
        if device.kind_of_figure == "measured":
            continue
        assert device.url.startswith("http"), device.name
        assert "memory" not in device.source, device.name
    unchecked = {device.name for device in devices().values() if device.not_checked}
    assert "a10g" in unchecked
    assert not {"ai100-standard", "ai100-pro", "ai100-ultra", "rtx-4090", "h100-sxm"} & unchecked


def test_an_offline_rate_by_hand() -> None:
    """16.4176 images a second on 8 cards are 487 ms of one card; 40 evaluations of 6761 GFLOP and
    the rest at 1979 TOPS are 142 ms at least."""
    line = BY_ID["m41-009"]
    assert line.call_ms == pytest.approx(8e3 / 16.4176)
    assert line.model.floor == pytest.approx((40 * 6761.2 + 10470 + 110) / 1979, rel=0.003)
    # In 8 bits the UNet only, in the range.
    by_hand = (40 * 6761.2 / 1979 + (10470 + 110) / 989) / 0.8
    assert line.model.fast == pytest.approx(by_hand, rel=0.01)
    assert models_of(replace(line.claim, precision="fp16"))[0].floor > line.model.floor
    assert models_of(replace(line.claim, hardware="h200-sxm-achieved")) == []  # no 8-bit peak


def test_states() -> None:
    model = Modelled(1, "vae", floor=10.0, fast=12.0, slow=50.0, switched=60.0)
    claim = CLAIMS[0]
    states = [Held(claim, model, time).state for time in (9.9, 11.0, 12.0, 55.0, 61.0)]
    assert states == [BELOW, FASTER, INSIDE, INSIDE, SLOWER]


def test_the_command_counts_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("table", "markdown"):
        assert shell(main, ["--coverage", "--format", form]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"of {len(LINES)} published figures with a range" in text
        assert "none is below its floor" in text
        assert "what their card's model was fitted to" in text
        assert "they are from 12 sources (35 from MLPerf Inference v4.1)" in text
        assert "could not be read in a document of theirs: a10g, gh200-144gb" in text
        assert "TPUs, Apple's chips, CPUs and phones are not tested" in text
        for word in ("h100-sxm", "ai100-ultra", "TensorRT", "left_out.csv", "eager PyTorch starts"):
            assert word in text
    assert shell(main, ["--coverage", "--format", "json", "--out", str(tmp_path / "picture")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert sum(said["states"].values()) == len(LINES) == len(said["held"])
    assert said["sources"] == {"all": 12, "all_inside": 7}
    assert {line["source"] for line in said["held"]} >= {"MLPerf Inference v4.0"}
    assert {file.name for file in tmp_path.iterdir()} == {"picture.svg", "picture.png"}


def test_a_floor_that_is_beaten_is_said_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    impossible = replace(BY_ID["m41-009"], call_ms=1.0)
    monkeypatch.setattr(coverage, "held", lambda claims: [*LINES, impossible])
    assert shell(main, ["--coverage"]) == 4
    assert "the floor is wrong, or the figure" in " ".join(capsys.readouterr().out.split())


def test_the_page_counts_as_the_command_does() -> None:
    text = (ROOT / "docs" / "cloud-ai-100.md").read_text()
    every = coverage.Group("all", LINES)
    tested, kept = coverage.by_other_sources(LINES)
    for words in (
        f"{every.count(INSIDE)} of {len(LINES)} figures, and all figures of {every.sources_inside}"
        f" of {len(every.sources)} sources, are inside",
        f"{kept} of {tested} would be",
    ):
        assert words in " ".join(text.split()), words


def test_the_picture_of_a_page_is_redrawn_when_it_is_stale(tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / PICTURE
    page.write_text(f"![a picture]({PICTURE})")
    (tmp_path / "other.md").write_text("no picture")
    assert fresh_pictures([tmp_path / "other.md"]) == {}
    (fresh,) = fresh_pictures([page]).items()
    assert fresh[0] == file
    file.write_bytes(fresh[1])
    assert fresh_pictures([page, tmp_path / "other.md"]) == {}
    # As the one that is committed, but for the last digits of a fit.
    assert is_same(fresh[1], (ROOT / "docs" / PICTURE).read_bytes())
    file.write_bytes(image_bytes(figure(LINES[:-1]), "svg"))
    assert set(fresh_pictures([page])) == {file}
    moved = [replace(line, call_ms=1.1 * line.call_ms) for line in LINES]
    file.write_bytes(image_bytes(figure(moved), "svg"))
    assert set(fresh_pictures([page])) == {file}


def test_last_digits_are_no_other_picture() -> None:
    assert is_same(b'<path d="M 10.04 20"/>', b'<path d="M 10.05 20.5"/>')
    assert not is_same(b'<path d="M 10.04 20"/>', b'<path d="M 11.05 20"/>')
    assert not is_same(b'<path d="M 10.04 20"/>', b'<path d="L 10.04 20"/>')
    assert not is_same(b"#Sans-31", b"#Sans-32")  # a digit that is written


def test_every_figure_is_a_point() -> None:
    slower = replace(LINES[0], call_ms=1e6)
    drawn = figure([*LINES, slower])
    points = [line for line in drawn.axes[0].lines if line.get_marker() not in ("None", None, "")]
    assert sum(np.size(line.get_xdata()) for line in points) == len(LINES) + 1
    hollow = [line for line in points if line.get_markerfacecolor() == "white"]
    outside = sum(line.state != INSIDE for line in LINES)
    assert sum(np.size(line.get_xdata()) for line in hollow) == outside + 1


@pytest.mark.parametrize(
    "words", [["--out", "x"], ["--coverage", "--require", "beaten:a100-1img-200"]], ids=str
)
def test_mistakes_are_answered(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(main, words) == 2
    assert "--coverage" in capsys.readouterr().err
