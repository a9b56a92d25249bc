"""No figure that cannot be is shown, however noisy, few or failed the rows are."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.base import UnsupportedError
from backends.modelled.card import SPLITS, Call, estimate
from backends.modelled.costs import known_costs
from bench.commands.claims import main as claims_main
from bench.limits import cards, floors
from bench.limits.claims import COLUMNS as CLAIM_COLUMNS
from bench.limits.claims import VERDICTS, energy_text, findings, impossible, near_text
from bench.limits.floors import ERROR, beaten, beaten_text, of_row, share_of_floor
from bench.limits.ledger import measured, read_claims
from bench.limits.ranges import can_model, floor_of, modelled
from bench.machine import ceilings
from bench.machine.ceilings import Ceilings, agree, looked_at
from bench.rows.cell import Cell
from bench.rows.stats import fit_steps
from bench.rows.store import Row, Run, is_timed, open_run
from bench.rows.summary import by_cell
from bench.run.estimate import duration_text, load_s
from bench.run.estimate import estimate as run_estimate
from bench.run.measure import StopRule
from bench.run.runner import Side
from bench.show import stages
from bench.show.columns import COLUMNS
from bench.show.latency import legend_text
from bench.show.page.page import headlines
from bench.show.roofline import points, share_text
from bench.show.series import series_of
from core.devices import devices
from export.cost import Cost
from tests.bench.made import cell, make_run, row

PEAK = Ceilings("cpu", {"bf16": {"matmul": 2.0, "conv": 1.0}}, 10.0, "measured")
PARTS = {
    "text_encoder": (2e9, 0.0, 10**6),
    "unet": (8e9, 2e9, 10**7),
    "vae_decoder": (1e9, 9e9, 10**6),
    "taesd_decoder": (0.0, 4e9, 10**6),
}
SURVEYED = {
    "ceilings": [PEAK.columns()],
    "graph_dtype": "bf16",
    "split": [],
    "costs": {
        part: {
            "1": asdict(
                Cost(part, linear + conv, weights, weights,
                     {"linear": linear, "conv": conv, "attention": 0.0})
            )
        }
        for part, (linear, conv, weights) in PARTS.items()
    },
}  # fmt: skip
TARGET = cast(Run, SimpleNamespace(header=SimpleNamespace(roofline=SURVEYED)))
CLAIMS = read_claims()
times = st.floats(0.05, 5e4)


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """Rows of cells that differ in steps and decoder: noise of every size, and what went wrong."""
    every: list[Row] = []
    for decoder in draw(st.sampled_from([("vae",), ("vae", "taesd")])):
        for steps in draw(st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True)):
            of = cell(backend="ort", precision="bf16", storage="bf16", decoder=decoder, steps=steps)
            for round_ in range(draw(st.integers(1, 3))):
                if draw(st.integers(0, 5)) == 0:
                    error = {"type": "OOM", "what": "no memory", "why": "", "next": ""}
                    every.append(row(of, [], round_, status="oom", error=error, stages_ms=None))
                    continue
                samples = draw(st.lists(times, min_size=1, max_size=5))
                text, unet, decode = draw(st.tuples(times, times, times))
                flags = draw(st.lists(st.sampled_from(["disturbed", "unstable"]), unique=True))
                found = row(of, samples, round_, flags=flags, cv=None, stages_ms={
                    "text": text, "unet_first": unet, "unet_step": None, "decode": decode,
                    "rest": 0.1, "load": None,
                })  # fmt: skip
                every.append(found | {"roofline": of_row(found, of, SURVEYED)})
    return every


def numbers(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)]


@settings(max_examples=150, deadline=None)
@given(rows())
def test_lines_are_drawn_only_where_points_support_them(drawn: list[Row]) -> None:
    for series in (each for some in series_of({"": by_cell(drawn)}).values() for each in some):
        text = legend_text(series).removeprefix(f"{series.label}: ")
        assert "\u2212" not in text  # a minus
        if series.fit is None:
            assert text.startswith("no line: ") or len(series.points("median_ms")) == 1
            continue
        assert series.fit.per_step_ms > 2 * series.fit.per_step_error_ms >= 0
        assert all(number >= 0 for number in numbers(text))
        for steps, ms in series.points("median_ms"):
            line = series.fit.fixed_ms + series.fit.per_step_ms * steps
            error = next(each.error_ms for each in series.lines if each.cell.steps == steps)
            assert abs(line - ms) <= 1.001 * max(0.1 * ms, 2 * error)


@settings(max_examples=100, deadline=None)
@given(rows())
def test_headlines_are_times_and_rates(drawn: list[Row]) -> None:
    for card in headlines(by_cell(drawn)):
        assert float(str(card.value).replace(",", "")) > 0, card


@settings(max_examples=100, deadline=None)
@given(rows())
def test_no_cell_of_a_table_is_below_zero_or_no_number(drawn: list[Row]) -> None:
    for line in by_cell(drawn):
        for column in COLUMNS:
            text = column.text(line)
            assert text not in ("nan", "inf", "-inf"), column.header
            if column.digits is not None and text != "-":
                assert float(text) >= 0, column.header
        low, middle, high = (line.median(name) for name in ("min_ms", "median_ms", "max_ms"))
        if low is not None and middle is not None and high is not None:
            assert low <= middle <= high


@settings(max_examples=150, deadline=None)
@given(rows())
def test_nothing_is_more_than_its_floor(drawn: list[Row]) -> None:
    low = beaten(drawn, SURVEYED)
    for stage in stages.stages_of(TARGET, drawn):
        share = stage.share_of_floor
        assert share is None or 0 <= share <= 100
        assert stage.share_of_peak is None or not stage.doubted
        assert stage.doubted == bool(low)
    for _, _, fraction in points(by_cell(drawn)).values():
        shown = share_text(fraction, bool(low))
        assert not numbers(shown) or numbers(shown)[0] <= 100
    # Whatever is faster than any algorithm makes its ceiling doubted, and only that.
    for each in drawn:
        for name, figures in (each["roofline"] or {}).items():
            text_is_twice_too_fast = name == "text" and figures["fraction"] > 1 + ERROR
            assert not text_is_twice_too_fast or "cpu bf16" in low


def test_a_ceiling_that_a_stage_beats_is_named_and_none_of_its_shares_is_shown() -> None:
    """Its text encoders, matrix products all, at twice what the probe said is the peak."""
    of = cell(backend="ort", precision="bf16", storage="bf16", decoder="vae", steps=1)
    stages_ms = {"text": 0.5, "unet_first": 9.0, "unet_step": None, "decode": 20.0, "rest": 0.1,
                 "load": None}  # fmt: skip
    found = row(of, [30.0], stages_ms=stages_ms)
    found |= {"roofline": of_row(found, of, SURVEYED)}
    assert found["roofline"]["text"]["fraction"] == pytest.approx(2.0, rel=0.01)
    assert beaten([found], SURVEYED) == {"cpu bf16": pytest.approx(2.0, rel=0.01)}
    text = stages.markdown(TARGET, [found])
    assert "cpu bf16 (by a factor of 2.0 or more)" in text
    assert "share of floor (%)" not in text
    assert "share of peak (%)" not in text
    # Winograd's convolutions are no sign of it.
    decode = row(of, [30.0], stages_ms=stages_ms | {"text": 2.0, "decode": 5.0})
    decode |= {"roofline": of_row(decode, of, SURVEYED)}
    assert decode["roofline"]["decode"]["fraction"] > 1.5
    assert beaten([decode], SURVEYED) == {}
    assert beaten_text({}) == ""
    assert share_of_floor(decode["roofline"]["decode"]["fraction"]) is None
    assert share_of_floor(1.02) == 1.0


def test_a_negative_step_is_no_headline() -> None:
    """What a noisy machine once said: one step slower than four."""
    drawn = [
        row(cell(backend="ort", steps=steps), [ms, ms * 1.01])
        for steps, ms in ((1, 120.0), (2, 100.0), (4, 85.0))
    ]
    cards = headlines(by_cell(drawn))
    assert [card.title for card in cards] == ["Shortest call", "Most images"]
    (series,) = series_of({"": by_cell(drawn)})[1]
    assert series.line is not None
    assert series.line.per_step_ms < 0
    assert "no line: no cost of a step beyond the spread of its points" in legend_text(series)


@pytest.mark.parametrize(
    ("latencies", "refused"),
    [
        ([10.0, 20.0, 40.0], ""),
        ([12.0, 22.0, 41.0], ""),
        ([10.0, 30.0, 40.0, 80.0, 160.0], "its points lie on no line: 35% off at 1"),
        ([10.0, 20.0, 20.0], "no cost of a step"),
        ([10.0, 30.0, 70.0], "its points ask for a fixed cost below zero"),
        ([10.0, 10.0, 10.0], "no cost of a step"),
    ],
    ids=str,
)
def test_why_a_line_is_refused(latencies: Sequence[float], refused: str) -> None:
    fit = fit_steps(list(zip((1, 2, 4, 8, 16), latencies, strict=False)), [0.1] * len(latencies))
    assert fit is not None
    assert fit.refused.startswith(refused)
    assert bool(fit.refused) == bool(refused)


def test_two_points_are_worth_what_their_errors_are() -> None:
    sure = fit_steps([(1, 10.0), (2, 12.0)], [0.1, 0.1])
    unsure = fit_steps([(1, 10.0), (2, 12.0)], [1.0, 1.0])
    assert sure is not None
    assert unsure is not None
    assert not sure.refused
    assert "spread" in unsure.refused
    assert unsure.per_step_error_ms == pytest.approx(2**0.5)


# ---- cards


@settings(max_examples=20, deadline=None)
@given(
    steps=st.integers(1, 50),
    batch=st.integers(1, 9),
    target=st.floats(1e-3, 1e7),
    decoder=st.sampled_from(["vae", "taesd"]),
)
def test_what_is_said_of_cards_can_be(steps: int, batch: int, target: float, decoder: str) -> None:
    names = [each.name for each in devices().values() if each.vendor == "Qualcomm"]
    question = cards.Question("sdxl-turbo", None, names, [steps], batch, [decoder], target)
    ways = cards.options(question)
    assert {way.device.name for way in ways} == set(names)
    for section in cards.sections(ways, question):
        for column in section.columns:
            for way in section.rows:
                text = column.text(way)
                assert not re.search(r"nan|inf|(?<![\w.])-\d", text), (column.header, text)
    for way in ways:
        for name in ("resident", *cards.SWITCHING):
            period = way.pace(name).period
            verdict = way.verdict(target, name)
            assert (verdict == "fits") == (1e3 * period.low <= target <= 1e3 * period.high)
            assert (verdict == "impossible") == (target < 1e3 * way.found.period_floor)
            assert way.per_joule(period.mid) > 0


# ---- claims and dry runs


def ran(drawn: Sequence[Row], driver: str) -> Run:
    """A run of such rows, on a card that its driver calls so."""
    environment = {"cpu": "A CPU", "accelerators": {"cuda": driver}}
    header = SimpleNamespace(environment=environment, roofline=None)
    return cast(Run, SimpleNamespace(name="made", header=header, rows=lambda: list(drawn)))


@st.composite
def rows_on_a_card(draw: st.DrawFn) -> list[Row]:
    """Rows of cells that published figures are of, with times, energies and periods of any size."""
    every: list[Row] = []
    for steps in draw(st.lists(st.sampled_from([1, 4]), min_size=1, max_size=2, unique=True)):
        of = cell(backend=draw(st.sampled_from(["trt", "cuda", "torch"])), device="cuda",
                  model=draw(st.sampled_from(["sdxl-turbo", "sd-turbo", "sd15"])),
                  size="512x512", precision=draw(st.sampled_from(["fp16", "int8", "fp32"])),
                  decoder=draw(st.sampled_from(["vae", "taesd"])), steps=steps,
                  batch=draw(st.sampled_from([1, 4])))  # fmt: skip
        for round_ in range(draw(st.integers(1, 3))):
            samples = draw(st.lists(st.floats(1e-4, 1e7), min_size=1, max_size=4))
            found = row(of, samples, round_,
                        energy_j=draw(st.none() | st.just(0.0) | st.floats(1e-6, 1e6)),
                        period_ms=draw(st.none() | st.floats(1e-4, 1e7)))  # fmt: skip
            if draw(st.integers(0, 4)) == 0:
                error = {"type": "OOM", "what": "no memory", "why": "", "next": ""}
                found = row(of, [], round_, status="oom", error=error, stages_ms=None)
            every.append(found)
    return every


@settings(max_examples=60, deadline=None)
@given(rows_on_a_card(), st.sampled_from(["NVIDIA A100-SXM4-80GB", "NVIDIA A10G", "A Card"]))
def test_no_claim_is_judged_by_what_cannot_be(drawn: list[Row], driver: str) -> None:
    ours = measured([ran(drawn, driver)])
    assert len(ours) == len({Cell.of(each) for each in drawn if each["status"] == "ok"})
    left_out = impossible(ours)
    for finding in findings(CLAIMS, ours):
        assert finding.verdict in VERDICTS
        for column in CLAIM_COLUMNS:
            text = column.text(finding)
            assert not re.search(r"\b(nan|inf)\b", text), (column.header, text)
        for text in (near_text(finding), energy_text(finding), finding.reason):
            assert not re.search(r"(?<![\w.])-\d", text), text
        if finding.nearest is not None:
            assert finding.nearest not in left_out
            least = floor_of(finding.nearest)
            assert least is None or finding.nearest.median_ms >= least
        # Nothing that a card cannot do makes a figure of that card beaten or contradicted.
        if finding.verdict in ("beaten", "contradicted", "reproduced") and "made" in finding.reason:
            time = float(re.findall(r": ([\d.]+) ms in run made", finding.reason)[0])
            floors_known = [model.floor for model in finding.models]
            assert not floors_known or time >= 0.99 * min(floors_known)


@pytest.mark.parametrize(("ms", "verdict"), [(1.0, "consistent"), (20.0, "beaten")])
def test_a_measurement_below_the_floor_is_not_counted(
    ms: float, verdict: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One image of SDXL-Turbo on an A100 in 1 ms, where every weight once takes 3."""
    of = cell(model="sdxl-turbo", backend="trt", device="cuda", size="512x512", precision="fp16",
              decoder="vae")  # fmt: skip
    run = make_run(tmp_path, [row(of, [ms] * 3)])
    environment = {**run.header.environment, "accelerators": {"cuda": "NVIDIA A100-SXM4-80GB"}}
    run.with_header(dataclasses.replace(run.header, environment=environment))
    (tmp_path / "none").mkdir()
    words = ["--run", "latest", "--runs", str(tmp_path), "--published", str(tmp_path / "none")]
    assert claims_main([*words, "--format", "json"]) == 0
    said = capsys.readouterr()
    judged = {each["id"]: each["verdict"] for each in json.loads(said.out)}
    assert judged["ort-trt-a100-1"] == verdict
    assert ("faster than its hardware can be" in said.err) == (ms == 1.0)


@settings(max_examples=100, deadline=None)
@given(rows(), st.builds(StopRule, st.integers(1, 20), st.floats(0, 10), st.floats(1, 100),
                         st.integers(0, 3), st.integers(0, 50)))  # fmt: skip
def test_a_dry_run_takes_some_time(drawn: list[Row], rule: StopRule) -> None:
    known = {Cell.of(each): each for each in drawn if is_timed(each)}
    for of in {Cell.of(each) for each in drawn}:
        for history in (known, {}):
            for surveyed in (SURVEYED, None):
                guess = run_estimate(of, rule, history, surveyed)
                assert 0 <= guess.seconds < float("inf")
                assert guess.bound == (not history.get(of) and surveyed is None)
                assert all(number > 0 for number in numbers(guess.words)), guess.words
    assert load_s(list(known), known) >= 0


@given(st.floats(0, 1e9))
def test_no_time_is_said_to_be_none(seconds: float) -> None:
    said = numbers(duration_text(seconds))
    assert said == [] or said[0] >= 1


# ---- ceilings


def test_a_disturbed_look_is_not_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look at half of the rate: a third one, and the best of all."""
    looks: list[str] = []

    def measure_dtype(name: str, *_: Any) -> dict[str, float]:
        looks.append(name)
        rate = 0.217 if len(looks) == 1 else 0.419
        return {"matmul": rate, "conv": rate}

    monkeypatch.setattr(ceilings, "measure_dtype", measure_dtype)
    monkeypatch.setattr(ceilings, "copy_rate", lambda *_: 10.0)
    found = looked_at("cpu", ["bf16"], 8)
    assert found.tflops == {"bf16": {"matmul": 0.419, "conv": 0.419}}
    assert len(looks) == 3
    looks[:] = ["calm"]
    looked_at("cpu", ["bf16"], 8)
    assert len(looks) == 3  # two looks were enough
    assert not agree(found, dataclasses.replace(found, gb_per_s=5.0))


def test_a_ceiling_that_a_stage_beats_is_measured_again_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of = cell(backend="ort", precision="bf16", storage="bf16", decoder="vae", steps=1)
    stages_ms = {"text": 0.5, "unet_first": 9.0, "unet_step": None, "decode": 20.0, "rest": 0.1,
                 "load": None}  # fmt: skip

    def timed(surveyed: Any) -> Row:
        found = row(of, [30.0], stages_ms=stages_ms)
        return found | {"roofline": of_row(found, of, surveyed)}

    asked: list[tuple[str, list[str]]] = []

    def look(_: Any, device: str, dtypes: list[str]) -> Ceilings:
        asked.append((device, dtypes))
        return Ceilings(device, {"bf16": {"matmul": 4.2, "conv": 0.9}}, 9.0, "measured")

    monkeypatch.setattr(floors, "run_apart", look)
    said: list[str] = []
    first = timed(SURVEYED)
    run = make_run(tmp_path, [first])
    run = run.with_header(dataclasses.replace(run.header, roofline=SURVEYED, unsaid=frozenset()))
    side = Side(cast(Any, SimpleNamespace(roofline=SURVEYED)), run)
    side.doubt([first], said.append)
    assert asked == [("cpu", ["bf16"])]
    assert "cpu bf16" in said[0]
    better = floors.ceilings_of(side.roofline or {})["cpu"]
    assert better.tflops == {"bf16": {"matmul": 4.2, "conv": 1.0}}  # the best of both
    assert better.gb_per_s == 10.0
    second = timed(side.roofline)
    assert second["roofline"]["text"]["fraction"] <= 1.0
    side.doubt([second], said.append)
    side.doubt([first], said.append)  # still doubted, and not measured for ever
    assert len(asked) == len(said) == 1
    # The run says what it was held against, and shows all its rows so; its first look is kept.
    kept = open_run(run.name, tmp_path)
    assert kept.header.roofline is not None
    assert kept.header == side.run.header
    assert floors.ceilings_of(kept.header.roofline)["cpu"] == better
    assert kept.header.roofline[floors.FIRST] == SURVEYED["ceilings"]
    assert dataclasses.replace(kept.header, roofline=SURVEYED) == run.header
    (row_now,) = floors.under(kept.rows(), kept.header.roofline)
    assert row_now["roofline"] == second["roofline"]
    assert floors.beaten([row_now], kept.header.roofline) == {}
    for stage in stages.stages_of(kept, kept.rows()):
        assert not stage.doubted
        assert stage.share_of_floor is None or 0 <= stage.share_of_floor <= 100
    assert "measured too low" not in stages.markdown(kept, kept.rows())
    assert "measured too low" in stages.markdown(run, kept.rows())  # as it was without
    calm = Side(cast(Any, SimpleNamespace(roofline=None)), run)
    calm.doubt([first], said.append)
    assert calm.roofline is None


# ---- models


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from([each for each, device in devices().items() if can_model(device)]),
    size=st.sampled_from([512, 1024]),
    batch=st.integers(1, 8),
    steps=st.integers(1, 50),
    decoder=st.sampled_from(["vae", "taesd"]),
    precision=st.sampled_from(["fp16", "int8", "fp8"]),
)
def test_a_range_starts_above_its_floor(
    name: str, size: int, batch: int, steps: int, decoder: str, precision: str
) -> None:
    device = devices()[name]
    if precision != "fp16" and device.int8_tops_dense is None:
        return
    found = modelled(device, size, batch, steps, decoder, precision=precision)
    assert found is not None
    assert 0 < found.floor <= found.fast < found.slow <= (found.switched or found.slow)


@settings(max_examples=80, deadline=None)
@given(
    card=st.sampled_from([each for each in devices().values() if each.vendor == "Qualcomm"]),
    model=st.sampled_from([("sdxl-turbo", 512), ("sdxl-base", 1024)]),
    call=st.builds(Call, st.sampled_from(["vae", "taesd"]), st.integers(1, 50), st.integers(1, 9),
                   st.sampled_from(SPLITS), st.sampled_from([1, 2])),
)  # fmt: skip
def test_a_modelled_card_holds_its_own_middle(
    card: Any, model: tuple[str, int], call: Call
) -> None:
    name, side = model
    try:
        found = estimate(card, known_costs(name, (side, side)), call)
    except UnsupportedError:
        return
    for pace in (found, found.once, found.each):
        for each in (pace.latency, pace.period):
            assert 0 < each.low <= each.mid <= each.high
    assert found.floor <= found.latency.low
    assert found.period_floor <= found.period.low
    assert all(0 < stage.low <= stage.mid <= stage.high for stage in found.stages.values())
