"""Quality against latency: what is measured, what is modelled, and a chart one can read."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from made import cell, make_run, row
from matplotlib.text import Annotation, Text

from bench.commands.frontier import main
from bench.commands.publish import main as publish_main
from bench.limits import frontier
from bench.limits.frontier import MEASURED, MODELLED, Chart, Point, from_device, from_runs, methods
from bench.limits.ledger import read_claims
from bench.limits.ranges import EFFICIENCY
from bench.rows.store import Run
from bench.show.canvas import scale_of
from bench.show.frontier import figure
from core.cli import run as shell
from core.devices import devices
from export.cost import Cost
from export.models import MODELS, SCHEDULERS

SD15: dict[str, Any] = {
    "model": "sd15", "backend": "ort", "decoder": "vae", "size": "512x512", "guidance": 7.5,
    "guidance_mode": "batch", "scheduler": SCHEDULERS["pndm"], "steps": 20,
}  # fmt: skip
ONCE_MS, EVALUATION_MS = 9_000.0, 3_000.0


def timed(timesteps: int, **columns: Any) -> Any:
    """A row of sd15 in which two UNet evaluations a timestep and the rest take what they take."""
    steps = [2 * EVALUATION_MS] * timesteps
    return row(
        cell(**(SD15 | columns)),
        [ONCE_MS + sum(steps)],
        nfe=2 * timesteps,
        stages_samples_ms={"unet": [steps]},
    )


@pytest.fixture
def pndm(tmp_path: Path) -> Run:
    return make_run(tmp_path, [timed(21)])


def by_label(chart: Chart | None) -> dict[str, Point]:
    assert chart is not None
    return {point.method.label: point for point in chart.points}


def test_every_method_with_a_published_fid_is_in_the_chart_once() -> None:
    known = methods()
    assert [each.claim.id for each in known] == [
        claim.id for claim in read_claims() if claim.fid_5k is not None
    ]
    assert len({each.label for each in known}) == len(known) == 10
    for each in known:
        assert each.nfe in (each.claim.steps, 2 * (each.claim.steps or 0))
        assert each.why
        if each.model:
            entry = MODELS[each.model]
            assert each.scheduler in [SCHEDULERS[name] for name in entry.schedulers]


def test_without_a_model_here_the_stand_in_gives_the_latency(pndm: Run) -> None:
    chart = from_runs([pndm])
    points = by_label(chart)
    assert {point.provenance for point in points.values()} == {MODELLED}
    assert points["ADD-M"].latency_ms == pytest.approx(ONCE_MS + EVALUATION_MS)
    assert points["InstaFlow-1.7B"].latency_ms == pytest.approx(ONCE_MS + 2 * EVALUATION_MS)
    assert points["DPM-Solver, 25 steps"].latency_ms == pytest.approx(ONCE_MS + 50 * EVALUATION_MS)
    assert all(pndm.name in point.source for point in points.values())
    text = frontier.markdown(chart) if chart else ""
    assert text.count("| modelled") == 10
    assert text.count("ADD paper Table 2") == 10
    assert "FID-5k (published)" in text


def test_a_measured_cell_of_the_method_comes_first(tmp_path: Path, pndm: Run) -> None:
    solver = {"scheduler": SCHEDULERS["dpm++2m"], "steps": 25}
    other = make_run(tmp_path, [timed(25, **solver), timed(8, **solver | {"steps": 8})])
    points = by_label(from_runs([pndm, other]))
    assert points["DPM-Solver, 25 steps"].provenance == MEASURED
    assert other.name in points["DPM-Solver, 25 steps"].source
    assert points["DPM-Solver, 8 steps"].latency_ms == pytest.approx(ONCE_MS + 16 * EVALUATION_MS)
    assert points["CFG-aware distillation, 8 steps"].provenance == MODELLED
    unguided = {"guidance": 0.0, "guidance_mode": "none"}
    half = make_run(tmp_path, [timed(25, **solver | unguided) | {"nfe": 25}])
    assert by_label(from_runs([pndm, half]))["DPM-Solver, 25 steps"].provenance == MODELLED


def test_one_chart_is_of_one_hardware_backend_and_size(tmp_path: Path, pndm: Run) -> None:
    solver = {"scheduler": SCHEDULERS["dpm++2m"], "steps": 25}
    for columns in ({"backend": "torch"}, {"size": "256x256"}, {"batch": 4}, {"precision": "bf16"}):
        other = make_run(tmp_path, [timed(25, **(solver | columns))])
        newest = make_run(tmp_path, [timed(21)])
        points = by_label(from_runs([newest, other], backend="ort"))
        assert {point.provenance for point in points.values()} == {MODELLED}
    chart = from_runs([pndm, make_run(tmp_path, [timed(21, backend="torch")])])
    assert chart is not None
    assert chart.conditions.startswith("torch")
    assert from_runs([make_run(tmp_path, [timed(21, backend="null")])]) is None
    assert from_runs([make_run(tmp_path, [timed(21) | {"provenance": MODELLED}])]) is None


def words(chart: Chart) -> tuple[list[Any], list[Any], Any, Any]:
    """Boxes of the labels and of the marks on the canvas, the axes' own, and the key's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    drawn = figure(chart)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    (axes,) = drawn.axes
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert {text.get_text() for text in labels} == {p.method.label for p in chart.points}
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in labels]
    unit_ms, _ = scale_of(max(point.latency_ms for point in chart.points))
    middles = [
        axes.transData.transform((point.latency_ms / unit_ms, point.method.fid))
        for point in chart.points
    ]
    marks = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in middles]
    (key,) = drawn.legends
    return boxes, marks, axes.get_window_extent(), key.get_window_extent()


@pytest.mark.parametrize(("once", "evaluation"), [(9_000, 3_000), (500, 3_000), (12.0, 0.5)])
def test_no_label_covers_another_or_a_point(once: float, evaluation: float) -> None:
    points = [
        Point(each, once + evaluation * each.nfe * each.unets, None, None,
              MEASURED if each.model else MODELLED, "")
        for each in methods()
    ]  # fmt: skip
    boxes, marks, inside, key = words(Chart("A card", "FP16", "Modelled", points))
    assert not inside.overlaps(key)  # a mark of the key among the points would look like one
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert not [box for box in boxes for mark in marks if box.overlaps(mark)]
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    assert all(inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes)


def test_a_known_card_is_modelled_from_flops_and_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cost(part: str, gflop: float, megabytes: int) -> Cost:
        return Cost(part, gflop * 1e9, megabytes * 10**6, 0, {})

    once = [(cost("text_encoder", 13.3, 246), 1), (cost("vae_decoder", 2514.5, 99), 1)]
    monkeypatch.setattr(frontier, "costs_of_parts", lambda _: (once, cost("unet", 803, 1719)))
    points = by_label(from_device("a100-sxm-80gb"))
    one, many = points["ADD-M"], points["DPM-Solver, 25 steps"]
    peak = devices()["a100-sxm-80gb"].fp16_tflops_dense
    least = EFFICIENCY["NVIDIA"].compute[0]
    assert one.low_ms is not None
    assert one.high_ms is not None
    assert one.low_ms < one.latency_ms < one.high_ms
    assert (many.high_ms or 0) - one.high_ms == pytest.approx(49 * 803 / (least * peak))
    stem = tmp_path / "chart"
    assert shell(main, ["--device", "a100-sxm-80gb", "--out", str(stem)]) == 0
    assert "range (ms)" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {f"chart.{k}" for k in
                                                          ("md", "csv", "svg", "png")}  # fmt: skip
    assert stem.with_suffix(".csv").read_text().count("a100-sxm-80gb") >= 10


def test_the_parts_of_a_model_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "SIZE", (64, 64))
    once, unet = frontier.costs_of_parts("tiny-sd")
    assert len(once) == 2  # one text encoder, and the VAE
    assert all(cost.flops > 0 and cost.weight_bytes > 0 for cost in (unet, *(c for c, _ in once)))


def test_what_cannot_be_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pndm: Run
) -> None:
    assert shell(main, ["--published", str(tmp_path / "none")]) == 2
    assert "no published run has" in capsys.readouterr().err
    assert shell(main, [pndm.name, "--device", "l4", "--runs", str(tmp_path)]) == 2
    assert shell(main, ["--device", "abacus"]) == 2


def test_published_runs_draw_the_chart_and_check_it(tmp_path: Path, pndm: Run) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text("<!-- results -->\n<!-- /results -->\n")
    place = ["--runs", str(tmp_path), "--results", str(results), "--pages", str(readme)]
    assert shell(publish_main, [pndm.name, *place]) == 0
    assert (results / "plots" / "frontier.svg").exists()
    assert "ADD-M" in (results / "tables" / "frontier.md").read_text()
    assert shell(publish_main, ["--check", *place]) == 0
    (results / "tables" / "frontier.csv").write_text("edited")
    assert shell(publish_main, ["--check", *place]) == 4
