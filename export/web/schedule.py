"""The constants of a bundle's scheduler, for a browser that repeats its arithmetic in FP32."""

from __future__ import annotations

from typing import Any

from core.errors import PreconditionError
from export.bundle import Bundle

EULERS = ("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler")
STEPS = (1, 2, 4)
PREDICTIONS = ("epsilon", "v_prediction")


def step_counts(bundle: Bundle) -> list[int]:
    """Step counts that a page offers: what the model was made for, else 1, 2, 4 and its own."""
    counts = bundle.model.step_counts or {*STEPS, bundle.steps}
    return sorted(count for count in counts if count >= bundle.least_steps)


def require_euler(bundle: Bundle) -> None:
    """Refuse a bundle whose images are not drawn by Euler's steps without guidance."""
    name = bundle.scheduler_name
    if name not in EULERS:
        raise PreconditionError(
            f"{bundle.name} cannot be drawn in the browser",
            f"its scheduler is {name}; what runs there repeats {' and '.join(EULERS)}",
            "take a model that has one of these, as shapes-turbo, sdxl-turbo and sd-turbo do",
        )
    if bundle.model.guidance_form != "none":
        raise PreconditionError(
            f"{bundle.name} cannot be drawn in the browser",
            "it is run with guidance, which what runs there does not do",
            "take a model that needs none, as shapes-turbo, sdxl-turbo and sd-turbo",
        )
    prediction = bundle.scheduler().config["prediction_type"]
    if prediction not in PREDICTIONS:
        raise PreconditionError(
            f"{bundle.name} cannot be drawn in the browser",
            f"its UNet predicts {prediction}; what runs there takes {' and '.join(PREDICTIONS)}",
            "take a model that predicts one of these",
        )


def constants(bundle: Bundle) -> dict[str, Any]:
    """The scheduler's class, what the UNet predicts, and the numbers of every step by count.

    Computed in FP32 as diffusers' `step` computes them, so that nothing is left to the browser but
    sums and products.
    """
    by_count = {}
    for count in step_counts(bundle):
        scheduler = bundle.scheduler()
        scheduler.set_timesteps(count)
        ancestral = bundle.scheduler_name.startswith("EulerAncestral")
        sigmas = scheduler.sigmas.float()
        steps = []
        for index, timestep in enumerate(scheduler.timesteps):
            now, then = sigmas[index], sigmas[index + 1]
            up = (then**2 * (now**2 - then**2) / now**2) ** 0.5 if ancestral else 0 * then
            down = (then**2 - up**2) ** 0.5 if ancestral else then
            steps.append({
                "timestep": float(timestep),
                "sigma": float(now),
                "sigma_up": float(up),
                "sigma_down": float(down),
                "input_scale": float((now**2 + 1) ** 0.5),
                "draws": ancestral,
            })  # fmt: skip
        first = float(scheduler.init_noise_sigma)
        by_count[str(count)] = {"first": first, "steps": steps}
    config = bundle.scheduler().config
    return {
        "class": bundle.scheduler_name,
        "prediction_type": config["prediction_type"],
        "counts": by_count,
    }
