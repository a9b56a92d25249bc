"""How an image is denoised beside the step count: scheduler, guidance, and whether that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from backends.pipeline.session import Shapes, UnsupportedError
from core.errors import PreconditionError
from export.models import SCHEDULERS, Model, scheduler_name

if TYPE_CHECKING:
    from export.bundle import Bundle

MODES = ("batch", "calls")
"""Classifier-free guidance: both evaluations as one batch of two, or as two calls."""
LCM = SCHEDULERS["lcm"]
MOST_STEPS = {LCM: 50}
"""LCM's timesteps are picked from the 50 of its teacher (diffusers: original_inference_steps)."""


@dataclass(frozen=True)
class Recipe:
    """What a pipeline does at each step.

    Attributes:
        scheduler: diffusers class name.
        guidance: the scale; 0 where there is none.
        guidance_mode: `none`; `batch` or `calls`, with two UNet evaluations a step; `embedding`,
            where the scale is an input of the UNet.
    """

    scheduler: str
    guidance: float = 0.0
    guidance_mode: str = "none"

    @property
    def guided(self) -> bool:
        """Whether each step takes an evaluation for the prompt and one for the empty prompt."""
        return self.guidance_mode in MODES

    @property
    def evaluations(self) -> int:
        """UNet evaluations of one image at one timestep."""
        return 2 if self.guided else 1

    def shapes(self, part: str, shapes: Shapes) -> Shapes:
        """What `part` is compiled for when a call takes `shapes.batch` prompts."""
        doubled = part == "unet" and self.guidance_mode == "batch"
        return replace(shapes, batch=2 * shapes.batch) if doubled else shapes


def make_recipe(
    bundle: Bundle,
    scheduler: str | None = None,
    guidance: float | None = None,
    guidance_mode: str | None = None,
) -> Recipe:
    """The published recipe of the bundle's model, with what is asked for in place of its defaults.

    Args:
        scheduler: a name of SCHEDULERS or a diffusers class name.
        guidance: scale; 0 and 1 are none.
        guidance_mode: `batch` or `calls`; refused where there is no guidance to split.

    Raises:
        PreconditionError: there is no such scheduler, scale or mode.
        UnsupportedError: the model was not made for it.
    """
    model = bundle.model
    name = check_scheduler(bundle, scheduler) if scheduler else bundle.scheduler_name
    scale = bundle.guidance if guidance is None else guidance
    if not math.isfinite(scale) or scale < 0:
        raise PreconditionError(
            f"--guidance {scale:g} is not a guidance scale",
            "it is a finite number of at least 0; 0 and 1 mean none",
            f"use --guidance {bundle.guidance:g}, the model's own",
        )
    if guidance_mode not in (None, *MODES):
        raise PreconditionError(
            f"there is no guidance mode {guidance_mode!r}",
            "batch: both evaluations of a step as one batch of two; calls: one after the other",
            "use --guidance-mode batch or --guidance-mode calls",
        )
    if model.guidance_form == "embedding":
        if scale < 1:
            raise UnsupportedError(
                f"{bundle.name} was not made for guidance {scale:g}",
                "its guidance scale is an input of the UNet, and was at least 1 in training",
                f"use --guidance {bundle.guidance:g}, the model's own",
            )
        recipe = Recipe(name, scale, "embedding")
    elif scale <= 1:
        recipe = Recipe(name)
    elif model.guidance_form == "none":
        raise UnsupportedError(
            f"{bundle.name} was not made for guidance ({scale:g} was asked for)",
            "it was distilled to need none: a second evaluation a step would spoil the image",
            "drop --guidance",
        )
    else:
        recipe = Recipe(name, scale, guidance_mode or "batch")
    if guidance_mode is not None and not recipe.guided:
        why = (
            "its guidance scale is an input of the UNet: one evaluation a step"
            if model.guidance_form == "embedding"
            else "without guidance a step is one evaluation: there is nothing to split"
        )
        raise UnsupportedError(
            f"--guidance-mode {guidance_mode} does not fit {bundle.name}", why,
            "drop --guidance-mode",
        )  # fmt: skip
    return recipe


def check_scheduler(bundle: Bundle, asked: str) -> str:
    """The diffusers class of a scheduler that the bundle's model may run with."""
    name = SCHEDULERS.get(asked, asked)
    if name not in (*SCHEDULERS.values(), bundle.scheduler_name):
        raise PreconditionError(
            f"there is no scheduler called {asked!r}",
            f"known schedulers: {', '.join(SCHEDULERS)}",
            "use one of these, or leave --scheduler out for the model's own",
        )
    allowed = allowed_schedulers(bundle)
    if name not in allowed:
        raise UnsupportedError(
            f"{bundle.name} was not made for {asked}",
            made_for(bundle.model, bundle.scheduler_name),
            f"use {' or '.join(scheduler_name(one) for one in allowed)}",
        )
    return name


def allowed_schedulers(bundle: Bundle) -> list[str]:
    """Class names, the model's own first. Fused LoRA weights may be those of LCM-LoRA."""
    names = [bundle.scheduler_name, *(SCHEDULERS[name] for name in bundle.model.schedulers)]
    if bundle.loras and bundle.model.schedulers:
        names.append(LCM)
    return list(dict.fromkeys(names))


def made_for(model: Model, scheduler: str) -> str:
    """What a model was made for, in words."""
    counts = " or ".join(map(str, model.step_counts)) or f"about {model.steps}"
    kind = "was distilled for" if not model.schedulers else "runs"
    return f"it {kind} {counts} step{'s' * (counts != '1')} of {scheduler_name(scheduler)}"


def check_steps(bundle: Bundle, recipe: Recipe, steps: int) -> None:
    """The model's weights and the scheduler can do so many steps."""
    if steps < 1:
        raise PreconditionError(f"steps={steps} is too few", "an image needs one", "use 1 to 4")
    model = bundle.model
    if model.step_counts and steps not in model.step_counts:
        own = " or ".join(map(str, model.step_counts))
        raise UnsupportedError(
            f"{bundle.name} was not made for {steps} step{'s' * (steps != 1)}",
            f"its weights were distilled for {own}",
            f"use --steps {model.step_counts[0]}, or the model with weights for {steps}",
        )
    if steps < bundle.least_steps and recipe.scheduler == bundle.scheduler_name:
        raise UnsupportedError(
            f"{steps} step{'s are' if steps != 1 else ' is'} too few for"
            f" {scheduler_name(recipe.scheduler)} with the settings of this checkpoint",
            f"it takes at least {bundle.least_steps}",
            f"use --steps {bundle.least_steps}, or another --scheduler",
        )
    most = MOST_STEPS.get(recipe.scheduler, 1000)
    if steps > most:
        raise UnsupportedError(
            f"{steps} steps are too many for {scheduler_name(recipe.scheduler)}",
            f"its timesteps are picked from {most}",
            f"use --steps {model.steps}",
        )
