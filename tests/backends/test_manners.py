"""What a user may take for granted: a tidy home, threads, a warning about unknown words."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from backends.load import load_pipeline
from backends.pipeline.prompts import warn_of_unknown
from backends.registry import parse_backend
from core.files import ROOT
from distill.captions import caption_of, loosened
from distill.shapes import scenes
from export.bundle import Bundle
from export.models import MODELS

SHAPES = MODELS["shapes-turbo"]
PLAIN = "ort:convolutions=op,products=op,attention=multihead,norms=layer"
"""Without operators of our own, which an empty build folder would have to build first."""


def left_in_home(tmp_path: Path, *words: str) -> list[str]:
    """What a command leaves in an empty HOME that no variable of the project's points away from."""
    home = tmp_path / "home"
    home.mkdir()
    own = {"ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MPLCONFIGDIR",
           "CI", "HF_HOME", "XDG_CACHE_HOME"}  # fmt: skip
    variables = {name: text for name, text in os.environ.items() if name not in own}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=variables | {"HOME": str(home), "ADDBENCH_BUILD": str(tmp_path / "build")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return sorted(str(file.relative_to(home)) for file in home.rglob("*"))


@pytest.mark.parametrize("backend", [PLAIN, "openvino"])
def test_an_image_leaves_nothing_in_home(backend: str, tiny_bundle: Bundle, tmp_path: Path) -> None:
    if not parse_backend(backend).probe().usable:
        pytest.skip(f"{backend} cannot be used here")
    words = ["addbench", "image", "a star", "--model", str(tiny_bundle.path)]
    out = ["--backend", backend, "--out", str(tmp_path / "star.png")]
    assert left_in_home(tmp_path, *words, *out) == []


def test_workers_leave_nothing_in_home(tiny_bundle: Bundle, tmp_path: Path) -> None:
    words = [
        "bench.sweep",
        "--model",
        str(tiny_bundle.path),
        "--backend",
        PLAIN,
        "--quick",
        "--no-roofline",
    ]
    cells = ["--steps", "1", "--decoder", "taesd", "--out", str(tmp_path / "runs")]
    assert left_in_home(tmp_path, *words, *cells) == []


@pytest.mark.slow
def test_an_export_leaves_nothing_in_home(tmp_path: Path) -> None:
    words = ["export", "--model", "tiny-sdxl", "--weights", "random"]
    assert left_in_home(tmp_path, *words) == []


def test_threads_may_share_a_pipeline(tiny_bundle: Bundle) -> None:
    """Calls of other lengths, seeds and prompts at once give what each gives alone."""
    asked = [(prompt, steps, seed) for seed, prompt in enumerate(["a star", "a circle", ""])
             for steps in (1, 2, 4)]  # fmt: skip
    with load_pipeline(str(tiny_bundle.path), "ort", "taesd", embedding_cache=2) as pipeline:

        def draw(job: tuple[str, int, int]) -> np.ndarray:
            prompt, steps, seed = job
            out = pipeline(prompt, steps=steps, seed=seed)
            assert len(out.timings.unet) == steps == out.nfe
            return out.images

        alone = [draw(job) for job in asked]
        with ThreadPoolExecutor(6) as pool:
            for _ in range(4):
                for images, expected in zip(pool.map(draw, asked), alone, strict=True):
                    assert np.array_equal(images, expected)


def test_words_that_the_shapes_do_not_have_are_named() -> None:
    with pytest.warns(UserWarning, match="does not know 'lighthouse', 'dusk'"):
        warn_of_unknown(SHAPES, ["a lighthouse on a black background, dusk."])


def test_nothing_is_said_of_captions_in_any_wording() -> None:
    rng = np.random.default_rng(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unknown(SHAPES, SHAPES.prompts)
        warn_of_unknown(MODELS["tiny-sdxl"], ["a lighthouse at dusk"])
        for scene in scenes(200, 3, held_out=False):
            warn_of_unknown(SHAPES, [caption_of(scene).text, loosened(scene, rng).text])
        warn_of_unknown(SHAPES, ["", "a large re", "A LARGE RED CIRCLE."])


def test_the_best_decoder_is_the_default(tiny_bundle: Bundle) -> None:
    with load_pipeline(str(tiny_bundle.path), "null") as pipeline:
        assert pipeline.decoder == "vae"
