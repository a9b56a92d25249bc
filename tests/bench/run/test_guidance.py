"""Guidance and schedulers as axes: cells, rows old and new, a sweep, NFE in tables and plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from made import cell, make_run, row

from bench.commands.show import main as show
from bench.rows.cell import Cell
from bench.rows.fields import KEY_COLUMNS, LATER
from bench.rows.header import Header
from bench.rows.store import ROWS, Run, open_run
from bench.rows.summary import by_cell
from bench.run.plan import default_steps, make_cells, probe
from bench.run.request import Request
from bench.show import export as rows
from bench.show import table
from bench.show.series import series_of
from bench.sweep import main as sweep_main
from core.cli import run as shell
from core.errors import PreconditionError
from core.files import ROOT
from export.bundle import Bundle
from export.graphless import write_graphless
from export.models import MODELS, SOLVERS, TINY_SD

Sweep = Callable[..., int]


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """tiny-sd: guidance 7.5, PNDM at 20 steps."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny-sd"
    write_graphless(TINY_SD, folder, "cpu")
    return Bundle.open(folder)


# ---- negative prompts


def test_negative_prompts_are_an_axis_where_guidance_reads_them(
    guided: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(guided.path), "--out", str(tmp_path), "--backend", "null", "--quick"]
    argv += ["--steps", "2", "--decoder", "taesd", "--min-time", "0.01", "--no-roofline"]
    assert shell(sweep_main, [*argv, "--negative", "a goat, blurry", "--negative", ""]) == 0
    run = open_run("latest", tmp_path)
    with_, without = run.rows()
    assert (with_["negative"], without["negative"]) == ("a goat, blurry", "")
    assert with_["image_check"]["status"] == "no_reference"
    assert str(run.plan[0]).endswith("negative 'a goat, blurry'")
    assert "| negative" in table.markdown(run, run.rows())
    assert Cell.of(with_) == run.plan[0] != run.plan[1] == Cell.of(without)
    capsys.readouterr()
    resumed = [*argv[:4], "--resume", run.name, "--negative", "a dog"]
    assert shell(sweep_main, resumed) == 2
    assert "--negative was ['a goat, blurry', '']" in capsys.readouterr().err
    for more, said in (
        (["--guidance", "1"], "reads no negative prompt without guidance"),
        (["--steps", "2", "--negative", "a dog"], "name each value once"),
    ):
        words = [*argv, "--negative", "a dog", "--out", str(tmp_path / "none"), *more]
        assert shell(sweep_main, words) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_model_without_guidance_reads_no_negative_prompt(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_bundle.path), "--backend", "null", "--negative", "a dog"]
    assert shell(sweep_main, [*words, "--out", str(tmp_path / "runs")]) == 2
    assert "distilled without guidance" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# ---- cells and rows


def test_a_cell_without_guidance_is_called_as_ever() -> None:
    one = cell(steps=4)
    assert str(one) == "null taesd batch 1 steps 4"
    assert str(cell(guidance=5.0, guidance_mode="batch")).endswith("steps 1 guidance 5")
    other = cell(scheduler="DDIMScheduler", guidance=7.5, guidance_mode="calls")
    assert str(other).endswith("steps 1 ddim guidance 7.5 in two calls")
    assert str(cell(model="tiny-sdxl+style")) == "null taesd batch 1 steps 1"


def test_rows_from_before_guidance_are_read_as_without(tmp_path: Path) -> None:
    made = make_run(tmp_path, [row(cell(steps=n), [10.0 * n] * 3) for n in (1, 2)])
    file = made.path / ROWS
    old = [{k: v for k, v in one.items() if k not in LATER} for one in made.all_rows()]
    file.write_text("".join(json.dumps(one) + "\n" for one in old))
    header = made.header.as_json()
    plan = [{k: v for k, v in one.items() if k not in LATER} for one in header["plan"]]
    again = Run(made.path, Header.of(header | {"plan": plan}))
    assert [Cell.of(one) for one in again.rows()] == made.plan == again.plan
    assert again.missing() == []
    assert {(one["guidance"], one["guidance_mode"]) for one in again.rows()} == {(0.0, "none")}


def test_what_is_published_still_opens() -> None:
    published = ROOT / "results" / "published"
    for folder in filter(Path.is_dir, published.iterdir()):
        target = open_run(folder.name, published)
        assert target.rows()
        assert target.missing() == []


def test_series_of_a_dashboard_keep_their_names(tmp_path: Path) -> None:
    made = make_run(
        tmp_path,
        [row(cell(), [1.0] * 3), row(cell(guidance=5.0, guidance_mode="calls"), [2.0] * 3, nfe=2)],
    )
    names = [entry["name"] for entry in json.loads(rows.smaller_is_better(made))]
    assert "guidance" not in names[0]
    assert names[1].endswith("guidance 5.0, guidance_mode calls")


# ---- the axes


def test_the_axes_multiply(guided: Bundle) -> None:
    asked = Request(
        batches=(2,),
        decoders=("vae",),
        steps=(15, 20),
        schedulers=("dpm++2m", "unipc", "PNDMScheduler"),
        guidance_modes=("batch", "calls"),
    )
    cells = make_cells(guided, probe(["null"]), asked)
    assert len(cells) == len(set(cells)) == 12
    assert {one.guidance for one in cells} == {7.5}
    assert len({one.group for one in cells}) == 6
    usual = Request(decoders=("vae",), steps=(20,))
    (own,) = make_cells(guided, probe(["null"]), usual)
    found = (own.scheduler, own.guidance, own.guidance_mode)
    assert found == ("PNDMScheduler", 7.5, "batch")
    (none,) = make_cells(guided, probe(["null"]), replace(usual, guidance=1.0))
    assert (none.guidance, none.guidance_mode) == (0.0, "none")


def test_models_are_measured_at_the_steps_they_are_used_with() -> None:
    found = {name: default_steps(model) for name, model in MODELS.items()}
    assert (found["sd15"], found["sdxl-base"]) == ([20], [50])
    assert found["sdxl-turbo"] == found["lcm-sdxl"] == [1, 2, 4]
    assert (found["sdxl-lightning-2step"], found["sdxl-lightning"]) == ([2], [4])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scheduler", "dpm++2m", "--steps", "20"], "tiny-sdxl was not made for dpm++2m"),
        (["--scheduler", "heun"], "no scheduler called 'heun'"),
        (["--guidance", "7.5"], "was not made for guidance"),
        (["--guidance-mode", "calls"], "nothing to split"),
        (["--guidance-mode", "twice"], "no guidance mode 'twice'"),
        (["--size", "64x"], "not a size"),
        (["--size", "128"], "64x64"),
    ],
)
def test_what_a_model_was_not_made_for_is_2(
    sweep: Sweep, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path / "runs", "--backend", "null", *flags) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "next:" in told
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def swept(guided: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs")
    argv = ["--model", str(guided.path), "--out", str(out), "--backend", "null", "--quick"]
    argv += ["--scheduler", "pndm,ddim", "--steps", "2,5", "--decoder", "taesd", "--batch", "3"]
    assert shell(sweep_main, [*argv, "--guidance", "3", "--min-time", "0.01"]) == 0
    return open_run("latest", out)


def test_a_row_says_how_many_evaluations_an_image_took(swept: Run) -> None:
    found = {(one["scheduler"], one["steps"]): one["nfe"] for one in swept.rows()}
    assert found == {
        ("PNDMScheduler", 2): 6,  # three timesteps, each twice
        ("PNDMScheduler", 5): 12,
        ("DDIMScheduler", 2): 4,
        ("DDIMScheduler", 5): 10,
    }
    for one in swept.rows():
        assert (one["guidance"], one["guidance_mode"]) == (3.0, "batch")
        assert one["image_check"]["status"] == "no_reference"
        assert tuple(one)[6 : 6 + len(KEY_COLUMNS)] == KEY_COLUMNS


def test_the_table_names_scheduler_guidance_and_nfe(swept: Run) -> None:
    text = table.markdown(swept, swept.rows(), brief=True)
    assert "guidance 3 (batch)" in text
    assert "| scheduler" in text
    assert "NFE |" in text
    csv = table.csv(swept.rows()).splitlines()
    assert ",guidance," in csv[0]
    plain = table.csv([row(cell(), [1.0] * 3)])
    assert "guidance" not in plain, "published tables stay as they are"


def test_a_resumed_sweep_keeps_its_recipes(
    swept: Run, guided: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(guided.path), "--out", str(swept.path.parent), "--resume"]
    assert shell(sweep_main, [*argv, "--scheduler", "pndm,ddim", "--guidance", "3"]) == 0
    assert shell(sweep_main, [*argv, "--scheduler", "unipc", "--guidance", "4"]) == 2
    told = capsys.readouterr().err
    assert "--scheduler was ['PNDMScheduler', 'DDIMScheduler']" in told
    assert "--guidance was 3.0 and is 4.0" in told


def test_latency_against_evaluations(swept: Run, capsys: pytest.CaptureFixture[str]) -> None:
    lines = by_cell(swept.rows())
    by_nfe = {s.label: s for s in series_of({"": lines}, "nfe")[3]}
    by_steps = {s.label: s for s in series_of({"": lines})[3]}
    assert set(by_nfe) == {"null, taesd, guidance 3", "null, taesd, ddim guidance 3"}
    for label, series in by_nfe.items():
        assert [y for _, y in series.points("median_ms")] == [
            y for _, y in by_steps[label].points("median_ms")
        ]
        assert [x for x, _ in by_steps[label].points("median_ms")] == [2, 5]
        assert [x for x, _ in series.points("median_ms")] in ([6, 12], [4, 10])
    argv = [swept.name, "--as", "plot", "--runs", str(swept.path.parent), "--x", "nfe"]
    assert shell(show, argv) == 0
    drawn = (swept.path / "plot-nfe.svg").read_text()
    assert drawn != (swept.path / "plot.svg").read_text()
    assert "plot-nfe.png" in capsys.readouterr().out
    with pytest.raises(PreconditionError):
        show([*argv[:-1], "flops"])


def test_every_solver_has_a_name_and_a_class() -> None:
    import diffusers

    from export.models import SCHEDULERS

    assert set(SOLVERS) < set(SCHEDULERS)
    assert all(hasattr(diffusers, cls) for cls in SCHEDULERS.values())
