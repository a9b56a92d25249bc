"""Images that start from a picture: against diffusers' own pipelines, in every order of the parts.

The bundles are without graphs: torch runs both sides in FP32 (see test_recipes.py).
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_recipes import PROMPTS, SEEDS, SIZE, Make, in_small, make, ours, theirs

from backends.base import Shapes, UnsupportedError
from backends.check.gate import gate_for, image_distance
from backends.check.oracle import Oracle
from backends.check.parity import redraw_prompt
from backends.commands.image import main as image_main
from backends.load import load_pipeline
from backends.pipeline import start
from backends.pipeline.captured import DevicePipeline
from backends.pipeline.pictures import read_pictures
from backends.pipeline.pipeline import Pipeline
from backends.pipeline.recipe import Recipe, make_recipe
from backends.pipeline.session import encoders
from backends.pipeline.start import kept_steps, pairs
from backends.registry import parse_backend
from core.cli import run
from core.errors import PreconditionError
from export.bundle import MANIFEST, Bundle
from export.graphless import write_graphless
from export.models import (
    MODELS,
    PICTURE_PARTS,
    SCHEDULERS,
    SOLVERS,
    TINY_LCM,
    TINY_SD,
    TINY_SDXL,
)
from export.parts import VaeEncoder, wrap
from export.source.checkpoint import open_checkpoint

__all__ = ["make"]
TURBO = replace(TINY_SDXL, name="tiny-turbo", grid=4)


def slowly(value: Any) -> Any:
    """A value whose tests are left out of a quick run."""
    return pytest.param(value, marks=pytest.mark.slow)


def drawings(width: int, height: int) -> list[np.ndarray[Any, Any]]:
    """Two pictures: a bright one with a slope of grey, a dark one with a square."""
    first = np.full((height, width, 3), 230, np.uint8)
    first[:, :, 1] = np.linspace(40, 220, width, dtype=np.uint8)
    second = np.full((height, width, 3), 20, np.uint8)
    second[height // 4 : height // 2, width // 4 : width // 2] = (250, 200, 30)
    return [first, second]


PICTURES = drawings(*SIZE)


def assert_same(
    bundle: Bundle,
    recipe: Recipe,
    steps: int,
    strength: float,
    scale: float,
    negative: str | list[str] | None = None,
) -> int:
    """Both draw the same images from the encoder's mean; returns our NFE."""
    sdxl = bundle.pooled
    cls = (
        diffusers.StableDiffusionXLImg2ImgPipeline
        if sdxl
        else diffusers.StableDiffusionImg2ImgPipeline
    )
    with ours(bundle, recipe) as pipeline, torch.inference_mode():
        pipeline.use_encoder("vae")
        means = pipeline.encode_pictures(read_pictures(PICTURES, *SIZE), len(PICTURES))
        first = pipeline(
            PROMPTS, steps=steps, seed=SEEDS, images=PICTURES, strength=strength, negative=negative
        )
        again = pipeline(
            PROMPTS, steps=steps, seed=SEEDS, images=PICTURES, strength=strength, negative=negative
        )
        noise = pipeline(PROMPTS, steps=steps, seed=SEEDS, negative=negative)
    assert np.array_equal(first.images, again.images), "a call left something behind"
    assert not np.array_equal(first.images, noise.images), "the picture has no part in it"
    expected = theirs(bundle, cls, recipe)(
        PROMPTS,
        image=means.clone(),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=scale,
        negative_prompt=[negative] * len(PROMPTS) if isinstance(negative, str) else negative,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="np",
    ).images
    for image, other in zip(first.images, expected, strict=True):
        distance = image_distance(image, (other * 255).round().astype(np.uint8))
        assert distance.psnr_db >= 45, distance
    return first.nfe


# ---- the same image as diffusers'


@pytest.mark.parametrize("strength", [0.5, slowly(0.8)])
@pytest.mark.parametrize("mode", ["batch", slowly("none")])
@pytest.mark.parametrize("scheduler", [*SOLVERS, "lcm"])
def test_sd_with_every_scheduler(make: Make, scheduler: str, mode: str, strength: float) -> None:
    scale = 0.0 if mode == "none" else 7.5
    recipe = Recipe(SCHEDULERS[scheduler], scale, mode)
    nfe = assert_same(make(TINY_SD), recipe, 5, strength, scale)
    steps = {0.5: 2, 0.8: 4}[strength] + (scheduler == "pndm")
    assert nfe == steps * (1 if mode == "none" else 2)


@pytest.mark.parametrize("strength", [slowly(0.5), 0.8])
@pytest.mark.parametrize("mode", [slowly("calls"), "none"])
@pytest.mark.parametrize("scheduler", [*SOLVERS, "lcm"])
def test_sdxl_with_every_scheduler(make: Make, scheduler: str, mode: str, strength: float) -> None:
    scale = 0.0 if mode == "none" else 5.0
    bundle = make(in_small(TINY_SDXL, "sdxl-base"))
    assert_same(bundle, Recipe(SCHEDULERS[scheduler], scale, mode), 5, strength, scale)


@pytest.mark.parametrize(("tiny", "name"), [(TINY_SD, "sd-turbo"), (TINY_SDXL, "sdxl-turbo"),
                                            (TINY_SDXL, "sdxl-lightning")])  # fmt: skip
@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
def test_models_of_few_steps(make: Make, tiny: Any, name: str, strength: float) -> None:
    bundle = make(in_small(tiny, name))
    assert assert_same(bundle, make_recipe(bundle), 4, strength, 0.0) == 4 * strength


def test_latent_consistency(make: Make) -> None:
    """As diffusers' pipeline of Stable Diffusion runs it, not that of LCM, which spreads all of the
    steps over the part of the schedule that is left."""
    bundle = make(TINY_LCM)
    recipe = make_recipe(bundle, guidance=6.0)
    assert assert_same(bundle, recipe, 4, 0.5, 6.0) == 2


@pytest.mark.parametrize("tiny", [TINY_SD, replace(TINY_SDXL, grid=4), TINY_LCM])
def test_references_from_a_picture_are_what_a_pipeline_draws(make: Make, tiny: Any) -> None:
    bundle = make(tiny)
    recipe, prompt, seed = make_recipe(bundle), redraw_prompt(bundle), 0
    names, pairs = encoders(bundle), [(4, 1), (4, 3)]
    drawn = Oracle(bundle, recipe).redraw(prompt, PICTURES[1], pairs, names, seed)
    decoders = [part.removesuffix("_decoder") for part in bundle.parts if "_decoder" in part]
    assert {*drawn} == {
        (decoder, *pair[:1], encoder, pair[1])
        for decoder in decoders for pair in pairs for encoder in names
    }  # fmt: skip
    for decoder in decoders:
        backend = parse_backend("torch:threads=1")
        with backend.pipeline(bundle, decoder, Shapes(1, *SIZE), recipe=recipe) as pipeline:
            for encoder in names:
                pipeline.use_encoder(encoder)
                right = drawn[decoder, 4, encoder, 3]
                asked: dict[str, Any] = {"steps": 4, "strength": 0.75, "images": PICTURES[1]}
                image = pipeline(prompt, seed=seed, **asked).images[0]
                assert image_distance(image, right).psnr_db >= 45
                other = drawn[decoder, 4, encoder, 1]
                assert image_distance(image, other).psnr_db < 40, "of another strength"
                assert not image_distance(PICTURES[1], right).passes(
                    gate_for("fp16", "fp16", "hub")
                )


# ---- negative prompts, with a picture and without


@pytest.mark.parametrize("negative", ["a red square", ["a red square", ""]])
@pytest.mark.parametrize("mode", ["batch", "calls"])
@pytest.mark.parametrize("tiny", [TINY_SD, TINY_SDXL])
def test_negative_prompts_are_diffusers_own(
    make: Make, tiny: Any, mode: str, negative: str | list[str]
) -> None:
    bundle = make(in_small(tiny, "sdxl-base" if tiny.pooled else "sd15"))
    recipe = Recipe(SCHEDULERS["dpm++2m"], 5.0, mode)
    assert assert_same(bundle, recipe, 4, 0.5, 5.0, negative) == 4
    cls = (diffusers.StableDiffusionXLPipeline if tiny.pooled
           else diffusers.StableDiffusionPipeline)  # fmt: skip
    width, height = SIZE
    expected = theirs(bundle, cls, recipe)(
        PROMPTS, num_inference_steps=3, guidance_scale=5.0, width=width, height=height,
        negative_prompt=[negative] * 2 if isinstance(negative, str) else negative,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], output_type="np",
    ).images  # fmt: skip
    with ours(bundle, recipe) as pipeline:
        drawn = pipeline(PROMPTS, steps=3, seed=SEEDS, negative=negative).images
        plain = pipeline(PROMPTS, steps=3, seed=SEEDS).images
    for image, other, without in zip(drawn, expected, plain, strict=True):
        assert image_distance(image, (other * 255).round().astype(np.uint8)).psnr_db >= 45
        assert tiny is TINY_SD or not np.array_equal(image, without), "zeros are no empty prompt"


def test_an_empty_negative_prompt_is_encoded_where_none_is_zeros(make: Make) -> None:
    bundle = make(in_small(TINY_SDXL, "sdxl-base"))
    assert bundle.force_zeros
    with ours(bundle, Recipe(SCHEDULERS["euler"], 5.0, "batch")) as pipeline:
        drawn = [pipeline(PROMPTS, steps=2, seed=1, negative=text).images for text in (None, "")]
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_negative_prompts_in_one_go(make: Make, mode: str) -> None:
    bundle = make(in_small(TINY_SDXL, "sdxl-base"))
    recipe = Recipe(SCHEDULERS["euler"], 5.0, "batch")
    with (
        ours(bundle, recipe) as plain,
        parse_backend(f"torch:threads=1,mode={mode}").pipeline(
            bundle, "vae", Shapes(2, *SIZE), recipe=recipe, embedding_cache=4 * (mode == "eager")
        ) as other,
    ):
        for text in (None, "a dog", ["a dog", "a red square"], None, ""):
            one, two = (each(PROMPTS, steps=2, seed=1, negative=text) for each in (plain, other))
            assert image_distance(one.images[0], two.images[0]).psnr_db > 60
            assert image_distance(one.images[1], two.images[1]).psnr_db > 60


@pytest.mark.parametrize(
    ("model", "guidance", "negative", "message"),
    [
        (TINY_SDXL, None, "a dog", "distilled without guidance"),
        (TINY_LCM, None, "a dog", "guidance scale is an input"),
        (TINY_SD, 1.0, "a dog", "guidance 0 is none"),
        (TINY_SD, None, ["a", "b", "c"], "3 negative prompts do not fit 2 prompts"),
        (TINY_SD, None, 7, "not a prompt"),
        (TINY_SD, None, [], "there is no prompt"),
    ],
)
def test_negative_prompts_that_nothing_reads_are_refused(
    make: Make, model: Any, guidance: float | None, negative: Any, message: str
) -> None:
    bundle = make(model)
    with (
        ours(bundle, make_recipe(bundle, guidance=guidance)) as pipeline,
        pytest.raises(PreconditionError, match=message),
    ):
        pipeline(PROMPTS, steps=4, negative=negative)


# ---- the encoders


@pytest.mark.parametrize("statistics", [False, True])
def test_the_mean_is_scaled_as_the_pipelines_scale_it(statistics: bool) -> None:
    module: Any = open_checkpoint(MODELS["tiny-sdxl"], "random").module(
        "vae_encoder", torch.float32
    )
    shift, spread = [0.3, -0.2, 0.1, 0.4], [1.5, 2.0, 0.7, 1.1]
    if statistics:
        module.register_to_config(latents_mean=shift, latents_std=spread)
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        ours = VaeEncoder(module)(image)
        mean = module.encode(image).latent_dist.mode()
        decoded = wrap("vae_decoder", module, TINY_SDXL)(ours)
        back = module.decode(mean).sample
    if statistics:
        mean = (mean - torch.tensor(shift)[:, None, None]) / torch.tensor(spread)[:, None, None]
    assert torch.allclose(ours, mean * module.config.scaling_factor, atol=1e-5)
    assert torch.allclose(decoded, back, atol=1e-4), "the decoder takes out what is put in"


def test_the_tiny_encoder_is_diffusers_own() -> None:
    module: Any = open_checkpoint(MODELS["tiny-sdxl"], "random").module(
        "taesd_encoder", torch.float32
    )
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        expected = module.encode(image).latents * module.config.scaling_factor
        assert torch.equal(wrap("taesd_encoder", module, TINY_SDXL)(image), expected)


# ---- the pipeline


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("turbo") / "turbo"
    write_graphless(TURBO, folder, "cpu", "fp32")
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def pipe(turbo: Bundle) -> Iterator[Pipeline]:
    backend = parse_backend("torch:threads=1")
    with backend.pipeline(turbo, "taesd", Shapes(2, *turbo.size)) as made:
        yield made


def test_no_encoder_is_loaded_until_a_picture_is_asked_for(turbo: Bundle) -> None:
    picture = drawings(*turbo.size)[0]
    with parse_backend("torch:threads=1").pipeline(turbo, "taesd", Shapes(1, *turbo.size)) as made:
        made.prepare()
        made("a star", steps=2)
        made("a star", steps=2, images=picture, strength=1)
        assert not set(PICTURE_PARTS) & {*made.parts, *made.artifacts, *made._sessions}
        out = made("a star", steps=2, images=picture, strength=0.5)
        assert made.encoder == "taesd", "that of the decoder"
        assert out.timings.encode is not None
        assert "taesd_encoder" in made._sessions
        assert "vae_encoder" not in made._sessions


@pytest.mark.parametrize("encoder", ["vae", "taesd"])
def test_an_encoder_that_is_named_is_loaded_with_the_rest(turbo: Bundle, encoder: str) -> None:
    with load_pipeline(str(turbo.path), "torch", "taesd", encoder=encoder) as made:
        assert f"{encoder}_encoder" in made._sessions
        picture = drawings(*turbo.size)[0]
        out = made("a star", steps=2, images=picture, strength=0.5)
        times = out.timings
        assert times.total == pytest.approx(
            times.text + times.encode + sum(times.unet) + times.decode + times.rest
        )
        assert len(times.unet) == out.nfe == 1


def test_strength_one_is_text_to_image_bit_for_bit(pipe: Pipeline) -> None:
    pictures = drawings(*pipe.bundle.size)
    for steps in (1, 2, 4):
        plain = pipe(PROMPTS, steps=steps, seed=3)
        whole = pipe(PROMPTS, steps=steps, seed=3, images=pictures, strength=1)
        assert np.array_equal(plain.images, whole.images)
        assert whole.nfe == steps
        assert whole.timings.encode is None


def test_the_less_strength_the_nearer_to_the_picture(pipe: Pipeline) -> None:
    picture = drawings(*pipe.bundle.size)[1]
    latents = pipe.use_encoder().encode_pictures(read_pictures(picture, *pipe.bundle.size), 1)
    given = pipe.to_uint8(pipe.decode(latents))[0].astype(float)
    far = [
        abs(pipe("a star", steps=4, images=picture, strength=share).images[0] - given).mean()
        for share in (0.25, 0.5, 0.75, 1)
    ]
    assert far == sorted(far)


def test_batches_of_pictures_and_prompts(pipe: Pipeline) -> None:
    first, second = drawings(*pipe.bundle.size)

    def draw(prompts: Any, images: Any, seed: Any) -> Any:
        return pipe(prompts, steps=2, seed=seed, images=images, strength=0.5).images

    each = draw(PROMPTS, [first, second], [5, 6])
    same = np.concatenate([draw(PROMPTS[0], first, 5), draw(PROMPTS[1], second, 6)])
    assert min(image_distance(*both).psnr_db for both in zip(each, same, strict=True)) > 50
    assert np.array_equal(draw(PROMPTS, first, 5), draw(PROMPTS, [first, first], [5, 6]))
    assert np.array_equal(
        draw(PROMPTS[0], [first, second], 5), draw([PROMPTS[0]] * 2, [first, second], [5, 6])
    )
    with pytest.raises(PreconditionError, match="3 pictures do not fit 2 prompts"):
        draw(PROMPTS, [first] * 3, 5)
    with pytest.raises(PreconditionError, match="1 seeds do not fit 2 prompts"):
        draw(PROMPTS[0], [first, second], [5])


def test_what_was_done_to_a_picture_is_in_the_output(pipe: Pipeline) -> None:
    wide = np.zeros((100, 300, 4), np.uint8)
    small = drawings(*pipe.bundle.size)[0]
    out = pipe("a star", steps=2, images=[wide, small], strength=0.5)
    assert out.pictures == (
        ("transparency on white", "300x100 cut to the middle in the aspect of 64x64",
         "resized to 64x64 by area"),
        (),
    )  # fmt: skip
    assert pipe("a star", steps=2).pictures == ()


@pytest.mark.parametrize("decoder", [slowly("vae"), "taesd"])
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS.values()))
def test_a_whole_image_in_one_go_starts_from_the_picture_too(
    turbo: Bundle, scheduler: str, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(turbo.scheduler().config) | {"clip_sample": False, "timestep_spacing": "leading"}
    monkeypatch.setattr(
        Bundle, "scheduler", lambda _, asked=None: getattr(diffusers, asked).from_config(config)
    )
    recipe, shapes = Recipe(scheduler), Shapes(2, *turbo.size)
    pictures = drawings(*turbo.size)
    made = [
        parse_backend(f"torch:threads=1,mode={mode}").pipeline(
            turbo, decoder, shapes, recipe=recipe
        )
        for mode in ("eager", "graph")
    ]
    assert isinstance(made[1], DevicePipeline)
    for strength in (0.5, 0.75):
        by_step, whole = (
            each(PROMPTS, steps=4, seed=7, images=pictures, strength=strength) for each in made
        )
        assert whole.nfe == by_step.nfe
        assert whole.timings.text is None, "in one go"
        for image, other in zip(whole.images, by_step.images, strict=True):
            assert image_distance(image, other).psnr_db > 60
    plain, again = (each(PROMPTS, steps=4, seed=7) for each in made)
    assert image_distance(again.images[0], plain.images[0]).psnr_db > 60
    for each in made:
        each.close()


# ---- frames


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_frames_encode_the_prompt_once_and_hold_the_seed(turbo: Bundle, mode: str) -> None:
    first, second = drawings(*turbo.size)
    backend = parse_backend(f"torch:threads=1,mode={mode}")
    with backend.pipeline(turbo, "taesd", Shapes(1, *turbo.size)) as made:
        draw = {"steps": 2, "seed": 7, "strength": 0.5}
        alone = [made("a star", images=each, **draw).images[0] for each in (first, second)]
        ran: list[str] = []
        run = made.run
        made.run = lambda part, **given: (ran.append(part), run(part, **given))[1]  # type: ignore
        frames = list(made.frames([first, second, first], "a star", **draw))
    assert np.array_equal(frames[0].images, frames[2].images), "equal frames, equal images"
    for frame, expected in zip(frames, [*alone, alone[0]], strict=True):
        assert image_distance(frame.images[0], expected).psnr_db > 60
    assert ran.count("text_encoder") == ran.count("text_encoder_2") == 1
    assert ran.count("taesd_encoder") == ran.count("unet") == ran.count("taesd_decoder") == 3
    if mode == "eager":
        assert all(frame.timings.encode for frame in frames)


@pytest.mark.parametrize("negative", [None, "a goat"])
def test_a_captured_image_takes_new_prompts_where_the_old_ones_were(
    make: Make, negative: str | None
) -> None:
    """A graph reads from fixed addresses: of two sequences of frames each has its own prompt."""
    bundle = make(TINY_SD)
    picture = drawings(*SIZE)[0]
    recipe, shapes = make_recipe(bundle), Shapes(1, *SIZE)
    draw: dict[str, Any] = {"steps": 4, "seed": 7, "strength": 0.5, "negative": negative}
    backends = [parse_backend(f"torch:threads=1,mode={mode}") for mode in ("eager", "graph")]
    by_step, whole = (each.pipeline(bundle, "vae", shapes, recipe=recipe) for each in backends)
    assert isinstance(whole, DevicePipeline)
    assert whole.recipe.guided
    addresses = set()
    for prompt in PROMPTS:
        (expected,) = by_step.frames([picture], prompt, **draw)
        (frame,) = whole.frames([picture], prompt, **draw)
        assert image_distance(frame.images[0], expected.images[0]).psnr_db > 60
        (slot,) = whole._slots.values()
        assert slot.told is not None
        addresses.add(tuple(tensor.data_ptr() for tensor in slot.told.tensors()))
    assert len(addresses) == 1
    alone = whole(PROMPTS[1], images=picture, **draw).images[0]
    assert image_distance(alone, frame.images[0]).psnr_db > 60, "and without frames the same"
    for each in (by_step, whole):
        each.close()


def test_frames_are_asked_for_one_by_one(pipe: Pipeline) -> None:
    first, second = drawings(*pipe.bundle.size)
    taken = []

    def camera() -> Iterator[Any]:
        for picture in (first, second, b"no picture"):
            taken.append(picture)
            yield picture

    frames = pipe.frames(camera(), "a star", steps=2, strength=0.5)
    assert not taken
    assert next(frames).images.shape[0] == 1
    assert len(taken) == 1
    next(frames)
    with pytest.raises(PreconditionError, match="none that is read here"):
        next(frames)
    with pytest.raises(PreconditionError, match="no step to run"):
        next(pipe.frames([first], "a star", steps=1, strength=0.5))
    assert list(pipe.frames([], "a star", steps=2, strength=0.5)) == []


# ---- steps and strength


@given(st.integers(1, 60), st.integers(1, 60))
def test_a_share_of_whole_steps_runs_those_steps(steps: int, kept: int) -> None:
    kept = min(kept, steps)
    assert kept_steps(steps, kept / steps) == kept
    assert kept_steps(steps, round(kept / steps, 6) if kept < steps else 1.0) in (kept, kept - 1)


@pytest.mark.parametrize(("steps", "strength"), [(1, 0.5), (1, 0.99), (3, 0.33), (2, 0.49)])
def test_a_strength_that_leaves_no_step_lists_pairs_that_work(
    pipe: Pipeline, steps: int, strength: float
) -> None:
    picture = drawings(*pipe.bundle.size)[0]
    with pytest.raises(PreconditionError, match="no step to run") as refused:
        pipe("a star", steps=steps, images=picture, strength=strength)
    listed = re.findall(r"--steps (\d+) --strength ([\d.]+) \(from timestep (\d+)\)",
                        refused.value.next)  # fmt: skip
    assert len(listed) == start.NEAREST
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # they lie on the model's own timesteps
        for count, share, first in listed:
            assert first in ("749", "499", "249")
            pipe("a star", steps=int(count), images=picture, strength=float(share))


def test_the_pairs_of_a_distilled_model_start_at_its_own_timesteps(turbo: Bundle) -> None:
    listed = {pair for share in (0.25, 0.5, 0.75)
              for pair in pairs(turbo, make_recipe(turbo), 1, share)}  # fmt: skip
    assert listed == {(2, 0.5, 499.0), (4, 0.25, 249.0), (4, 0.5, 499.0), (4, 0.75, 749.0)}


def test_a_pair_off_the_grid_is_said_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_warned", set())
    picture = drawings(*pipe.bundle.size)[0]
    with pytest.warns(UserWarning, match="trained at timesteps 999, 749, 499, 249"):
        pipe("a star", steps=3, images=picture, strength=0.67)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe("a star", steps=3, images=picture, strength=0.67)


def test_a_model_of_all_timesteps_proposes_the_same_strength_with_more_steps(make: Make) -> None:
    bundle = make(TINY_SD)
    listed = pairs(bundle, make_recipe(bundle), 3, 0.1)
    assert listed[0][:2] == (10, 0.1)
    assert all(count * share >= 1 - 1e-9 for count, share, _ in listed)


@pytest.mark.parametrize("strength", [0, -1, 1.5, float("nan"), "0.5", True, None])
def test_what_is_no_strength_is_refused(pipe: Pipeline, strength: Any) -> None:
    picture = drawings(*pipe.bundle.size)[0]
    with pytest.raises(PreconditionError, match="strength") as refused:
        pipe("a star", steps=4, images=picture, strength=strength)
    assert "--steps" in refused.value.next


def test_a_strength_without_a_picture_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(PreconditionError, match="there is none"):
        pipe("a star", steps=4, strength=0.5)


# ---- what has no encoder


def test_a_bundle_of_before_names_the_export(tiny_bundle: Bundle, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_bundle.path, old)
    manifest = json.loads((old / MANIFEST).read_text())
    for part in PICTURE_PARTS:
        del manifest["parts"][part]
        shutil.rmtree(old / part)
    manifest["files"] = {
        name: entry for name, entry in manifest["files"].items()
        if name.split("/")[0] not in PICTURE_PARTS
    }  # fmt: skip
    (old / MANIFEST).write_text(json.dumps(manifest))
    picture = drawings(*tiny_bundle.size)[0]
    with load_pipeline(str(old), "ort", "taesd") as pipeline:
        assert pipeline("a star", steps=1).images.any()
        with pytest.raises(PreconditionError, match="cannot start from a picture") as refused:
            pipeline("a star", steps=2, images=picture, strength=0.5)
        words = refused.value.next.split(": ", 1)[1].split()
        assert words[:4] == ["addbench", "export", "--model", "tiny-sdxl"]
        assert words[-3:] == ["--out", str(old), "--force"]
    with pytest.raises(PreconditionError, match="cannot start from a picture"):
        load_pipeline(str(old), "ort", "taesd", encoder="vae")


def test_other_encoders_are_refused(turbo: Bundle) -> None:
    with pytest.raises(PreconditionError, match="no encoder called 'clip'"):
        load_pipeline(str(turbo.path), "torch", encoder="clip")


def test_a_modelled_card_says_why_not(tiny_bundle: Bundle) -> None:
    with load_pipeline(str(tiny_bundle.path), "qaic:device=ai100-ultra") as pipeline:
        if pipeline.backend.provenance != "modelled":
            pytest.skip("a real card is here")
        with pytest.raises(UnsupportedError, match="prices no encoder"):
            pipeline("a star", steps=2, images=drawings(*tiny_bundle.size)[0], strength=0.5)


# ---- the command


def test_the_command_draws_from_a_file(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    file, out = tmp_path / "in.jpg", tmp_path / "out.png"
    Image.fromarray(drawings(96, 64)[0]).save(file)
    words = ["a star", "--model", str(tiny_bundle.path), "--decoder", "taesd", "--out", str(out)]
    picture = ["--image", str(file), "--strength", "0.5"]
    assert run(image_main, [*words, *picture, "--steps", "2", "--encoder", "vae"]) == 0
    said = capsys.readouterr().out
    assert "96x64 cut to the middle in the aspect of 64x64" in said
    assert re.search(r"text [\d.]+ ms, encode [\d.]+ ms, UNet", said)
    made = Image.open(out)
    assert made.info["encoder"] == "vae"
    assert made.info["strength"] == "0.5"
    out.unlink()
    several = ["a star", "a circle", *words[1:], "--steps", "1", "--seed", "7"]
    assert run(image_main, several) == 0
    assert not out.exists()
    files = [tmp_path / f"out-{number}.png" for number in (1, 2)]
    told = [Image.open(each).info for each in files]
    assert [each["prompt"] for each in told] == ["a star", "a circle"]
    assert [each["seed"] for each in told] == ["7", "8"]
    alone = tmp_path / "alone.png"
    assert run(image_main, ["a circle", *several[2:-1], "8", "--out", str(alone)]) == 0
    assert np.array_equal(np.asarray(Image.open(alone)), np.asarray(Image.open(files[1])))
    capsys.readouterr()
    refused = [
        ([*picture, "--steps", "1"], "no step to run"),
        (["--image", str(tmp_path / "none.png"), "--strength", "0.5"], "is not there"),
        (["--image", str(file), "--steps", "2"], "needs a strength"),
        (["--strength", "0.5"], "--strength belongs to a picture"),
        (["--encoder", "vae"], "--encoder belongs to a picture"),
        (["--negative", "a dog"], "reads no negative prompt"),
        ([*picture, "--encoder", "clip"], "no encoder called"),
    ]
    for more, message in refused:
        assert run(image_main, [*words, *more]) == 2, more
        assert message in capsys.readouterr().err
        assert not out.exists()
