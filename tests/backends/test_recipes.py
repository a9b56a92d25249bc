"""Schedulers, guidance and model forms against diffusers' own pipelines; what is refused.

Same weights, same noise, same image. The bundles are without graphs: torch runs both sides in FP32,
and what is compared is the order of the parts, the guidance and the schedulers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends.base import Shapes, UnsupportedError, stage_parts
from backends.check.gate import image_distance
from backends.pipeline.conditioning import guidance_embedding
from backends.pipeline.pipeline import Pipeline
from backends.pipeline.recipe import Recipe, check_steps, make_recipe
from backends.registry import parse_backend
from core.errors import PreconditionError
from export.bundle import Bundle
from export.graphless import write_graphless
from export.models import (
    CONTEXT_PART,
    MODELS,
    SCHEDULERS,
    SOLVERS,
    TINY_LCM,
    TINY_SD,
    TINY_SDXL,
    Model,
)
from export.source.checkpoint import ARCHITECTURES

PROMPTS = ["a small red circle", "a large blue star on a white background"]
SEEDS = [3, 4]
SIZE = (96, 64)
"""Not square: height and width must not be swapped anywhere."""
EULER = SCHEDULERS["euler"]

Make = Callable[[Model], Bundle]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A bundle of a model, each made once."""
    made: dict[Model, Bundle] = {}

    def bundle(model: Model) -> Bundle:
        if model not in made:
            folder = tmp_path_factory.mktemp("bundles") / model.name
            write_graphless(model, folder, "cpu", "fp32")
            made[model] = Bundle.open(folder)
        return made[model]

    return bundle


def in_small(tiny: Model, name: str) -> Model:
    """The networks of `tiny`, run as the model `name` is."""
    like = MODELS[name]
    fields = ("scheduler", "spacing", "prediction", "steps", "step_counts", "grid",
              "guidance", "guidance_form", "schedulers")  # fmt: skip
    return replace(tiny, name=f"tiny-{name}", **{field: getattr(like, field) for field in fields})


def ours(bundle: Bundle, recipe: Recipe) -> Pipeline:
    backend = parse_backend("torch:threads=1")
    return backend.pipeline(bundle, "vae", Shapes(len(PROMPTS), *SIZE), recipe=recipe)


def theirs(bundle: Bundle, cls: Any, recipe: Recipe) -> Any:
    """A pipeline of diffusers over the same modules."""
    checkpoint = bundle.checkpoint()
    names = {"vae_decoder": "vae"}
    modules = {
        names.get(part, part): checkpoint.module(part, torch.float32)
        for part in stage_parts(tuple(bundle.parts), "vae")
    }
    tokenizers = dict(zip(("tokenizer", "tokenizer_2"), bundle.tokenizers(), strict=False))
    if bundle.pooled:
        rest = {"force_zeros_for_empty_prompt": bundle.force_zeros, "add_watermarker": False}
    else:
        rest = {"safety_checker": None, "feature_extractor": None,
                "requires_safety_checker": False}  # fmt: skip
    # As a user would: the config that the checkpoint ships, under another class.
    config = json.loads((bundle.path / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, recipe.scheduler).from_config(config)
    pipe = cls(**modules, **tokenizers, **rest, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same(bundle: Bundle, cls: Any, recipe: Recipe, steps: int, scale: float) -> int:
    """Both pipelines draw the same images twice over; returns our NFE."""
    width, height = SIZE
    expected = theirs(bundle, cls, recipe)(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=scale,
        width=width,
        height=height,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="np",
    ).images
    with ours(bundle, recipe) as pipeline:
        first = pipeline(PROMPTS, steps=steps, seed=SEEDS)
        again = pipeline(PROMPTS, steps=steps, seed=SEEDS)
    assert np.array_equal(first.images, again.images), "a call left something behind"
    for image, other in zip(first.images, expected, strict=True):
        distance = image_distance(image, (other * 255).round().astype(np.uint8))
        assert distance.psnr_db >= 45, distance
    assert not np.array_equal(first.images[0], first.images[1])
    return first.nfe


# ---- the same image


@pytest.mark.parametrize("scheduler", SOLVERS)
def test_stable_diffusion_with_every_solver(make: Make, scheduler: str) -> None:
    recipe = Recipe(SCHEDULERS[scheduler], 7.5, "batch")
    nfe = assert_same(make(TINY_SD), diffusers.StableDiffusionPipeline, recipe, 4, 7.5)
    assert nfe == (10 if scheduler == "pndm" else 8), "PNDM runs a timestep more"


@pytest.mark.parametrize("scheduler", ["pndm", "dpm++2m", "unipc"])
@pytest.mark.parametrize("mode", ["batch", "calls", "none"])
def test_guidance_modes_of_stable_diffusion(make: Make, scheduler: str, mode: str) -> None:
    scale = 0.0 if mode == "none" else 5.0
    recipe = Recipe(SCHEDULERS[scheduler], scale, mode)
    nfe = assert_same(make(TINY_SD), diffusers.StableDiffusionPipeline, recipe, 3, scale)
    assert nfe == (3 + (scheduler == "pndm")) * (1 if mode == "none" else 2)


@pytest.mark.parametrize("steps", [1, 4])
def test_sd_turbo_steps_on_trailing_timesteps(make: Make, steps: int) -> None:
    bundle = make(in_small(TINY_SD, "sd-turbo"))
    recipe = make_recipe(bundle)
    assert recipe == Recipe(EULER)
    assert assert_same(bundle, diffusers.StableDiffusionPipeline, recipe, steps, 0.0) == steps


@pytest.mark.parametrize("scheduler", [*SOLVERS, "lcm"])
@pytest.mark.parametrize("mode", ["batch", "none"])
def test_sdxl_base_with_every_solver(make: Make, scheduler: str, mode: str) -> None:
    """On leading timesteps, as it ships; LCM as it runs over fused LCM-LoRA weights."""
    bundle = make(in_small(TINY_SDXL, "sdxl-base"))
    assert bundle.scheduler().config.timestep_spacing == "leading"
    scale = 0.0 if mode == "none" else 5.0
    recipe = Recipe(SCHEDULERS[scheduler], scale, mode)
    assert_same(bundle, diffusers.StableDiffusionXLPipeline, recipe, 4, scale)


@pytest.mark.parametrize("scheduler", ["euler", "dpm++2m", "euler-a"])
@pytest.mark.parametrize("mode", ["batch", "calls"])
def test_sdxl_with_an_empty_prompt_of_zeros(make: Make, scheduler: str, mode: str) -> None:
    bundle = make(TINY_SDXL)
    assert bundle.force_zeros, "so says its model index"
    recipe = Recipe(SCHEDULERS[scheduler], 5.0, mode)
    assert assert_same(bundle, diffusers.StableDiffusionXLPipeline, recipe, 3, 5.0) == 6


def test_sdxl_with_an_empty_prompt_that_is_encoded(make: Make) -> None:
    whole = make(TINY_SDXL)
    pipeline = whole.manifest["pipeline"] | {"force_zeros": False}
    bundle = Bundle(whole.path, whole.manifest | {"pipeline": pipeline})
    recipe = Recipe(EULER, 5.0, "batch")
    assert_same(bundle, diffusers.StableDiffusionXLPipeline, recipe, 2, 5.0)
    with ours(whole, recipe) as zeros, ours(bundle, recipe) as encoded:
        draw = {"steps": 2, "seed": SEEDS}
        assert not np.array_equal(zeros(PROMPTS, **draw).images, encoded(PROMPTS, **draw).images)


@pytest.mark.parametrize(("steps", "prediction"), [(1, "sample"), (4, "epsilon")])
def test_lightning_steps_on_trailing_timesteps(make: Make, steps: int, prediction: str) -> None:
    """As SDXL-Lightning is run; its one-step weights predict the image, not the noise."""
    model = in_small(TINY_SDXL, "sdxl-lightning-1step" if steps == 1 else "sdxl-lightning")
    assert (model.prediction, model.step_counts) == (prediction, (steps,))
    bundle = make(model)
    assert bundle.scheduler().config.prediction_type == prediction
    recipe = make_recipe(bundle)
    assert recipe == Recipe(EULER)
    assert assert_same(bundle, diffusers.StableDiffusionXLPipeline, recipe, steps, 0.0) == steps


def test_latent_consistency(make: Make) -> None:
    bundle = make(TINY_LCM)
    recipe = make_recipe(bundle, guidance=6.0)
    assert recipe == Recipe(SCHEDULERS["lcm"], 6.0, "embedding")
    nfe = assert_same(bundle, diffusers.LatentConsistencyModelPipeline, recipe, 4, 6.0)
    assert nfe == 4, "guidance is an input: one evaluation a step"
    with ours(bundle, recipe) as pipeline, ours(bundle, make_recipe(bundle)) as own:
        draw = {"steps": 2, "seed": SEEDS}
        assert not np.array_equal(pipeline(PROMPTS, **draw).images, own(PROMPTS, **draw).images)


def test_latent_consistency_of_sdxl(make: Make, tmp_path: Path) -> None:
    unet = json.loads((ARCHITECTURES / "tiny-sdxl" / "unet" / "config.json").read_text())
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(unet | {"time_cond_proj_dim": 16}))
    model = replace(
        TINY_LCM, name="tiny-lcm-sdxl", architecture=str(tmp_path), like=("tiny-sdxl",),
        text_encoders=("penultimate", "penultimate"), pooled=True,
    )  # fmt: skip
    recipe = make_recipe(bundle := make(model))
    assert assert_same(bundle, diffusers.StableDiffusionXLPipeline, recipe, 2, 8.0) == 2


def test_guidance_that_lcm_was_not_trained_with_is_refused(make: Make) -> None:
    bundle = make(TINY_LCM)
    assert make_recipe(bundle, guidance=1.0).guidance == 1
    for scale in (0.0, 0.5):
        with pytest.raises(UnsupportedError, match="not made for guidance"):
            make_recipe(bundle, guidance=scale)


@given(st.floats(1, 15), st.integers(2, 129))
def test_the_guidance_embedding_is_diffusers_own(scale: float, half: int) -> None:
    theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    for size in (2 * half, 2 * half + 1):
        expected = theirs(None, torch.tensor([scale - 1]), embedding_dim=size)
        assert torch.allclose(guidance_embedding(scale, size), expected, atol=2e-3)


def test_a_bundle_with_graphs_is_guided_too(tiny_bundle: Bundle) -> None:
    """One batch of two, two calls, and torch: the same image on ONNX Runtime."""
    images = []
    for name, mode in (("torch", "batch"), ("ort", "batch"), ("ort", "calls")):
        recipe = Recipe(SCHEDULERS["dpm++2m"], 4.0, mode)
        shapes = Shapes(1, *tiny_bundle.size)
        with parse_backend(name).pipeline(tiny_bundle, "taesd", shapes, recipe=recipe) as pipeline:
            out = pipeline(PROMPTS[:1], steps=3, seed=1)
        assert (out.nfe, len(out.timings.unet)) == (6, 3)
        images.append(out.images[0])
    assert all(image_distance(image, images[0]).psnr_db >= 45 for image in images[1:])


def test_only_the_unet_is_compiled_for_twice_the_prompts() -> None:
    shapes = Shapes(3, 64, 64)
    for mode, unet in (("batch", 6), ("calls", 3), ("embedding", 3), ("none", 3)):
        recipe = Recipe(EULER, 5.0, mode)
        assert recipe.shapes("unet", shapes).batch == unet
        assert recipe.shapes("text_encoder", shapes) == shapes
        assert recipe.shapes(CONTEXT_PART, shapes) == shapes, "prompts and empty ones in turn"
        assert recipe.shapes("vae_decoder", shapes) == shapes


def test_an_embedding_cache_keeps_the_empty_prompt(make: Make) -> None:
    bundle = make(TINY_SD)
    recipe = Recipe(EULER, 5.0, "calls")
    backend, shapes = parse_backend("torch:threads=1"), Shapes(2, *SIZE)
    with (
        backend.pipeline(bundle, "vae", shapes, recipe=recipe) as plain,
        backend.pipeline(bundle, "vae", shapes, recipe=recipe, embedding_cache=4) as kept,
    ):
        for _ in range(2):
            found = kept(PROMPTS, steps=1, seed=SEEDS).images
            expected = plain(PROMPTS, steps=1, seed=SEEDS).images
            assert image_distance(found[0], expected[0]).psnr_db > 50


# ---- what is refused, by name


def test_the_published_recipe_is_the_default(make: Make) -> None:
    assert make_recipe(make(TINY_SD)) == Recipe("PNDMScheduler", 7.5, "batch")
    assert make_recipe(make(TINY_SD), guidance=1.0) == Recipe("PNDMScheduler")
    assert make_recipe(make(TINY_SD), "unipc", 3.0, "calls") == Recipe(
        "UniPCMultistepScheduler", 3.0, "calls"
    )
    assert make_recipe(make(TINY_SD), "DDIMScheduler").scheduler == "DDIMScheduler"
    assert make_recipe(make(TINY_SDXL)) == Recipe("EulerAncestralDiscreteScheduler")
    assert make_recipe(make(TINY_LCM)) == Recipe("LCMScheduler", 8.0, "embedding")


@pytest.mark.parametrize(
    ("model", "asked", "words"),
    [
        (TINY_SD, {"scheduler": "heun"}, "no scheduler called 'heun'"),
        (TINY_SD, {"scheduler": "lcm"}, "was not made for lcm"),
        (TINY_SDXL, {"scheduler": "dpm++2m"}, "was not made for dpm\\+\\+2m"),
        (TINY_LCM, {"scheduler": "euler"}, "was not made for euler"),
        (TINY_SDXL, {"guidance": 5.0}, "was not made for guidance"),
        (TINY_SD, {"guidance": -1.0}, "not a guidance scale"),
        (TINY_SD, {"guidance": float("nan")}, "not a guidance scale"),
        (TINY_SD, {"guidance_mode": "both"}, "no guidance mode 'both'"),
        (TINY_SD, {"guidance": 0.0, "guidance_mode": "calls"}, "nothing to split"),
        (TINY_LCM, {"guidance_mode": "batch"}, "an input of the UNet"),
    ],
)
def test_what_a_model_was_not_made_for(
    make: Make, model: Model, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(PreconditionError, match=words) as caught:
        make_recipe(make(model), **asked)
    assert caught.value.next


@pytest.mark.parametrize(
    ("model", "steps", "words"),
    [
        (TINY_SD, 0, "too few"),
        (TINY_SD, 1001, "too many for pndm"),
        (TINY_LCM, 51, "too many for lcm"),
        (replace(TINY_SDXL, name="tiny-two", step_counts=(2,), steps=2), 4, "not made for 4 steps"),
    ],
)
def test_step_counts_that_do_not_fit(make: Make, model: Model, steps: int, words: str) -> None:
    bundle = make(model)
    with pytest.raises(PreconditionError, match=words):
        check_steps(bundle, make_recipe(bundle), steps)
    with ours(bundle, make_recipe(bundle)) as pipeline, pytest.raises(PreconditionError):
        pipeline(PROMPTS, steps=steps, seed=SEEDS)


def test_fused_lora_weights_may_be_those_of_a_consistency_model(make: Make) -> None:
    whole = make(TINY_SD)
    source = whole.manifest["source"] | {"loras": [{"name": "lcm-lora"}]}
    bundle = Bundle(whole.path, whole.manifest | {"source": source})
    assert make_recipe(bundle, "lcm", 1.0) == Recipe("LCMScheduler")
    with pytest.raises(UnsupportedError):
        make_recipe(whole, "lcm", 1.0)


def test_generate_takes_the_recipe_and_refuses_what_does_not_fit(
    make: Make, tmp_path: Path
) -> None:
    from PIL import Image

    from backends.commands.image import main

    def draw(model: Model, *flags: str) -> int:
        where = ["--model", str(make(model).path), "--backend", "torch", "--decoder", "taesd"]
        return main(["a fox", *where, "--out", str(tmp_path / "x.png"), *flags])

    assert draw(TINY_SD, "--scheduler", "unipc", "--guidance", "3", "--steps", "2",
                "--guidance-mode", "calls") == 0  # fmt: skip
    facts: Any = Image.open(tmp_path / "x.png")
    wanted = {"scheduler": "UniPCMultistepScheduler", "guidance": "3.0", "guidance_mode": "calls"}
    assert {key: facts.text[key] for key in (*wanted, "nfe")} == wanted | {"nfe": "4"}
    with pytest.raises(UnsupportedError, match="was not made for dpm"):
        draw(TINY_SDXL, "--scheduler", "dpm++2m", "--steps", "20")
    with pytest.raises(PreconditionError, match="made for 64x64"):
        draw(TINY_SD, "--size", "96x64")
