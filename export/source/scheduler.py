"""The scheduler of a checkpoint, as diffusers' own pipeline would have it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from export.models import Model
from export.source.layout import CheckpointError

SD_CORRECTIONS = {"clip_sample": False, "steps_offset": 1}
"""What `StableDiffusionPipeline` sets in the config of any scheduler that it is given: checkpoints
of before these keys were read leave them out, and mean this."""


@dataclass(frozen=True)
class ResolvedScheduler:
    """A scheduler's config with its class, and what a person should know of where it comes from."""

    config: dict[str, Any]
    notes: tuple[str, ...]


def resolve_scheduler(
    model: Model, stored: dict[str, Any], index_class: str | None, pipeline: str
) -> ResolvedScheduler:
    """Settle on class and settings: the model's entry first, then the index, then the config.

    Args:
        stored: scheduler_config.json.
        index_class: what model_index.json names, or None.
        pipeline: the diffusers pipeline class that the checkpoint is for.

    Raises:
        CheckpointError: no file names a class.
    """
    notes = []
    config_class = stored.get("_class_name")
    own = index_class or config_class
    if index_class and config_class and index_class != config_class:
        notes.append(
            f"scheduler: model_index.json names {index_class} and scheduler_config.json"
            f" {config_class}; the index decides, as in diffusers"
        )
    if not isinstance(model.scheduler or own, str):
        raise CheckpointError(
            "the checkpoint names no scheduler class",
            "neither model_index.json (`scheduler`) nor scheduler_config.json (`_class_name`) does",
            'add one, such as "_class_name": "EulerDiscreteScheduler", to scheduler_config.json',
        )
    entry = {
        "_class_name": model.scheduler,
        "timestep_spacing": model.spacing,
        "prediction_type": model.prediction,
    }
    entry = {key: value for key, value in entry.items() if value}
    for key, value in entry.items():
        theirs = own if key == "_class_name" else stored.get(key)
        if theirs not in (None, value):
            notes.append(
                f"scheduler: {model.name} runs with {value}; the checkpoint's own {key} is {theirs}"
            )
    config = stored | {"_class_name": own} | entry
    if pipeline == "StableDiffusionPipeline":
        config |= SD_CORRECTIONS
    return ResolvedScheduler(config, tuple(notes))


def make_scheduler(config: dict[str, Any], name: str | None = None) -> Any:
    """Return a diffusers scheduler of `config`, of its own class or of another by `name`.

    Raises:
        CheckpointError: there is no such class, its package is missing, or the config does not fit.
    """
    import diffusers

    from export.source.quiet import quiet_libraries

    name = name or str(config["_class_name"])
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and name.endswith("Scheduler")):
        raise CheckpointError(
            f"diffusers {diffusers.__version__} has no scheduler class {name}",
            "it is what the checkpoint's scheduler names",
            "correct the name in model_index.json and scheduler/scheduler_config.json",
        )
    try:
        with quiet_libraries():
            return cls.from_config(config)  # type: ignore[attr-defined]
    except Exception as error:  # the class judges its own settings, by errors of any kind
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"the scheduler {name} cannot be made of scheduler_config.json",
            reason,
            "install the package that it asks for, or correct scheduler/scheduler_config.json",
        ) from error


def step_arguments(scheduler: Any, generators: Any) -> dict[str, Any]:
    """Return what diffusers' pipelines pass to `step` beside the prediction, sample and timestep.

    Schedulers that add no noise take no generator; those with `eta` get 0, the pipelines' default,
    which is not always their own.
    """
    takes = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {"eta": 0.0} if "eta" in takes else {}
    return arguments | ({"generator": generators} if "generator" in takes else {})


STEPS_TRIED = (1, 2, 4, 10, 20)


def least_steps(config: dict[str, Any], counts: tuple[int, ...], channels: int) -> int:
    """Draw with a scheduler what an image draws, on random numbers; return the least step count.

    Args:
        counts: those that the model was made for; the least must do. Empty for any.

    Raises:
        CheckpointError: it fails in a way that a pipeline would only meet after an export, or it
            draws noise that no seed decides.
    """
    import torch

    make_scheduler(config)
    tried = (min(counts),) if counts else STEPS_TRIED
    for steps in tried:
        try:
            first, second = (_drawn(config, steps, channels) for _ in range(2))
        except Exception as error:  # of any kind: it is a library's code on a stranger's settings
            if steps != tried[-1]:
                continue
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(
                f"the scheduler {config['_class_name']} cannot take {steps} steps of this model",
                reason,
                "correct scheduler/scheduler_config.json, or name another class there",
            ) from error
        break
    if not torch.equal(first, second):
        raise CheckpointError(
            f"the scheduler {config['_class_name']} draws noise that no seed decides",
            "it takes no generator: the same prompt and seed would give another image each time",
            "name another class in scheduler/scheduler_config.json",
        )
    return steps


def _drawn(config: dict[str, Any], steps: int, channels: int) -> Any:
    import torch

    scheduler = make_scheduler(config)
    source = torch.Generator().manual_seed(0)
    generators = [torch.Generator().manual_seed(1)]
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, channels, 8, 8, generator=source) * scheduler.init_noise_sigma
    arguments = step_arguments(scheduler, generators)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        predicted = torch.randn(latents.shape, generator=source)
        latents = scheduler.step(predicted, timestep, latents, **arguments).prev_sample
    return latents
