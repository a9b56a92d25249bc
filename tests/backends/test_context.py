"""`ort:context=split`: the same images, what depends on the prompt alone made once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from backends.__main__ import main
from backends.base import Shapes, UnsupportedError, artifact_key
from backends.check.gate import image_distance
from backends.load import load_pipeline
from backends.pipeline.captured import DevicePipeline
from backends.pipeline.pipeline import Pipeline
from backends.pipeline.recipe import Recipe
from backends.registry import parse_backend
from core.cli import run as shell
from core.errors import PreconditionError
from export.bundle import Bundle
from export.models import CONTEXT_PART, SCHEDULERS

SPLIT = "ort:context=split,threads=1"
PROMPTS = ["a small red circle", "a large blue star on a white background"]
SEEDS = [3, 4]
EULER = SCHEDULERS["euler"]


@pytest.fixture(scope="module")
def split(tiny_bundle: Bundle) -> Iterator[Pipeline]:
    with load_pipeline(str(tiny_bundle.path), SPLIT) as made:
        yield made


class Counted:
    """Counts the runs of a pipeline's parts, for as long as it is alive."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[str] = []
        run = pipeline.run

        def counting(part: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            self.runs.append(part)
            return run(part, **inputs)

        monkeypatch.setattr(pipeline, "run", counting)


def recipes(bundle: Bundle) -> list[tuple[Bundle, Recipe]]:
    """Guidance as a batch of two and as two calls; the empty prompt as zeros and encoded."""
    encoded = bundle.manifest["pipeline"] | {"force_zeros": False}
    other = Bundle(bundle.path, bundle.manifest | {"pipeline": encoded})
    return [
        (bundle, Recipe("EulerAncestralDiscreteScheduler")),
        (bundle, Recipe(EULER, 5.0, "batch")),
        (other, Recipe(EULER, 5.0, "batch")),
        (other, Recipe(EULER, 5.0, "calls")),
    ]


@pytest.mark.parametrize("which", range(4))
def test_the_images_are_those_of_the_whole_unet(tiny_bundle: Bundle, which: int) -> None:
    bundle, recipe = recipes(tiny_bundle)[which]
    images = []
    for name in ("ort:threads=1", SPLIT):
        backend, shapes = parse_backend(name), Shapes(2, *bundle.size)
        with backend.pipeline(bundle, "taesd", shapes, recipe=recipe) as pipeline:
            out = pipeline(PROMPTS, steps=3, seed=SEEDS)
            alone = pipeline(PROMPTS[1:], steps=3, seed=SEEDS[1:])
        assert out.nfe == 3 * recipe.evaluations
        assert image_distance(out.images[1], alone.images[0]).psnr_db > 50
        images.append(out.images)
    for whole, halves in zip(*images, strict=True):
        assert image_distance(halves, whole).psnr_db > 60
    assert not np.array_equal(images[1][0], images[1][1])


def test_in_one_go_the_context_stays_where_it_is(tiny_bundle: Bundle) -> None:
    """What depends on the prompt is no constant: reading it would wait for the device."""
    backend, shapes = parse_backend(SPLIT), Shapes(2, *tiny_bundle.size)
    with (
        backend.pipeline(tiny_bundle, "taesd", shapes) as by_step,
        DevicePipeline(backend, tiny_bundle, "taesd", shapes, capture=False) as whole,
    ):
        found, expected = (p(PROMPTS, steps=3, seed=SEEDS) for p in (whole, by_step))
        assert {name for name, *_ in whole._constants} == {"timestep", "time_ids"}
    assert found.timings.text is None, "in one go"
    for image, reference in zip(found.images, expected.images, strict=True):
        assert image_distance(image, reference).psnr_db > 60


def test_a_call_makes_the_context_once_and_in_the_text_stage(
    split: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(split, monkeypatch)
    session = split.session(CONTEXT_PART)
    run = session._run

    def slowly(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        time.sleep(0.2)
        return run(inputs)

    monkeypatch.setattr(session, "_run", slowly)
    out = split(PROMPTS, steps=4, seed=SEEDS)
    encoders = ["text_encoder", "text_encoder_2"]
    assert counted.runs == [*encoders, CONTEXT_PART, *["unet"] * 4, "vae_decoder"]
    times = out.timings
    assert times.text is not None
    assert times.rest is not None
    assert times.text >= 0.2 > times.rest
    assert "encoder_hidden_states" not in split.session("unet").inputs
    assert split.session("unet").inputs["context"].shape[0] == "batch"


def test_the_embedding_cache_holds_the_context(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bundle, recipe in recipes(tiny_bundle)[1:3]:
        backend, shapes = parse_backend(SPLIT), Shapes(2, *bundle.size)
        with (
            backend.pipeline(bundle, "taesd", shapes, recipe=recipe) as plain,
            backend.pipeline(bundle, "taesd", shapes, recipe=recipe, embedding_cache=4) as kept,
        ):
            expected = plain(PROMPTS, steps=1, seed=SEEDS).images
            counted = Counted(kept, monkeypatch)
            for _ in range(2):
                counted.runs.clear()
                found = kept(PROMPTS, steps=1, seed=SEEDS).images
                assert image_distance(found[0], expected[0]).psnr_db > 50
            assert counted.runs == ["unet", "taesd_decoder"], "nothing is made of the prompt again"
            swapped = kept(PROMPTS[::-1], steps=1, seed=SEEDS[::-1]).images
            assert image_distance(swapped[1], expected[0]).psnr_db > 50


def test_only_the_unet_has_another_artifact(tiny_bundle: Bundle) -> None:
    plain, halves = parse_backend("ort"), parse_backend(SPLIT)
    shapes = Shapes(1, *tiny_bundle.size)
    assert plain.parts(tiny_bundle) == tuple(tiny_bundle.parts)
    assert set(halves.parts(tiny_bundle)) == {*tiny_bundle.parts, CONTEXT_PART}
    for part in tiny_bundle.parts:
        same = artifact_key(plain, tiny_bundle, part, shapes) == artifact_key(
            halves, tiny_bundle, part, shapes
        )
        assert same == (part != "unet")
    keys = {artifact_key(halves, tiny_bundle, p, shapes) for p in ("unet", CONTEXT_PART)}
    assert len(keys) == 2


def test_memory_and_disk_are_asked_for_by_what_a_half_holds(tiny_bundle: Bundle) -> None:
    from backends.ort import SMALL, OrtBackend

    plain, halves = parse_backend("ort"), parse_backend(SPLIT)
    assert isinstance(plain, OrtBackend)
    assert isinstance(halves, OrtBackend)
    whole = plain.disk_need(tiny_bundle, "unet") - SMALL
    needs = [halves.disk_need(tiny_bundle, part) - SMALL for part in ("unet", CONTEXT_PART)]
    assert 0 < needs[1] < needs[0] < whole
    assert sum(needs) >= whole


def test_the_commands_name_both_halves(
    tiny_bundle: Bundle, split: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", str(tiny_bundle.path), "--backend", SPLIT]
    assert shell(main, ["compile", *where, "--decoder", "taesd", "--batch", "1,4"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " unet" in line]
    assert [line.split(" batch")[0].rpartition(" ")[2] for line in lines] == [
        CONTEXT_PART, "unet", CONTEXT_PART, "unet"
    ]  # fmt: skip
    assert all(": cached in" in line for line in lines), "one artifact serves every batch"
    assert shell(main, ["parts", *where]) == 0
    assert f"{CONTEXT_PART:<16} taken" in capsys.readouterr().out


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(PreconditionError, match="backend openvino has no option 'context'"):
        parse_backend("openvino:context=split")
    with pytest.raises(UnsupportedError, match="graph=canonical takes no option context"):
        parse_backend("ort:graph=canonical,context=split")
    with pytest.raises(PreconditionError, match="it takes: inline, split"):
        parse_backend("ort:context=apart")


# ---- whole exports, minutes long


@pytest.mark.slow
def test_tiny_sd_and_its_parity_in_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without pooled embeddings that encodes the empty prompt, from export to image."""
    from backends.check.parity import check
    from export.__main__ import main as export

    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    out = tmp_path / "tiny-sd"
    argv = ["--model", "tiny-sd", "--weights", "random", "--no-parity", "--out", str(out)]
    assert shell(export, argv) == 0
    bundle = Bundle.open(out)
    record = check(bundle, SPLIT, say=lambda _: None)
    assert record["parts"]["unet"]["ok"]
    assert all(found["ok"] for found in record["images"].values())
    images = []
    for name in ("ort:threads=1", SPLIT):
        with load_pipeline(str(out), name, guidance_mode="calls") as pipeline:
            images.append(pipeline(PROMPTS[:1], steps=3, seed=1).images[0])
    assert image_distance(*images).psnr_db > 60
