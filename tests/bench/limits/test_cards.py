"""Modelled cards in sweeps: rows, tables, plots, report; and the command that answers for them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from made import make_run, row

from backends.modelled import VERSION
from backends.modelled.card import SPLITS, Call, estimate
from backends.modelled.costs import known_costs
from backends.modelled.fit import DDR
from backends.modelled.program import SHARES
from bench.commands.cards import main as cards_main
from bench.limits.cards import SWITCHING
from bench.limits.floors import floor, published
from bench.rows.cell import Cell
from bench.rows.store import Run, open_run, read_rows
from bench.run.runner import with_image
from bench.show import latency as plot
from bench.show import table
from bench.show.export import parquet
from bench.show.page.page import render
from bench.sweep import main as sweep_main
from core.cli import run as shell
from core.devices import devices
from core.files import ROOT
from export.bundle import Bundle

TURBO = ["--backend", "qaic", "--model", "sdxl-turbo", "--steps", "1,2,4", "--batch", "1,4"]
ALL = ["--device", "ai100-standard,ai100-pro", "--device", "ai100-ultra"]
NAMES = ["ai100-standard", "ai100-pro", "ai100-ultra"]


@pytest.fixture(scope="module")
def without_bundle(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """SDXL-Turbo on all three cards, on a machine that never exported anything."""
    out = tmp_path_factory.mktemp("cards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADDBENCH_BUILD", str(out / "build"))
        words = [*TURBO, *ALL, "--decoder", "vae,taesd", "--no-images", "--out", str(out)]
        assert shell(sweep_main, words) == 0
        assert not (out / "build").exists()
    return open_run("latest", out)


def test_figures_without_bundle_or_images(without_bundle: Run) -> None:
    rows = without_bundle.rows()
    assert len(rows) == 3 * 3 * 2 * 2
    assert {each["device"] for each in rows} == set(NAMES)
    assert without_bundle.header.images is False
    for each in rows:
        assert (each["status"], each["provenance"]) == ("ok", "modelled")
        assert (each["weights"], each["bundle_hash"]) == ("none", "")
        assert each["samples_ms"] == []
        assert each["image_check"] is None
        assert each["modelled"]["floor_ms"] < each["low_ms"] < each["median_ms"] < each["high_ms"]
        ends = [each["modelled"][name]["latency"]["high_ms"]
                for name in ("switching", "switching_each")]  # fmt: skip
        assert each["high_ms"] < ends[0] < ends[1]
        stages = each["stages_ms"]
        parts = [stages["text"], stages["unet_first"], stages["decode"], stages["rest"]]
        total = sum(parts) + (each["steps"] - 1) * (stages["unet_step"] or 0.0)
        assert total == pytest.approx(each["median_ms"], rel=1e-3)
        tdp = devices()[each["device"]].tdp_w
        assert each["energy_j"] == pytest.approx(tdp * each["period_ms"] / 1e3, rel=1e-3)


def test_nothing_of_this_machine_is_in_a_modelled_row(without_bundle: Run) -> None:
    for each in without_bundle.rows():
        for name in ("peak_memory_mb", "load_s", "compile_s", "cold_ms", "cpu_freq_mhz",
                     "other_cpu", "roofline", "accelerator", "cv"):  # fmt: skip
            assert each[name] is None, name


def test_rows_of_an_older_model_are_marked_and_stay_as_they_are(without_bundle: Run) -> None:
    rows = without_bundle.rows()
    assert {each["modelled"]["version"] for each in rows} == {VERSION}
    text = table.markdown(without_bundle, rows)
    assert "| superseded" not in text
    older = [
        {**each, "modelled": {k: v for k, v in each["modelled"].items() if k != "version"}}
        for each in rows
    ]
    marked = table.markdown(without_bundle, older)
    assert marked.count("| superseded") == len(rows)
    assert "model it again" in marked


def test_an_ultra_runs_four_side_by_side(without_bundle: Run) -> None:
    found = {(e["device"], e["batch"]): e for e in without_bundle.rows()
             if (e["decoder"], e["steps"]) == ("taesd", 1)}  # fmt: skip
    one, four = found["ai100-ultra", 1], found["ai100-ultra", 4]
    assert four["median_ms"] == one["median_ms"]
    assert one["period_ms"] == pytest.approx(one["median_ms"] / 4, rel=1e-3)
    assert found["ai100-pro", 4]["median_ms"] > found["ai100-pro", 1]["median_ms"]
    assert [found[name, 4]["modelled"]["split"] for name in NAMES] == ["batch"] * 2 + ["pipelines"]


def test_every_figure_is_labelled(
    without_bundle: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = without_bundle.rows()
    text = table.markdown(without_bundle, rows)
    assert "provenance modelled" in text
    assert "nothing was timed" in text
    header = next(line for line in text.splitlines() if line.startswith("| weights"))
    for column in ("low (ms)", "high (ms)", "high, switching (ms)", "images/J at TDP"):
        assert column in header
    assert "samples" not in header
    assert without_bundle.header.environment["cpu"] not in text
    table.show(without_bundle, rows, width=300)
    assert "modelled" in capsys.readouterr().out

    drawn = plot.figure([(without_bundle, rows)])
    assert drawn is not None
    words = [each.get_text() for each in drawn.texts]
    assert any("modelled, not measured" in each for each in words)
    assert all(axes.get_title(loc="left").endswith("modelled") for axes in drawn.axes)
    series = [each.get_text() for each in drawn.legends[0].get_texts()]
    assert series
    assert all("modelled" in each for each in series)

    page = render(without_bundle)
    assert "sdxl-turbo on ai100-standard, ai100-pro, ai100-ultra, modelled" in page
    assert page.count("Provenance: modelled.") == 2
    assert "12 samples" not in page
    assert "a call takes" in page
    assert "measurements are ok" not in page


def test_a_plot_of_both_says_which_is_which(without_bundle: Run, tmp_path: Path) -> None:
    modelled = without_bundle.rows()[0]
    cell = dataclasses.replace(Cell.of(modelled), backend="ort", options="", device="cpu")
    both = make_run(tmp_path, [row(cell, [900.0] * 3), modelled])
    drawn = plot.figure([(both, both.rows())])
    assert drawn is not None
    (axes,) = drawn.axes
    names = [each.get_text() for each in axes.get_yticklabels()]
    assert sorted("modelled" in name for name in names) == [False, True]
    assert "nothing was timed" in table.markdown(both, both.rows())


def test_modelled_rows_as_parquet(without_bundle: Run) -> None:
    import io

    import pyarrow.parquet as pq

    read = pq.read_table(io.BytesIO(parquet(without_bundle))).to_pylist()
    for got, kept in zip(read, without_bundle.rows(), strict=True):
        assert got["modelled"] == kept["modelled"]
        assert got["period_ms"] == kept["period_ms"]


def test_rows_from_before_these_columns_can_be_read(without_bundle: Run, tmp_path: Path) -> None:
    old = dict(without_bundle.rows()[0])
    for name in ("low_ms", "high_ms", "period_ms", "modelled"):
        del old[name]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(old) + "\n")
    (read,) = read_rows(file)
    assert read["modelled"] is read["low_ms"] is None


def test_images_are_checked_and_nothing_of_their_making_is_a_figure(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    words = ["--model", str(tiny_bundle.path), "--backend", "qaic", "--device", "ai100-ultra"]
    words += ["--batch", "2", "--steps", "2", "--decoder", "taesd", "--no-roofline"]
    assert shell(sweep_main, [*words, "--out", str(tmp_path)]) == 0
    run = open_run("latest", tmp_path)
    (made,) = run.rows()
    assert made["image_check"]["status"] == "ok"
    assert made["image_check"]["psnr_db"] < 100  # FP16 between the parts shows
    assert made["nfe"] == 2
    assert made["peak_memory_mb"] is None  # of the worker, not of the card
    assert made["compile_s"] is made["cold_ms"] is None
    assert made["median_ms"] < 100
    assert "Images: " in table.markdown(run, [made])


def test_a_split_that_does_not_fit_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--backend", "qaic:split=parts", "--device", "ai100-pro,ai100-ultra", "--no-images"]
    words += ["--model", "sdxl-turbo", "--steps", "1", "--decoder", "vae", "--out", str(tmp_path)]
    assert shell(sweep_main, words) == 4
    pro, ultra = open_run("latest", tmp_path).rows()
    assert (pro["status"], ultra["status"]) == ("skipped", "ok")
    assert "4 parts" in pro["error"]["what"]
    assert pro["provenance"] == "modelled"
    assert "split=batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "ort", "--no-images"], "--no-images does not fit --backend ort"),
        (["--backend", "ort", "--device", "ai100-ultra"], "fits no backend"),
        (["--backend", "qaic", "--device", "ai100-ultra", "--model", "sdxl-turbo"], "--no-images"),
        (["--backend", "qaic", "--device", "abacus"], "abacus"),
        (["--backend", "qaic", "--device", "a10g"], "no Qualcomm card"),
        (
            ["--backend", "qaic", "--device", "ai100-pro", "--model", "none", "--no-images"],
            "no bundle of none",
        ),
    ],
)
def test_mistakes_are_answered(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    assert shell(sweep_main, [*words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_images_is_not_resumed(
    without_bundle: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--resume", without_bundle.name, "--out", str(without_bundle.path.parent)]
    assert shell(sweep_main, words) == 2
    assert "start it again: addbench sweep" in capsys.readouterr().err


def test_the_plan_says_modelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TURBO, "--device", "ai100-ultra", "--no-images", "--dry-run", "--out", str(tmp_path)]
    assert shell(sweep_main, words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.endswith(": modelled")]) == 12


def test_a_failed_image_keeps_its_error_and_no_figure() -> None:
    made = {"status": "non_finite", "error": {"what": "infinite"}, "peak_memory_mb": 3.0}
    found = with_image({"status": "ok", "median_ms": 1.0, "provenance": "modelled"}, made)
    assert found == {
        "status": "non_finite", "error": {"what": "infinite"}, "provenance": "modelled"
    }  # fmt: skip


# ---- against the roofline


@pytest.mark.parametrize("name", NAMES)
def test_no_modelled_time_is_below_the_roofline_of_the_card(name: str) -> None:
    """The floor of a whole card: all its SoCs, and activations through its memory."""
    costs, card, ceilings = known_costs("sdxl-turbo", (512, 512)), devices()[name], published(name)
    for decoder in ("vae", "taesd"):
        for batch in (1, 4, 8):
            floors = {}
            for part, cost in costs.items():
                at = dataclasses.replace(
                    cost,
                    flops=batch * cost.flops,
                    activation_bytes=batch * cost.activation_bytes,
                    by_kind={kind: batch * flops for kind, flops in cost.by_kind.items()},
                )
                found = floor(at, ceilings, "fp16", "fp16")
                assert found is not None
                floors[part] = found.ms
            for steps in (1, 2, 4):
                least = floors["text_encoder"] + floors["text_encoder_2"]
                least += steps * floors["unet"] + floors[f"{decoder}_decoder"]
                for split in SPLITS[: 3 if card.socs > 3 else 2]:
                    modelled = estimate(card, costs, Call(decoder, steps, batch, split))
                    assert 1e3 * modelled.latency.low >= least
                    assert split == "parts" or 1e3 * modelled.period.low >= least


# ---- the command


def test_the_command_answers_for_the_claim(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(cards_main, ["--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["provenance"] == "modelled"
    found = {(o["device"], o["decoder"], o["steps"], o["split"]): o for o in said["options"]}
    assert len(found) == 18 + 2 * 12
    ultra = {key[1:]: each for key, each in found.items() if key[0] == "ai100-ultra"}
    ways = {key: [each["verdict"], *(each["switching"][way]["verdict"] for way in SWITCHING)]
            for key, each in ultra.items()}  # fmt: skip
    never = ["beyond the range"] * 3
    assert ways["taesd", 1, "pipelines"] == ["time to spare", "fits", "beyond the range"]
    assert ways["taesd", 1, "batch"] == ["time to spare", "time to spare", "fits"]
    assert ways["taesd", 2, "pipelines"] == ["fits", *never[1:]]
    assert ways["vae", 1, "pipelines"] == ["fits", *never[1:]]
    assert ways["vae", 2, "batch"] == ["fits", *never[1:]]
    assert ways["vae", 2, "pipelines"] == ways["vae", 4, "pipelines"] == never
    assert ways["taesd", 4, "batch"] == ways["taesd", 4, "pipelines"] == never
    assert ways["vae", 4, "parts"] == ["impossible"] * 3
    for each in said["options"]:
        period = each["period"]
        assert period["low_ms"] < period["mid_ms"] < period["high_ms"]
        tdp = devices()[each["device"]].tdp_w
        joules = tdp * period["mid_ms"] / 1e3
        assert each["images_per_joule_at_tdp"] == pytest.approx(4 / joules, rel=1e-2)
    assert {(each["share_of_scores"], each["ddr"]) for each in said["fits"]} == {
        (share, ddr) for share in SHARES for ddr in DDR
    }
    assert sum(each["weight"] for each in said["fits"]) == pytest.approx(1)
    assert any("matmul 82% of the peak" in each["at_bounds"] for each in said["fits"])
    for each in said["fits"]:
        for kind in ("matmul", "conv"):
            assert each[kind]["held_out_p90"] > each[kind]["held_out_median"] > 1
    inside = said["inside_8_of_10"]
    assert 0.8 * inside["rows"] <= inside["inside"] <= inside["rows"]
    for off in said["sdxl_measured_over_modelled_without_its_rows"].values():
        assert list(off) == [str(share) for share in SHARES]
        assert 1.1 < off["0.5"] < 1.25


def test_the_command_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("table", "markdown"):
        assert shell(cards_main, ["--format", form]) == 0
        text = capsys.readouterr().out
        assert text.count("modelled, not measured") == 3
        text = " ".join(text.split())
        for words in ("families held out", "switches programs once", "at each of its programs",
                      "fine detail", "at TDP", "of the DDR's bandwidth", "is extrapolated",
                      "on a bound in some", "operator_matmul_us 0", *NAMES):  # fmt: skip
            assert words in text, words


def test_other_targets_batches_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "ai100-pro", "--steps", "1", "--decoder", "taesd", "--format", "json"]
    assert shell(cards_main, [*words, "--batch", "1", "--target", "5"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {each["verdict"] for each in said["options"]} == {"impossible"}
    assert {each["split"] for each in said["options"]} == {"pipelines", "batch"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "a10g"], "no Qualcomm card"),
        (["--device", "abacus"], "abacus"),
        (["--batch", "0"], "at least 1"),
        (["--target", "-1"], "positive"),
        (["--model", "abacus"], "no model"),
        (["--decoder", "jpeg"], "no decoder"),
    ],
)
def test_mistakes_at_the_command(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell(cards_main, words) == 2
    assert message in capsys.readouterr().err


def test_the_columns_are_documented() -> None:
    text = (ROOT / "results" / "README.md").read_text()
    for name in ("low_ms", "high_ms", "period_ms", "modelled"):
        assert f"`{name}`" in text


def lines_of(text: str) -> Iterator[tuple[str, list[float]]]:
    """What each bullet or row of Markdown says without its numbers, and the numbers."""
    number = r"\d+(?:\.\d+)?"
    for line in text.splitlines():
        if line.startswith(("- ", "| ")) and "---" not in line:
            words = " ".join(re.sub(number, "#", line).split())
            yield words, [float(each) for each in re.findall(number, line)]


def test_the_docs_say_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Every line of the page's blocks is the command's, within a few percent: another machine
    rounds a fit otherwise."""
    text = (ROOT / "docs" / "cloud-ai-100.md").read_text()
    blocks = re.findall(r"<!-- modelled: addbench cards(.*?) -->\n(.*?)<!-- /modelled -->", text,
                        re.DOTALL)  # fmt: skip
    assert len(blocks) == 4
    tables = 0
    for words, block in blocks:
        assert shell(cards_main, [*words.split(), "--format", "markdown"]) == 0
        said = list(lines_of(capsys.readouterr().out))
        for line, numbers in lines_of(block):
            tables += line.startswith("|")
            assert any(
                line == other and numbers == pytest.approx(ours, rel=0.03, abs=0.011)
                for other, ours in said
            ), (line, numbers)
    assert tables == 1 + 12 + 1 + 18


def test_guidance_on_two_devices_is_no_gain_offline() -> None:
    """What the page says of Qualcomm's own way to speed SDXL up."""
    costs, card = known_costs("sdxl-base", (1024, 1024)), devices()["ai100-ultra"]
    alone, shared = (
        estimate(card, costs, Call("vae", 20, 4, split, unet_inputs=2)).once.period.mid
        for split in ("pipelines", "guidance")
    )
    text = (ROOT / "docs" / "cloud-ai-100.md").read_text()
    assert f"`split=guidance` is {shared / alone - 1:.0%} slower than `pipelines`" in text
