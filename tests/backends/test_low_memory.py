"""Low memory: a call loads each part when it needs it, alone, and says what that took."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import Artifact, BackendError, Session, Shapes, UnsupportedError
from backends.commands.image import main as generate
from backends.load import load_pipeline
from backends.pipeline.pipeline import Pipeline
from backends.pipeline.recipe import Recipe
from backends.registry import parse_backend
from core.cli import run as shell
from export.bundle import Bundle
from export.models import SCHEDULERS

PROMPTS = ["a small red circle", "a large blue star on a white background"]


class Loads:
    """Watches what a pipeline's backend loads and closes: order, and the most at one time."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        self.open, self.most = 0, 0
        load = pipeline.backend.load

        def loading(bundle: Bundle, artifact: Artifact) -> Session:
            session = load(bundle, artifact)
            self.order.append(artifact.part)
            self.open += 1
            self.most = max(self.most, self.open)
            close = session.close

            def closing() -> None:
                self.open -= 1
                close()

            monkeypatch.setattr(session, "close", closing)
            return session

        monkeypatch.setattr(pipeline.backend, "load", loading)


def low(bundle: Bundle, backend: str, recipe: Recipe | None = None, **rest: Any) -> Pipeline:
    shapes = Shapes(len(PROMPTS), *bundle.size)
    made = parse_backend(backend).pipeline(bundle, "taesd", shapes, recipe=recipe, **rest)
    return made.use_low_memory().prepare()


@pytest.mark.parametrize("backend", ["ort:threads=1", "ort:context=split,threads=1"])
def test_one_part_at_a_time_draws_the_same_image(
    tiny_bundle: Bundle, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance with an encoded empty prompt: each text encoder is loaded once for both."""
    manifest = tiny_bundle.manifest
    encoded = manifest["pipeline"] | {"force_zeros": False}
    bundle = Bundle(tiny_bundle.path, manifest | {"pipeline": encoded})
    recipe = Recipe(SCHEDULERS["euler"], 5.0, "calls")
    shapes = Shapes(len(PROMPTS), *bundle.size)
    with parse_backend(backend).pipeline(bundle, "taesd", shapes, recipe=recipe) as resident:
        expected = resident(PROMPTS, steps=3, seed=1)
        parts = list(resident.parts)
    assert expected.timings.load == 0
    with low(bundle, backend, recipe) as pipeline:
        loads = Loads(pipeline, monkeypatch)
        assert pipeline.load_s == 0
        for _ in range(2):
            loads.order.clear()
            out = pipeline(PROMPTS, steps=3, seed=1)
            assert loads.order == parts
            assert (loads.most, loads.open) == (1, 0)
            np.testing.assert_array_equal(out.images, expected.images)
            assert out.timings.load > 0


def test_loading_is_part_of_the_call_and_of_no_stage(tiny_bundle: Bundle) -> None:
    with low(tiny_bundle, "null:load_ms=400") as pipeline:
        times = pipeline(PROMPTS, steps=2, seed=1).timings
    assert times.text is not None
    assert times.decode is not None
    assert times.rest is not None
    assert times.load >= 4 * 0.4
    stages = (times.text, sum(times.unet), times.decode, times.rest, times.load)
    assert sum(stages) == pytest.approx(times.total)
    assert min(stages) >= 0
    assert max(stages[:-1]) < 0.4, "one load is longer than any of them"


def test_released_weights_are_gone(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's modules too, some of which lie in reference cycles."""
    with low(tiny_bundle, "torch:threads=1") as pipeline:
        weights: list[weakref.ref[Any]] = []
        load = pipeline.backend.load

        def loading(bundle: Bundle, artifact: Artifact) -> Session:
            assert not any(one() is not None for one in weights), "of the part before"
            session: Any = load(bundle, artifact)
            weights.extend(weakref.ref(one) for one in session.module.parameters())
            return session

        monkeypatch.setattr(pipeline.backend, "load", loading)
        pipeline(PROMPTS, steps=1, seed=1)
        assert len(weights) > 100
        assert not any(one() is not None for one in weights)


def test_a_prompt_in_the_embedding_cache_loads_no_encoder(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with low(tiny_bundle, "null", embedding_cache=2) as pipeline:
        pipeline(PROMPTS, steps=1, seed=1)
        loads = Loads(pipeline, monkeypatch)
        pipeline(PROMPTS[::-1], steps=1, seed=1)
    assert loads.order == ["unet", "taesd_decoder"]


def test_a_call_that_fails_holds_nothing(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with low(tiny_bundle, "null:fail=error,at=0") as pipeline:
        loads = Loads(pipeline, monkeypatch)

        def broken(latents: object) -> object:
            pipeline.session("taesd_decoder")
            raise BackendError("the decoder broke", "the test says so", "nothing")

        monkeypatch.setattr(pipeline, "decode", broken)
        with pytest.raises(BackendError, match="scripted"):
            pipeline(PROMPTS, steps=1, seed=1)
        assert loads.open == 0
        with pytest.raises(BackendError, match="broke"):
            pipeline(PROMPTS, steps=1, seed=1)
        assert (loads.open, loads.order[-1]) == (0, "taesd_decoder")


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("torch:mode=graph", "lie on the device together"),
        ("torch:mode=compile", "compile a part again"),
        ("torch:device=cuda", "lie on the device together"),
        ("cuda", "lie on the device together"),
        ("trt", "lie on the device together"),
        ("qaic", "card's memory"),
        ("qaic:device=ai100-ultra", "modelled with all parts"),
        ("optimum", "all parts at once"),
    ],
)
def test_backends_that_keep_their_parts_say_why(backend: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why) as caught:
        parse_backend(backend).require_low_memory()
    assert "--low-memory" in caught.value.next


@pytest.mark.parametrize("backend", ["ort", "openvino", "torch", "null", "qnn"])
def test_backends_that_load_on_demand(backend: str) -> None:
    parse_backend(backend).require_low_memory()


def draw(bundle: Bundle, out: Path, *flags: str) -> int:
    where: Sequence[str] = ["--model", str(bundle.path), "--out", str(out)]
    return shell(generate, ["a fox", *where, "--low-memory", *flags])


def test_generate_says_what_loading_took(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    assert draw(tiny_bundle, tmp_path / "x.png", "--backend", "null:load_ms=30") == 0
    told = capsys.readouterr().out
    loading = float(told.partition("loading ")[2].partition(" ms")[0])
    assert loading >= 4 * 30
    facts: Any = Image.open(tmp_path / "x.png")
    assert facts.text["low_memory"] == "true"
    assert draw(tiny_bundle, tmp_path / "y.png", "--backend", "torch:mode=graph") == 2
    assert "drop --low-memory" in capsys.readouterr().err
    assert not (tmp_path / "y.png").exists()


def test_load_pipeline_refuses_before_it_looks_for_the_bundle() -> None:
    with pytest.raises(UnsupportedError, match="does not load parts on demand"):
        load_pipeline("no-such-model", "torch:mode=graph", low_memory=True)
