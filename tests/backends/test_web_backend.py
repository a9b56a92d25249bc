"""The backend `web`: the page that `addbench export web` writes, in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backends.base import BackendError, OptionError, UnsupportedError
from backends.check.gate import image_distance
from backends.load import load_pipeline
from backends.pipeline.recipe import make_recipe
from backends.pipeline.session import Shapes
from backends.registry import parse_backend
from backends.web import Driver, WebPipeline
from bench.rows.store import open_run
from bench.run.measure import StopRule, measure
from bench.sweep import main as sweep
from core.cli import run as shell
from core.errors import PreconditionError
from export.bundle import Bundle
from export.web import runtime

PROMPT = "a large white star above a large green triangle on a black background"


@pytest.fixture(scope="module")
def usable() -> None:
    found = parse_backend("web").probe()
    if not found.usable:
        pytest.skip(found.what)
    try:
        runtime.find_tarballs(None)
    except PreconditionError as error:
        pytest.skip(f"{error.what}: {error.why}")


@pytest.fixture(scope="module")
def pipeline(shapes_bundle: Bundle, usable: None) -> Iterator[WebPipeline]:
    with load_pipeline(str(shapes_bundle.path), "web:threads=1", "taesd") as made:
        assert isinstance(made, WebPipeline)
        yield made


def test_what_it_does_not_do_is_refused_before_a_browser_starts(shapes_bundle: Bundle) -> None:
    backend = parse_backend("web")
    with pytest.raises(UnsupportedError, match="one picture at a time"):
        backend.pipeline(shapes_bundle, "vae", Shapes(2, *shapes_bundle.size))
    with pytest.raises(UnsupportedError, match="no scheduler DDIMScheduler"):
        recipe = replace(make_recipe(shapes_bundle), scheduler="DDIMScheduler")
        backend.pipeline(shapes_bundle, "vae", Shapes(1, *shapes_bundle.size), recipe=recipe)
    with pytest.raises(UnsupportedError, match=re.escape(backend.no_pictures)):
        backend.require_pictures()
    with pytest.raises(UnsupportedError, match="holds all parts"):
        backend.require_low_memory()
    with pytest.raises(OptionError, match="no precision=fp16"):
        parse_backend("web:precision=fp16")


def test_another_bundle_or_module_is_another_folder(
    shapes_bundle: Bundle, tiny_bundle: Bundle
) -> None:
    backend = parse_backend("web")
    hashes = backend.depends_on(shapes_bundle, "unet", Shapes(1, *shapes_bundle.size))
    assert {"pipeline.mjs", "worker.mjs", "rng.mjs", "drawn.html"} <= set(hashes)
    assert backend.precision(tiny_bundle) == "fp32"
    # Threads and devices are asked of one folder.
    other = parse_backend("web:threads=2,isolated=0")
    assert other.depends_on(shapes_bundle, "unet", Shapes(1, 64, 64)) == hashes


def test_its_picture_is_that_of_python(pipeline: WebPipeline, shapes_bundle: Bundle) -> None:
    with load_pipeline(str(shapes_bundle.path), "ort", "taesd") as ort:
        for steps, seed in ((1, 3), (2, 2**33 + 1)):
            ours = pipeline(PROMPT, steps=steps, seed=seed)
            theirs = ort(PROMPT, steps=steps, seed=seed)
            assert image_distance(ours.images[0], theirs.images[0]).psnr_db >= 80
            assert ours.nfe == steps == len(ours.timings.unet)
            assert (ours.provenance, ours.own_clock) == ("measured", True)
            times = ours.timings
            assert times.text is not None
            assert times.decode is not None
            assert times.rest is not None
            assert min(times.text, *times.unet, times.decode) > 0
            assert times.rest >= 0


def test_it_says_where_it_ran(pipeline: WebPipeline) -> None:
    versions = pipeline.versions
    assert versions is not None
    assert re.fullmatch(r"\d+(\.\d+)+", versions["chromium"])
    assert versions["onnxruntime-web"] == runtime.ONNXRUNTIME_WEB.version
    assert versions["device"].startswith("WebAssembly, 1 thread")
    assert (versions["threads"], versions["isolated"]) == ("1", "yes")


def test_the_clock_is_the_pages(pipeline: WebPipeline) -> None:
    rule = StopRule(min_samples=3, min_time=0.0, warmup=1)
    measured = measure(pipeline, 1, 1, rule, prompts=[PROMPT])
    assert measured.stages_agree()
    for total, text, unet in zip(
        measured.samples_ms, measured.text_ms, measured.unet_ms, strict=True
    ):
        assert text > 0.1, "no embedding is kept from another call"
        assert sum(unet) + text < total


def test_a_count_of_steps_that_the_folder_has_not(pipeline: WebPipeline) -> None:
    with pytest.raises(UnsupportedError, match="does not draw in 3 steps"):
        pipeline(PROMPT, steps=3)


def test_a_sweep_makes_a_row_like_any_other(
    shapes_bundle: Bundle, usable: None, tmp_path: Path
) -> None:
    code = shell(sweep, [
        "--model", str(shapes_bundle.path), "--backend", "web:isolated=0", "--steps", "1",
        "--decoder", "taesd", "--rounds", "1", "--min-samples", "3", "--min-time", "0.01",
        "--patience", "0", "--no-roofline", "--runs", str(tmp_path),
    ])  # fmt: skip
    assert code == 0
    (row,) = open_run("latest", tmp_path).rows()
    assert (row["status"], row["backend"], row["device"]) == ("ok", "web", "cpu")
    assert (row["options"], row["precision"]) == ("isolated=0", "fp32")
    assert row["image_check"]["status"] == "ok"
    assert row["image_check"]["psnr_db"] > 60
    assert len(row["samples_ms"]) >= 3
    assert row["provenance"] == "measured"
    assert row["versions"]["isolated"] == "no"
    assert "not isolated" in row["versions"]["device"]
    assert row["peak_memory_mb"] is None, "the browser's memory is not the worker's"
    assert row["nfe"] == 1
    json.dumps(row)


def test_a_browser_that_ends_is_an_error_in_words(shapes_bundle: Bundle, usable: None) -> None:
    pipe = load_pipeline(str(shapes_bundle.path), "web:threads=1", "taesd")
    assert isinstance(pipe, WebPipeline)
    assert pipe.page is not None
    Driver.run(pipe.page.browser.close)
    with pytest.raises(BackendError, match="the browser gave no picture"):
        pipe(PROMPT, steps=1)
    pipe.close()


def test_any_thread_may_draw(pipeline: WebPipeline) -> None:
    here = pipeline(PROMPT, steps=1, seed=1).images
    with ThreadPoolExecutor(2) as pool:
        there = list(pool.map(lambda seed: pipeline(PROMPT, steps=1, seed=seed).images, (1, 1)))
    assert all(np.array_equal(images, here) for images in there)


@pytest.mark.slow
def test_webgpu_in_software_is_emulated(shapes_bundle: Bundle, usable: None) -> None:
    with load_pipeline(str(shapes_bundle.path), "web:device=swiftshader", "taesd") as pipe:
        output = pipe(PROMPT, steps=1, seed=3)
        assert output.provenance == "emulated"
        assert pipe.versions is not None
        assert "swiftshader" in pipe.versions["adapter"]
    with load_pipeline(str(shapes_bundle.path), "ort", "taesd") as ort:
        assert (
            image_distance(output.images[0], ort(PROMPT, steps=1, seed=3).images[0]).psnr_db >= 80
        )


@pytest.mark.slow
def test_the_judge_finds_as_many_captions_right_as_in_python(
    shapes_bundle: Bundle, usable: None, tmp_path: Path
) -> None:
    """In a real browser: 100 captions equal to Python's within one."""
    code = shell(sweep, [
        "--model", str(shapes_bundle.path), "--backend", "web", "--backend", "ort", "--steps", "1",
        "--decoder", "vae", "--rounds", "1", "--min-samples", "1", "--min-time", "0.01",
        "--quality", "100", "--patience", "0", "--no-roofline", "--runs", str(tmp_path),
    ])  # fmt: skip
    assert code == 0
    rows = {row["backend"]: row["quality"] for row in open_run("latest", tmp_path).rows()}
    assert rows["web"]["captions"] == rows["ort"]["captions"] == 100
    assert abs(rows["web"]["all"] - rows["ort"]["all"]) <= 0.01 + 1e-9
    assert np.isfinite(rows["web"]["all"])
