"""The ledger of published figures: floors, verdicts with and without measurements, the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import cell, make_run, row

from backends.modelled.costs import traced_costs
from bench.commands.claims import main
from bench.limits import claims
from bench.limits.claims import findings, judge
from bench.limits.ledger import Claim, Ours, measured, mismatches, nearest, read_claims
from bench.limits.ranges import cost_of, modelled, models_of
from core.cli import run as shell
from core.devices import devices, find_device, identify
from core.errors import PreconditionError

CLAIMS = read_claims()
BY_ID = {claim.id: claim for claim in CLAIMS}
A100 = BY_ID["ort-trt-a100-1"]


def ours(time_ms: float, period_ms: float | None = None, **columns: Any) -> Ours:
    """A cell of ours on an A100, by default under the conditions of `ort-trt-a100-1`."""
    usual = {"model": "sdxl-turbo", "device": "cuda:0", "precision": "fp16", "size": "512x512",
             "decoder": "vae", "backend": "trt"}  # fmt: skip
    hardware = columns.pop("hardware", "a100-sxm-80gb")
    return Ours(hardware, cell(**(usual | columns)), "made", time_ms, period_ms, None)


def test_every_published_figure_is_carried_with_its_source() -> None:
    assert len(CLAIMS) == len(BY_ID) == 36
    assert all(claim.source for claim in CLAIMS)


def test_devices_are_known_by_their_drivers_names() -> None:
    assert identify("NVIDIA A100-SXM4-80GB") == devices()["a100-sxm-80gb"]
    assert identify("NVIDIA H200") == find_device("h200-sxm")
    assert identify("NVIDIA L40S") == find_device("l40s")  # no L4
    for other in ("NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H200 NVL",
                  "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):  # fmt: skip
        assert identify(other) is None
    assert find_device("ai100-ultra").socs == 4
    assert all(device.source for device in devices().values())
    with pytest.raises(PreconditionError, match="known devices"):
        find_device("abacus")


@pytest.mark.parametrize(("decoder", "floors"), [("taesd", (51, 89, 164)), ("vae", (84, 122, 197))])
def test_floor_of_one_pipeline_on_one_soc(decoder: str, floors: tuple[int, ...]) -> None:
    ultra = devices()["ai100-ultra"]
    for steps, floor in zip((1, 2, 4), floors, strict=True):
        model = modelled(ultra, 512, 4, steps, decoder)
        assert model is not None
        assert model.floor == pytest.approx(floor, rel=0.01)
        assert model.floor < model.fast < model.slow


def test_models_know_their_limits() -> None:
    assert modelled(devices()["a10g"], 640, 1, 1, "vae") is None
    assert len(models_of(BY_ID["ai100-ultra-4img"])) == 6
    assert models_of(BY_ID["ov-i7-vae"]) == []
    assert models_of(replace(BY_ID["add-t2-addm"], size=768)) == []
    assert models_of(replace(BY_ID["add-t2-addm"], model="UniDiffuser")) == []
    assert models_of(replace(BY_ID["add-t2-addm"], precision="fp32")) == []


def test_sd15_by_its_evaluations() -> None:
    """Guidance is two evaluations a step, and InstaFlow-1.7B's network is two UNets."""
    once, twice, dpm = (
        models_of(BY_ID[name])[0].floor
        for name in ("add-t2-instaflow09", "add-t2-instaflow17", "add-t2-dpm25")
    )
    unet = 803.3 / 312  # GFLOP over TFLOP/s: milliseconds
    assert twice - once == pytest.approx(unet, rel=0.01)
    assert dpm - once == pytest.approx(49 * unet, rel=0.01)


@pytest.mark.parametrize("model", ["sd15", "sd-turbo"])
def test_the_listed_costs_are_those_that_are_counted(model: str) -> None:
    for part, counted in traced_costs(model, (512, 512)).items():
        assert cost_of(model, part, 512) == counted


def test_the_ledger_without_measurements() -> None:
    found = {each.claim.id: each for each in findings(CLAIMS, [])}
    assert [*found][:2] == list(claims.HEADLINES)
    assert found["ai100-ultra-4img"].verdict == "consistent"
    assert found["a100-1img-200"].verdict == "beaten"
    assert "ort-trt-a100-1" in found["a100-1img-200"].reason
    assert found["ort-trt-a100-1"].verdict == "consistent"
    assert found["a10g-sd15-20step"].verdict == "consistent"
    assert found["add-t2-instaflow17"].verdict == "consistent"  # slower than others: more work
    assert found["streamdiffusion-4090"].verdict == "not testable here"
    assert found["a10g-1img-200"].verdict == "consistent"  # 180 ms is its own other figure
    assert all(each.reason for each in found.values())


def test_below_the_floor_is_contradicted() -> None:
    found = judge(replace(A100, value=5.0), CLAIMS, [])
    assert found.verdict == "contradicted"
    assert "floor" in found.reason


@pytest.mark.parametrize(
    ("time", "verdict"), [(41.0, "reproduced"), (60.0, "contradicted"), (20.0, "beaten")]
)
def test_measurements_speak_first(time: float, verdict: str) -> None:
    assert judge(A100, CLAIMS, [ours(time)]).verdict == verdict


@pytest.mark.parametrize(
    "other",
    [{"hardware": "a10g"}, {"steps": 2}, {"batch": 4}, {"decoder": "taesd"}, {"precision": "fp32"},
     {"size": "1024x1024"}, {"model": "tiny-sdxl"}, {"low_memory": True}],
    ids=str,
)  # fmt: skip
def test_other_conditions_prove_nothing(other: dict[str, Any]) -> None:
    assert judge(A100, CLAIMS, [ours(39.0, **other)]).verdict == "consistent"


def test_another_program_proves_nothing_but_that_it_is_faster() -> None:
    for time, verdict in ((39.0, "consistent"), (60.0, "consistent"), (20.0, "beaten")):
        assert judge(A100, CLAIMS, [ours(time, backend="cuda")]).verdict == verdict
    both = [ours(20.0, backend="cuda"), ours(41.0)]
    assert judge(A100, CLAIMS, both).verdict == "reproduced"
    eager = BY_ID["torch-eager-a100-1"]
    torch = {"backend": "torch", "device": "cuda"}
    for options, verdict in (("mode=compile", "consistent"),
                             ("mode=eager", "contradicted"), ("", "contradicted")):  # fmt: skip
        found = judge(eager, [eager], [ours(300.0, options=options, **torch)])
        assert found.verdict == verdict
    # Who does not say what it ran on may have run on anything.
    assert judge(BY_ID["a100-1img-200"], CLAIMS, [ours(195.0, **torch)]).verdict == "reproduced"


def test_a_model_of_another_name_is_other_hardware() -> None:
    claim = BY_ID["ov-i7-vae"]
    cpu = {"backend": "openvino", "device": "cpu", "precision": "fp32"}
    for name, verdict in (
        ("12th Gen Intel Core i7-12700", "reproduced"),
        ("12th Gen Intel Core i7-12700K", "not testable here"),
        ("12th Gen Intel Core i7-12700H @ 2 GHz", "not testable here"),
    ):
        assert judge(claim, CLAIMS, [ours(5600.0, hardware=name, **cpu)]).verdict == verdict


def test_a_guided_call_is_another_work() -> None:
    guided = replace(ours(39.0), nfe=2.0)
    assert mismatches(A100, guided) == ["UNet evaluations"]
    sd15 = replace(ours(1200.0, model="sd15", steps=20, hardware="a10g"), nfe=42.0)
    assert mismatches(BY_ID["a10g-sd15-20step"], sd15) == []
    assert judge(BY_ID["a10g-sd15-20step"], CLAIMS, [sd15]).verdict == "reproduced"


def test_a_latency_is_no_period() -> None:
    claim = BY_ID["ai100-ultra-4img"]
    ultra = {"hardware": "ai100-ultra", "batch": 4, "steps": 1, "backend": "qaic"}
    assert judge(claim, CLAIMS, [ours(250.0, **ultra)]).verdict == "consistent"
    found = judge(claim, CLAIMS, [ours(900.0, period_ms=255.0, **ultra)])
    assert found.verdict == "reproduced"
    assert judge(claim, CLAIMS, [ours(900.0, 400.0, **ultra)]).verdict == "contradicted"
    among = [ours(900.0, 400.0, **ultra), ours(90.0, 100.0, **(ultra | {"steps": 2}))]
    assert judge(claim, CLAIMS, among).verdict == "consistent"


def test_the_nearest_cell_shares_the_hardware_first() -> None:
    far, near = ours(40.0, hardware="a10g"), ours(90.0, steps=4, decoder="taesd")
    assert nearest(A100, [far, near]) is near
    assert mismatches(A100, near) == ["steps", "decoder"]
    assert nearest(A100, [ours(1.0, model="tiny-sdxl")]) is None


def test_measured_cells_and_energy(tmp_path: Path) -> None:
    turbo = cell(model="sdxl-turbo", size="512x512", backend="ort", batch=4)
    run = make_run(
        tmp_path,
        [
            *(row(turbo, [100.0 + n], n, energy_j=20.0) for n in range(3)),
            row(replace(turbo, backend="null"), [1.0]),
            row(replace(turbo, steps=2), [1.0], provenance="modelled"),
            row(replace(turbo, steps=4), [], status="oom", median_ms=None),
        ],
    )
    (found,) = measured([run])
    assert (found.hardware, found.median_ms) == ("A CPU", 101.0)
    assert found.images_per_joule == pytest.approx(4 / 20)


def test_slower_than_the_range_leaves_time_to_spare() -> None:
    found = judge(replace(BY_ID["ai100-ultra-4img"], value=60_000.0), CLAIMS, [])
    assert found.verdict == "consistent"
    assert found.reason.startswith("time to spare")
    assert {each.fit(60_000.0) for each in found.models} == {"time to spare"}


def test_a_run_is_held_against_what_concerns_it() -> None:
    here = Ours("a100-sxm-80gb", cell(model="sdxl-turbo", size="512x512"), "run", 100.0, None, None)
    small = Ours("some CPU", cell(model="shapes-turbo"), "run", 6.0, None, None)
    judged = findings(CLAIMS, [here, small])
    assert claims.concerning(judged, [small]) == []
    concerned = claims.concerning(judged, [small, here])
    assert {each.claim.hardware for each in concerned} == {"a100-sxm-80gb"}
    assert "a100-1img-200" in {each.claim.id for each in concerned}


def test_power_limits_bound_the_energy() -> None:
    found = judge(BY_ID["ai100-ultra-4img"], CLAIMS, [])
    assert found.joules_at_most == pytest.approx(150 * 0.25 / 4)
    bound = found.columns()["tdp_bound"]
    assert bound["images_per_joule_at_least"] == pytest.approx(1 / 9.375)
    assert judge(BY_ID["ov-i7-vae"], CLAIMS, []).joules_at_most is None
    # One UNet evaluation is not all that an image takes.
    assert judge(BY_ID["a100-unet-67"], CLAIMS, []).joules_at_most is None


def published(tmp_path: Path) -> list[str]:
    return ["--published", str(tmp_path), "--runs", str(tmp_path)]


def test_markdown_names_both_headlines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(main, ["--format", "markdown", *published(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.index("Cloud AI 100 Ultra") < text.index("Stability AI") < text.index("| claim")
    assert "4 steps, taesd: beyond the range (floor 164 ms" in text
    assert "1 step, vae: fits (floor 84 ms" in text
    assert "2 steps, vae: beyond the range (floor 121 ms" in text
    assert "if it switches to each program" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(CLAIMS)
    assert len({line.count("|") for line in lines}) == 1


def test_require(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = published(tmp_path)
    assert shell(main, ["--require", "beaten:a100-1img-200", *usual]) == 0
    assert shell(main, ["--require", "reproduced:a100-1img-200", *usual]) == 4
    assert "required reproduced" in capsys.readouterr().err
    assert shell(main, ["--require", "reproduced:nothing", *usual]) == 2
    assert shell(main, ["--require", "true:a100-1img-200", *usual]) == 2


def test_json_holds_a_run_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turbo = cell(model="sdxl-turbo", size="512x512", backend="ort")
    name = make_run(tmp_path, [row(turbo, [5000.0])]).name
    empty = tmp_path / "published"
    arguments = ["--published", str(empty), "--runs", str(tmp_path), "--run", name]
    assert shell(main, ["--format", "json", *arguments]) == 0
    found = {each["id"]: each for each in json.loads(capsys.readouterr().out)}
    near = found["ov-i7-taesd"]["nearest"]
    assert near["median_ms"] == 5000.0
    assert "hardware" in near["differs_in"]


def test_a_claim_says_its_conditions() -> None:
    text = BY_ID["ai100-ultra-4img"].conditions
    assert text == "512 px, batch 4, steps not stated, decoder not stated, fp16, end-to-end"
    assert isinstance(A100, Claim)
