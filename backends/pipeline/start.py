"""Where an image that starts from a picture begins: how much of the schedule is left to run.

As in diffusers, `strength` is the share of the steps that run, the last ones: of n steps
floor(n x strength). A strength of 1 is text to image, whose start is noise alone. Weights that were
distilled at few timesteps (`Model.grid`) draw as they were taught only from one of those.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from core.errors import PreconditionError

if TYPE_CHECKING:
    from backends.pipeline.recipe import Recipe
    from export.bundle import Bundle

NEAREST = 4
"""Pairs of steps and strength that a refusal lists."""
MOST_STEPS = 8
"""The most steps of a pair that is proposed for a model without a grid of its own."""
_warned: set[tuple[str, int, int]] = set()


def kept_steps(steps: int, strength: float) -> int:
    """How many of `steps` run at this strength; 2 x 0.5 and 3 x 0.333333 are 1 in any rounding."""
    return min(int(steps * strength + 1e-6), steps)


@cache
def timesteps_of(bundle: Bundle, recipe: Recipe, steps: int) -> tuple[float, ...]:
    """The scheduler's timesteps at so many steps, the noisiest first. Kept: making a scheduler
    takes longer than a small model's whole image."""
    scheduler = bundle.scheduler(recipe.scheduler)
    scheduler.set_timesteps(steps)
    return tuple(float(timestep) for timestep in scheduler.timesteps)


def check_strength(bundle: Bundle, recipe: Recipe, steps: int, strength: float | None) -> float:
    """The strength with which a picture is changed in `steps`, as a number.

    Raises:
        PreconditionError: it was left out, is no share, or leaves no step to run; the message lists
            the nearest pairs of steps and strength that do.
    """
    given = strength if not isinstance(strength, bool) else None
    if given is None:
        raise PreconditionError(
            "a picture to start from needs a strength",
            "it is the share of the steps that run: the more, the less of the picture stays",
            f"use {pairs_text(bundle, recipe, steps, 0.5)}",
        )
    if not isinstance(given, int | float) or not math.isfinite(given) or not 0 < given <= 1:
        raise PreconditionError(
            f"strength={strength} is not a strength",
            "it is a number above 0 and at most 1, which is text to image",
            f"use {pairs_text(bundle, recipe, steps, 0.5)}",
        )
    kept = kept_steps(steps, given)
    if kept < 1:
        raise PreconditionError(
            f"{steps} step{'s' * (steps != 1)} at strength {given:g} leave{'s' * (steps == 1)} no"
            " step to run",
            f"{steps} x {given:g} is less than 1",
            f"use {pairs_text(bundle, recipe, steps, given)}",
        )
    if kept < steps:
        warn_off_grid(bundle, recipe, steps, kept)
    return float(given)


def own_timesteps(bundle: Bundle, recipe: Recipe) -> set[float] | None:
    """The timesteps that the weights were trained at; None for a model that knows all of them."""
    grid = bundle.model.grid
    return set(timesteps_of(bundle, recipe, grid)) if grid else None


def pairs(
    bundle: Bundle, recipe: Recipe, steps: int, strength: float
) -> list[tuple[int, float, float]]:
    """(steps, strength, first timestep) of what runs on the model's own timesteps, the nearest to
    what was asked for first."""
    own, model = own_timesteps(bundle, recipe), bundle.model
    counts: Sequence[int] = model.step_counts or range(
        bundle.least_steps, max(model.grid or MOST_STEPS, bundle.least_steps) + 1
    )
    if own is None and not model.step_counts:
        counts = sorted({*counts, steps, math.ceil(1 / max(strength, 0.01))})
    counts = [count for count in counts if count <= 1000]
    listed = []
    for count in counts:
        timesteps = timesteps_of(bundle, recipe, count)
        for kept in range(1, count):
            left = timesteps[count - kept :]
            if own is None or own.issuperset(left):
                listed.append((count, kept / count, left[0]))
    return sorted(
        listed, key=lambda pair: (abs(pair[1] - strength), abs(pair[0] - steps), pair[0])
    )[:NEAREST]


def pairs_text(bundle: Bundle, recipe: Recipe, steps: int, strength: float) -> str:
    """The nearest pairs as flags, with the timestep that each starts at."""
    listed = [
        f"--steps {count} --strength {share:.4g} (from timestep {first:.0f})"
        for count, share, first in pairs(bundle, recipe, steps, strength)
    ]
    return ", or ".join(listed) or f"--steps {steps} --strength 1, which is text to image"


def warn_off_grid(bundle: Bundle, recipe: Recipe, steps: int, kept: int) -> None:
    """Say, once in a process, that a pair starts where the weights were not trained."""
    key = (bundle.hash, steps, kept)
    own = own_timesteps(bundle, recipe)
    left = timesteps_of(bundle, recipe, steps)[steps - kept :]
    if own is None or own.issuperset(left) or key in _warned:
        return
    _warned.add(key)
    warnings.warn(
        f"{bundle.name} was trained at timesteps {listed_text(own)}, and {steps} steps from a"
        f" picture run at {listed_text(left)}: nearest on its own are"
        f" {pairs_text(bundle, recipe, steps, kept / steps)}",
        stacklevel=4,
    )


def listed_text(timesteps: Sequence[float] | set[float]) -> str:
    return ", ".join(f"{timestep:.0f}" for timestep in sorted(timesteps, reverse=True))
