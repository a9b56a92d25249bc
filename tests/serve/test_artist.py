"""Real pipelines behind a worker: a picture is the same alone and in a batch, on each backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from backends.load import load_pipeline
from backends.registry import parse_backend
from core.errors import AddbenchError, PreconditionError
from export.bundle import Bundle
from serve.artist import Artist, batch_sizes, load
from serve.worker import CancelledError, encoded

JOB: dict[str, Any] = {"decoders": ["vae", "taesd"], "all_decoders": True, "batch": 4,
                       "scheduler": None, "guidance": None}  # fmt: skip


def artist_of(bundle: Bundle, backend: str, **rest: Any) -> Artist:
    capability = parse_backend(backend).probe()
    if not capability.usable:
        pytest.skip(f"{backend}: {capability.what}")
    told: list[tuple[str, float | None]] = []

    def progress(stage: str, share: float | None = None) -> None:
        told.append((stage, share))

    job = {**JOB, "bundle": str(bundle.path), "backend": backend, **rest}
    artist = load(job, progress)
    assert told[-1] == ("warming up", 1.0)
    shares = [share for _, share in told if share is not None]
    assert shares == sorted(shares)
    parts = {part for pipeline in artist.pipelines.values() for part in pipeline.parts}
    named = {stage.split(",")[0].removeprefix("loading ") for stage, _ in told}
    assert parts <= named, "each part is said when it is loaded"
    assert f"loading {artist.first.parts[0]}, 1 of {len(parts)}" in dict(told)
    return artist


def order(prompts: list[str], decoder: str = "vae", steps: int = 1) -> dict[str, Any]:
    pictures = [{"prompt": prompt, "seed": n, "format": "png", "bytes": 0}
                for n, prompt in enumerate(prompts)]  # fmt: skip
    return {"id": 0, "steps": steps, "decoder": decoder, "strength": None, "pictures": pictures}


def drawn(artist: Artist, asked: Mapping[str, Any]) -> list[Any]:
    images, _, _ = artist.draw(asked, [], lambda: None)
    assert not any(isinstance(image, AddbenchError) for image in images)
    return images


@pytest.mark.parametrize("backend", ["ort", "torch", "openvino", "null"])
def test_a_picture_is_the_same_alone_and_in_a_batch(shapes_bundle: Bundle, backend: str) -> None:
    artist = artist_of(shapes_bundle, backend)
    assert artist.sizes == [1, 2, 4]
    assert not artist.remarks
    prompts = ["a red circle", "a blue star", "a green square on cyan", "a white triangle"]
    together = drawn(artist, order(prompts))
    for number, prompt in enumerate(prompts):
        alone = order([prompt])
        alone["pictures"][0]["seed"] = number
        (image,) = drawn(artist, alone)
        assert artist.same(image, together[number])
        if backend in ("ort", "null"):
            assert np.array_equal(image, together[number])


def test_pictures_to_start_from(shapes_bundle: Bundle) -> None:
    artist = artist_of(shapes_bundle, "ort")
    facts = artist.facts()
    assert facts["pictures"]
    shares = [share for _, share in facts["pairs"]]
    assert shares == sorted(set(shares))
    assert 0 < shares[0] <= shares[-1] < 1
    (source,) = drawn(artist, order(["a large red circle on the left of a black background"]))
    file = encoded(source, "png")
    steps, strength = facts["pairs"][0]
    asked = order(["a large blue circle on the left of a black background"] * 3, steps=steps)
    asked["strength"] = strength
    images, notes, ms = artist.draw(asked, [file, b"no picture", file], lambda: None)
    assert isinstance(images[1], PreconditionError)
    assert len(notes) == 3
    assert ms["picture"] > 0
    pipe = load_pipeline(shapes_bundle.path, "ort", "vae")
    alone = pipe(
        ["a large blue circle on the left of a black background"], steps=steps, seed=[2],
        images=source, strength=strength,
    )  # fmt: skip
    assert artist.same(images[2], alone.images[0])


def test_the_decoders_share_the_rest(shapes_bundle: Bundle) -> None:
    artist = artist_of(shapes_bundle, "ort")
    vae, taesd = artist.pipelines["vae"], artist.pipelines["taesd"]
    assert vae.session("unet") is taesd.session("unet")
    one, two = (drawn(artist, order(["a red circle"], decoder))[0] for decoder in ("vae", "taesd"))
    assert not np.array_equal(one, two)


def test_batches_that_change_pictures_are_given_up(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Artist, "same", lambda *_: False)
    artist = artist_of(tiny_bundle, "null", batch=None)
    assert artist.sizes == [1]
    assert "in a batch of 2" in artist.remarks[0]
    asked = artist_of(tiny_bundle, "null", batch=2)
    assert asked.sizes == [1, 2]  # somebody asked for them, and is told
    assert asked.remarks


def test_slow_pictures_are_not_batched_where_nobody_asked(tiny_bundle: Bundle) -> None:
    assert artist_of(tiny_bundle, "null:unet_ms=600", batch=None).sizes == [1]


def test_graphs_of_one_batch_are_filled_up(shapes_bundle: Bundle) -> None:
    artist = artist_of(shapes_bundle, "ort", batch=2)
    artist.fixed = True
    images = drawn(artist, order(["a red circle"]))
    assert len(images) == 1
    artist.fixed = False
    assert np.array_equal(images[0], drawn(artist, order(["a red circle"]))[0])


def test_a_cancelled_batch_stops_at_the_next_stage(shapes_bundle: Bundle) -> None:
    artist = artist_of(shapes_bundle, "ort")
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise CancelledError

    with pytest.raises(CancelledError):
        artist.draw(order(["a red circle"], steps=4), [], check)
    assert calls == 4
    before = drawn(artist, order(["a red circle"], steps=4))
    assert np.array_equal(before[0], drawn(artist, order(["a red circle"], steps=4))[0])


def test_batch_sizes() -> None:
    assert [batch_sizes(most) for most in (1, 2, 3, 4, 6)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6],
    ]  # fmt: skip
