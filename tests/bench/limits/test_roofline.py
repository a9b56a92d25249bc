"""Floors and rates: known figures, proportions that must hold, and the command."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.commands.roofline import main
from bench.commands.show import main as show
from bench.limits import floors
from bench.limits.floors import (
    call_floor_s,
    floor,
    moved_bytes,
    of_row,
    pipelines,
    stage_work,
    survey,
)
from bench.machine import ceilings as measured
from bench.machine.ceilings import Ceilings
from bench.run.plan import default_steps
from bench.show.roofline import figure
from core.cli import run as shell
from core.errors import PreconditionError
from core.files import ROOT
from export.bundle import Bundle
from export.cost import Cost, part_cost_at
from export.models import MODELS
from export.source.checkpoint import open_checkpoint
from tests.bench.made import cell, make_run, row

PEAK = Ceilings("cpu", {"fp32": {"matmul": 2.0, "conv": 1.0}}, 10.0, "measured")
COST = Cost("unet", 3e12, 2 * 10**9, 10**9, {"linear": 1e12, "conv": 1e12, "attention": 1e12})


def test_a_floor_by_hand() -> None:
    found = floor(COST, PEAK, "fp32", "fp32")
    assert found is not None
    # 2 TFLOP of products at 2 TFLOP/s and 1 TFLOP of convolutions at 1; 3 GB at 10 GB/s.
    assert found.compute_ms == pytest.approx(2000)
    assert found.memory_ms == pytest.approx(300)
    assert (found.ms, found.bound) == (found.compute_ms, "compute")
    assert floor(COST, PEAK, "fp16", "int8") is None, "no ceiling was measured for INT8"


def test_weights_stored_in_half_the_bytes_are_moved_in_full() -> None:
    assert moved_bytes(COST, "fp16", "fp32") == 2 * moved_bytes(COST, "fp32", "fp32")


@given(st.floats(0.1, 1e3), st.floats(0.1, 1e3), st.floats(1.1, 10))
def test_a_faster_machine_has_a_lower_floor(tflops: float, gb: float, factor: float) -> None:
    slow = Ceilings("x", {"fp32": {"matmul": tflops, "conv": tflops}}, gb, "measured")
    fast = Ceilings(
        "x", {"fp32": {"matmul": tflops * factor, "conv": tflops * factor}}, gb * factor, "measured"
    )
    first, second = floor(COST, slow, "fp32", "fp32"), floor(COST, fast, "fp32", "fp32")
    assert first is not None
    assert second is not None
    assert second.ms == pytest.approx(first.ms / factor)


def surveyed(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(measured, "measure", lambda dtypes: PEAK)
    cells = [
        cell(device="cpu", batch=batch, guidance_mode=mode)
        for batch in (1, 4)
        for mode in ("none", "batch")
    ]
    return survey(tiny_bundle.path, cells)


def test_a_row_at_its_floor_reaches_all_of_it(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = surveyed(tiny_bundle, monkeypatch)
    one = cell(backend="ort", device="cpu", precision="fp32", batch=4, steps=1, decoder="vae")
    stages = {"text": 1.0, "unet_first": 1.0, "unet_step": None, "decode": 1.0, "rest": 1.0}
    row = of_row({"stages_ms": stages}, one, found)
    assert row is not None
    assert set(row) == {"text", "unet_step", "decode"}
    at_floor = stages | {
        "text": row["text"]["floor_ms"],
        "unet_first": row["unet_step"]["floor_ms"],
        "decode": row["decode"]["floor_ms"],
    }
    again = of_row({"stages_ms": at_floor}, one, found)
    assert again is not None
    for stage in again.values():
        assert stage["fraction"] == pytest.approx(1, abs=0.01)
    total = sum(row[stage]["floor_ms"] for stage in row) / 1e3
    assert call_floor_s(one, found) == pytest.approx(total, rel=0.01)


def test_guidance_costs_an_evaluation_more_at_every_step(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = surveyed(tiny_bundle, monkeypatch)
    modes = ("none", "batch", "calls")
    one, batch, calls = (
        stage_work(cell(device="cpu", batch=4, guidance_mode=mode), found) for mode in modes
    )
    assert batch["unet_step"].flops == calls["unet_step"].flops == 2 * one["unet_step"].flops
    # As one batch of two the weights are moved once.
    assert one["unet_step"].moved < batch["unet_step"].moved < calls["unet_step"].moved
    assert calls["unet_step"].moved == 2 * one["unet_step"].moved
    assert batch["text"] == calls["text"] == one["text"]


SPLIT = "context=split,threads=1"


@pytest.mark.parametrize("mode", ["none", "batch", "calls"])
def test_a_split_unet_is_judged_by_the_graphs_that_run(
    mode: str, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "measure", lambda dtypes: PEAK)
    whole, split = (
        cell(backend="ort", device="cpu", steps=4, options=options, guidance_mode=mode)
        for options in ("threads=1", SPLIT)
    )
    found = survey(tiny_bundle.path, [whole, split])
    assert found["split"] == [f"ort:{SPLIT}"]
    assert stage_work(whole, survey(tiny_bundle.path, [whole])) == stage_work(whole, found)
    plain, halves = stage_work(whole, found), stage_work(split, found)
    evaluations = 1 if mode == "none" else 2
    context = halves["text"].flops - plain["text"].flops
    assert context == evaluations * found["costs"]["unet_context"]["1"]["flops"] > 0
    # It moves from every step to the text stage, where it is counted once a call.
    assert halves["unet_step"].flops == plain["unet_step"].flops - context
    assert halves["unet_step"].moved < plain["unet_step"].moved
    assert halves["decode"] == plain["decode"]
    floors = [call_floor_s(one, found) for one in (whole, split)]
    assert floors[0] is not None
    assert floors[1] is not None
    assert floors[1] < floors[0]
    older = {key: value for key, value in found.items() if key != "split"}
    assert stage_work(whole, older) == plain, "headers from before it are read"


def test_another_device_or_an_unknown_precision_has_no_floor(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = surveyed(tiny_bundle, monkeypatch)
    stages = {"text": 1.0, "unet_first": 1.0, "unet_step": 1.0, "decode": 1.0, "rest": 1.0}
    for other in (cell(device="cuda:0"), cell(device="cpu", precision="int8")):
        assert of_row({"stages_ms": stages}, other, found) is None
        assert call_floor_s(other, found) is None


def test_a_gpu_is_judged_by_its_own_ceilings(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probed where there is one; a whole image in one graph has one fraction, of all its work."""
    gpu = replace(PEAK, device="cuda", tflops={"fp16": {"matmul": 800.0, "conv": 600.0}})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(measured, "measure", lambda dtypes: PEAK)
    monkeypatch.setattr(measured, "measure_gpu", lambda dtypes: gpu)
    here = cell(device="cpu", precision="fp32", steps=4)
    there = cell(device="cuda", precision="fp16", steps=4)
    found = json.loads(json.dumps(survey(tiny_bundle.path, [here, there])))
    slow, fast = (call_floor_s(one, found) for one in (here, there))
    assert slow is not None
    assert fast is not None
    assert fast < slow
    row = of_row({"stages_ms": {"text": None, "unet_step": None}, "median_ms": 2e3 * fast}, there,
                 found)  # fmt: skip
    assert row is not None
    assert list(row) == ["image"]
    assert row["image"]["fraction"] == pytest.approx(0.5, abs=0.01)
    # Alone, each is measured alone; runs of before have the CPU's as one object.
    assert [each["device"] for each in survey(tiny_bundle.path, [there])["ceilings"]] == ["cuda"]
    older = found | {"ceilings": PEAK.columns()}
    assert call_floor_s(here, older) == slow
    assert call_floor_s(there, older) is None


def test_ceilings_are_positive_and_of_native_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "STOP_AFTER_S", 0.05)
    monkeypatch.setattr(measured, "GROW_UNTIL_S", 0.01)
    found = measured.measure(["fp32", "no such dtype"])
    assert set(found.tflops) == {"fp32"}
    assert min(*found.tflops["fp32"].values(), found.gb_per_s) > 0
    assert Ceilings.of(json.loads(json.dumps(found.columns()))) == found


@pytest.mark.parametrize(("size", "column"), [("512x512", "512px"), ("1024x1024", "1024px")])
def test_the_command_gives_the_known_budget(
    size: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "sdxl-turbo", "--size", size, "--format", "json"]) == 0
    parts = {each["part"]: each for each in json.loads(capsys.readouterr().out)["parts"]}
    lines = (ROOT / "export" / "budget.csv").read_text().splitlines()
    known = {row["part"]: row for row in csv.DictReader(x for x in lines if not x.startswith("#"))}
    assert set(parts) == set(known)
    for part, line in known.items():
        expected = next(float(v) for k, v in line.items() if column in k and "gflop" in k)
        assert parts[part]["gflop"] == pytest.approx(expected, rel=0.01), part


@pytest.mark.parametrize(
    ("largest", "text"),
    [(1e-5, "0.00001"), (0.00742, "0.00742"), (9.061, "9.06"), (0.9, "0.90"), (2040.0, "2040.0")],
)
def test_no_floor_is_shown_as_0(largest: float, text: str) -> None:
    rows = [{"floor_ms": largest}, {"floor_ms": largest / 2}, {"floor_ms": 0.0}]
    column = floors.figure("floor_ms", rows)
    assert column.text(rows[0]) == text
    assert float(column.text(rows[0])) > 0
    assert floors.figure("nfe", [{"nfe": 4}]).text({"nfe": 4}) == "4"


def test_cost_per_image_grows_faster_than_the_image() -> None:
    checkpoint = open_checkpoint(MODELS["sd15"], "random")

    def flops(width: int, height: int) -> float:
        return part_cost_at(checkpoint, "unet", 1, width, height).flops

    unet = [flops(side, side) for side in (256, 512, 1024)]
    # Attention is quadratic in the pixels, everything else linear: at least 4 times for twice the
    # side, were it not for the text's keys and values, which do not grow.
    assert 3.5 < unet[1] / unet[0] < unet[2] / unet[1] < 16
    assert 1.5 * unet[1] < flops(768, 512) == flops(512, 768) < 1.7 * unet[1]


def test_whole_images_take_the_evaluations_that_the_scheduler_runs() -> None:
    one = {"gflop": 1.0}
    parts = [{"part": name, **one} for name in ("text_encoder", "unet", "taesd_decoder")]
    found = {}
    for model in ("sd15", "sdxl-lightning-8step", "lcm-sdxl", "sd-turbo"):
        lines = pipelines(
            parts, open_checkpoint(MODELS[model], "random"), default_steps(MODELS[model])
        )
        assert all(line["gflop"] == line["nfe"] + 2 for line in lines)
        found[model] = [(line["steps"], line["nfe"]) for line in lines]
    assert found == {
        "sd15": [(20, 42)],  # PNDM runs 21 timesteps, each with two evaluations
        "sdxl-lightning-8step": [(8, 8)],
        "lcm-sdxl": [(1, 1), (2, 2), (4, 4)],  # guidance is an input
        "sd-turbo": [(1, 1), (2, 2), (4, 4)],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "512x"], "not a size"),
        (["--size", "100x100"], "multiples of 8"),
        (["--size", "1280"], "about 1024x1024 pixels"),
        (["--batch", "0"], "at least 1"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_are_answered(words: list[str], message: str) -> None:
    with pytest.raises(PreconditionError) as caught:
        main(["--model", "sdxl-turbo", *words])
    assert message in str(caught.value)


def test_what_was_not_read_of_a_card_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "sdxl-turbo", "--device", "a10g"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "peaks from AWS/NVIDIA A10G figures" in said
    assert "https://www.baseten.co/" in said
    assert "not checked: the peak" in said


def test_a_published_peak_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "sdxl-turbo", "--device", "h100-sxm", "--format", "json"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ceilings"]["provenance"] == "published"
    assert "https://www.nvidia.com/" in report["peaks_from"]
    unet = next(each for each in report["parts"] if each["part"] == "unet")
    assert unet["floor_ms"] == pytest.approx(1588.8 / 989, rel=0.02) or unet["bound"] == "memory"


def test_nothing_in_the_roofline_covers_another_or_is_cut_off(tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    peaks = {"fp32": {"conv": 0.35, "matmul": 0.34}, "int8": {"conv": 3.3, "matmul": 3.3}}
    reached = {"tflops": 0.2, "gb_per_s": 1.0, "floor_ms": 2.0, "fraction": 0.5}
    stages = {name: reached for name in ("text", "unet_step", "decode")}
    rows = [
        row(cell(backend="ort", options=options, precision=precision), [9.0] * 3, roofline=stages)
        for options, precision in (
            ("", "fp32"),
            ("a=long,list=of,options=x,precision=int8", "int8"),
        )
    ]
    run = make_run(tmp_path, rows)
    survey = {"ceilings": [Ceilings("cpu", peaks, 35.0, "measured").columns()]}
    drawn = figure(replace(run, header=replace(run.header, roofline=survey)), rows)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    (axes,), (key,) = drawn.axes, drawn.legends
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert set(boxes) == {
        "fp32 conv 0.35 TFLOP/s", "fp32 matmul 0.34 TFLOP/s", "int8 conv and matmul 3.3 TFLOP/s",
        "memory of cpu 35 GB/s",
    }  # fmt: skip
    assert not [pair for pair in combinations(boxes.values(), 2) if pair[0].overlaps(pair[1])]
    whole, legend = drawn.bbox, key.get_window_extent()
    assert legend.x1 <= whole.x1
    assert not legend.overlaps(axes.bbox)
    assert {text.get_text() for text in axes.get_yticklabels()} >= {"0.2", "1"}


def test_the_roofline_of_a_run_without_ceilings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(tmp_path, [row(cell(), [1.0, 1.0])])
    assert shell(show, [made.name, "--as", "roofline", "--runs", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "has no roofline" in said
    assert "next:" in said
    assert not list(made.path.glob("roofline*"))
