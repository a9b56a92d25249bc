"""What every backend must do, over every backend that can be used here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from backends.artifacts.split_unet import HALVES
from backends.base import BackendError, Shapes, UnavailableError, UnsupportedError
from backends.check.gate import gate_for, image_distance
from backends.load import load_pipeline
from backends.pipeline.pipeline import Pipeline
from backends.registry import BACKENDS, each_backend, parse_backend
from core.errors import PreconditionError
from export.bundle import Bundle
from export.lower.context import PROMPT
from export.models import CONTEXT_PART

PROMPTS = ["a small red circle on a white background", "a large blue star", "", "ein Bär, 熊 🐻"]
# An emulated device takes minutes for what others do in seconds; test_qnn.py is its quick test.
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name == "qnn" else name for name in BACKENDS]
COMPUTING = [each for each in EVERY if each != "null"]
ANY_BATCH = {"trt": "trt:batch=1-4"}
"""Backends whose batch is static, as they are asked to take 1 to 4 prompts."""


def asked(name: str) -> str:
    backend = parse_backend(name)
    found = backend.probe()
    if not found.usable:
        pytest.skip(f"{name}: {found.what}")
    if name == "web":
        pytest.skip("web draws one picture at a time, in a browser: test_web_backend.py goes there")
    if backend.interpreter is not None:
        pytest.skip(f"{name} runs in an environment of its own: test_{name}.py goes there")
    return ANY_BATCH.get(name, name)


@pytest.fixture(scope="module", params=EVERY)
def pipeline(request: pytest.FixtureRequest, tiny_bundle: Bundle) -> Iterator[Pipeline]:
    name, batch = asked(request.param), len(PROMPTS)
    with load_pipeline(str(tiny_bundle.path), name, "taesd", batch=batch) as made:
        yield made


def test_images_and_timings(pipeline: Pipeline, tiny_bundle: Bundle) -> None:
    width, height = tiny_bundle.size
    pipeline.staged = True  # a GPU's waits for its stages only when it is asked to
    out = pipeline(PROMPTS, steps=2, seed=3)
    assert out.images.shape == (len(PROMPTS), height, width, 3)
    assert out.images.dtype == np.uint8
    assert out.nfe == 2 == len(out.timings.unet)
    times = out.timings
    parts = times.text + sum(times.unet) + times.decode + times.rest
    assert parts == pytest.approx(times.total)
    assert min(times.text, *times.unet, times.decode, times.rest) >= 0


def test_sessions_take_and_give_what_the_graph_says(pipeline: Pipeline) -> None:
    for part in pipeline.parts:
        session, info = pipeline.session(part), pipeline.bundle.source(part)
        taken, given = ({spec.name for spec in specs} for specs in (info.inputs, info.outputs))
        if CONTEXT_PART in pipeline.parts and part in HALVES:  # what the one gives, the other takes
            handed = set(pipeline.session(CONTEXT_PART).outputs)
            assert handed
            rest = taken - {PROMPT} | handed
            taken, given = ({PROMPT}, handed) if part == CONTEXT_PART else (rest, given)
        assert set(session.inputs) == taken
        assert set(session.outputs) == given
        with pytest.raises(BackendError, match="do not fit"):
            session.run({"nonsense": torch.zeros(1)})


@pytest.mark.parametrize("name", COMPUTING)
def test_an_image_does_not_depend_on_its_batch(name: str, tiny_bundle: Bundle) -> None:
    path = str(tiny_bundle.path)
    with load_pipeline(path, asked(name), "taesd", batch=len(PROMPTS)) as pipeline:
        together = pipeline(PROMPTS, steps=2, seed=[5, 6, 7, 8]).images
    with load_pipeline(path, asked(name), "taesd") as pipeline:
        alone = pipeline(PROMPTS[1:2], steps=2, seed=6).images
    assert image_distance(together[1], alone[0]).psnr_db > 50
    assert not np.array_equal(together[0], together[1])


def test_every_part_is_announced_before_it_is_compiled_and_loaded(tiny_bundle: Bundle) -> None:
    said: list[tuple[str, str]] = []

    def on_part(doing: str, part: str) -> None:
        said.append((doing, part))

    with load_pipeline(str(tiny_bundle.path), "null", "taesd", on_part=on_part) as pipeline:
        parts = pipeline.parts
    assert said == [(doing, part) for doing in ("compiling", "loading") for part in parts]


@pytest.mark.parametrize("name", COMPUTING)
@pytest.mark.parametrize("decoder", ["vae", "taesd"])
def test_images_match_the_references(name: str, decoder: str, tiny_bundle: Bundle) -> None:
    references = tiny_bundle.references()
    assert references is not None, "the shared bundle is exported with parity"
    with load_pipeline(str(tiny_bundle.path), asked(name), decoder) as pipeline:
        backend = pipeline.backend
        gate = gate_for(
            backend.storage(tiny_bundle), backend.precision(tiny_bundle), tiny_bundle.weights
        )
        for steps in (1, 2, 4):
            image = pipeline([references.prompt], steps=steps, seed=references.seed).images[0]
            distance = image_distance(image, references.images[decoder, steps])
            assert distance.passes(gate), (name, decoder, steps, distance)


@pytest.fixture(scope="module")
def from_picture(tiny_bundle: Bundle) -> dict[str, Any]:
    """What torch draws in FP32 from a picture, by encoder; the picture is the first."""
    references = tiny_bundle.references()
    assert references is not None
    drawn: dict[str, Any] = {"picture": references.images["vae", 4]}
    with load_pipeline(str(tiny_bundle.path), "torch", "taesd") as pipeline:
        for encoder in ("vae", "taesd"):
            pipeline.use_encoder(encoder)
            drawn[encoder] = pipeline(
                PROMPTS[:1], steps=4, seed=9, images=drawn["picture"], strength=0.5
            ).images[0]
    assert not np.array_equal(drawn["vae"], drawn["taesd"])
    return drawn


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("encoder", ["vae", "taesd"])
def test_images_from_a_picture_match_torch(
    name: str, encoder: str, tiny_bundle: Bundle, from_picture: dict[str, Any]
) -> None:
    """Every backend runs the encoders, or says why it does not before it loads anything."""
    words = asked(name)
    backend = parse_backend(words)
    if backend.no_pictures:
        with pytest.raises(UnsupportedError, match=re.escape(backend.no_pictures)):
            load_pipeline(str(tiny_bundle.path), words, "taesd", encoder=encoder)
        return
    gate = gate_for(
        backend.storage(tiny_bundle), backend.precision(tiny_bundle), tiny_bundle.weights
    )
    with load_pipeline(str(tiny_bundle.path), words, "taesd", encoder=encoder) as pipeline:
        out = pipeline(PROMPTS[:1], steps=4, seed=9, images=from_picture["picture"], strength=0.5)
        assert out.nfe == 2
        if name != "null":
            distance = image_distance(out.images[0], from_picture[encoder])
            assert distance.passes(gate), (name, encoder, distance)
        session, info = pipeline.session(f"{encoder}_encoder"), tiny_bundle.parts
        assert set(session.inputs) == {"image"}
        assert set(session.outputs) == {spec.name for spec in info[f"{encoder}_encoder"].outputs}
        plain = pipeline(PROMPTS[:1], steps=2, seed=9).images
        whole = pipeline(PROMPTS[:1], steps=2, seed=9, images=from_picture["picture"], strength=1)
        assert np.array_equal(plain, whole.images), "strength 1 is text to image"


def test_seeds_decide(tiny_bundle: Bundle) -> None:
    with load_pipeline(str(tiny_bundle.path), "ort", "taesd") as pipeline:
        first, again, other = (pipeline("a star", steps=1, seed=s).images for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_embedding_cache_gives_the_same_image_without_encoding(tiny_bundle: Bundle) -> None:
    path = str(tiny_bundle.path)
    with load_pipeline(path, "ort") as plain, load_pipeline(path, "ort", embedding_cache=2) as kept:
        runs = 0
        encode = kept.session("text_encoder")._run

        def counting(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            nonlocal runs
            runs += 1
            return encode(inputs)

        kept.session("text_encoder")._run = counting  # type: ignore[method-assign]
        for prompts in (["a"], ["a"], ["a", "b", "a"], ["c"], ["b"], ["a"]):
            same = kept(prompts, steps=1, seed=4).images
            assert image_distance(same[0], plain(prompts, steps=1, seed=4).images[0]).psnr_db > 50
        # a; a is kept; b; c drops a, the least recently used; b is kept; a once more.
        assert runs == 4


@pytest.mark.parametrize(
    ("prompts", "seed", "steps", "message"),
    [
        ([], 0, 1, "no prompt"),
        (["a", 3], 0, 1, "not a prompt"),
        (None, 0, 1, "not a prompt"),
        (3, 0, 1, "not a prompt"),
        (b"ab", 0, 1, "not a prompt"),
        ({"a": 1}, 0, 1, "not a prompt"),
        (["a"], None, 1, "not a seed"),
        (["a"], 1.5, 1, "not a seed"),
        (["a"], ["1"], 1, "not a seed"),
        (["\ud800"], 0, 1, "not valid text"),
        (["a", "b"], [1], 1, "1 seeds do not fit 2 prompts"),
        (["a"], [-1], 1, "not a seed"),
        (["a"], [2**63], 1, "not a seed"),
        (["a"], 0, 0, "at least 1"),
    ],
)
def test_bad_requests_are_refused(
    prompts: Any, seed: Any, steps: int, message: str, tiny_bundle: Bundle
) -> None:
    with (
        load_pipeline(str(tiny_bundle.path), "null") as pipeline,
        pytest.raises(PreconditionError, match=message),
    ):
        pipeline(prompts, steps=steps, seed=seed)


def test_a_long_prompt_is_cut_with_a_warning(tiny_bundle: Bundle) -> None:
    long = "a red circle " * 40
    with load_pipeline(str(tiny_bundle.path), "ort") as pipeline:
        with pytest.warns(UserWarning, match="CLIP reads 77"):
            cut = pipeline.tokenise([long])
        assert all(ids.shape == (1, 77) for ids in cut)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpu", "no backend called 'tpu'"),
        ("ort:speed=11", "no option 'speed'"),
        ("ort:level=fast", "not a value"),
        ("ort:threads", "not a backend"),
        ("ort:threads=1,threads=2", "not a backend"),
    ],
)
def test_bad_backends_are_refused(text: str, message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        parse_backend(text)


@pytest.mark.parametrize("threads", ["0", "-1", "many"])
def test_bad_threads_are_refused(threads: str, tiny_bundle: Bundle) -> None:
    with pytest.raises(PreconditionError, match="not a number of threads"):
        load_pipeline(str(tiny_bundle.path), f"torch:threads={threads}")


def test_a_backend_whose_module_is_broken_breaks_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKENDS, "broken", "backends.no_such_module:Broken")
    states = {name: found for name, _, found in each_backend()}
    assert not states["broken"].usable
    assert "no_such_module" in states["broken"].why
    assert states["null"].usable
    with pytest.raises(UnavailableError):
        parse_backend("broken")


def test_the_probe_comes_before_the_bundle() -> None:
    with pytest.raises(UnavailableError, match="it was told so"):
        load_pipeline("no-such-model", "null:usable=0")


def test_the_null_backend_fails_as_scripted(tiny_bundle: Bundle) -> None:
    backend = parse_backend("null:fail=error,at=1,only_steps=2")
    width, height = tiny_bundle.size
    with backend.pipeline(tiny_bundle, "vae", Shapes(1, width, height)) as pipeline:
        pipeline("a", steps=2)
        pipeline("a", steps=1)
        pipeline.calls = 1  # type: ignore[attr-defined]
        with pytest.raises(BackendError, match="scripted"):
            pipeline("a", steps=2)
