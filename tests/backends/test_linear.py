"""Schedulers read as numbers: what they give is what diffusers' own step gives, or a refusal."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.base import UnsupportedError
from backends.pipeline.linear import TOLERANCE, LinearSchedule, read_schedule, relative
from export.models import SCHEDULERS
from export.source.scheduler import step_arguments

SDXL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
}
"""The noise schedule of SDXL's own scheduler_config.json."""
NAMES = sorted({*SCHEDULERS.values(), "TCDScheduler", "DDPMScheduler", "HeunDiscreteScheduler"})


def made(name: str, **more: Any) -> Any:
    return getattr(diffusers, name).from_config({**SDXL, **more})


def own_steps(
    scheduler: Any, schedule: LinearSchedule, steps: int, scale: float, seed: int
) -> float:
    """The worst relative difference to diffusers, over a whole image of arbitrary outputs."""
    shape = (2, 4, 8, 8)
    source = torch.Generator().manual_seed(seed)
    generators = [torch.Generator().manual_seed(seed + n) for n in range(2)]
    noises = [torch.Generator().manual_seed(seed + n) for n in range(2)]
    scheduler.set_timesteps(steps)
    extra = step_arguments(scheduler, generators)
    sample = torch.randn(shape, generator=source) * scheduler.init_noise_sigma
    samples, outputs, drawn = [sample], [], []
    worst = abs(schedule.first / float(scheduler.init_noise_sigma) - 1)
    assert len(schedule.steps) == len(scheduler.timesteps)
    for index, (timestep, step) in enumerate(zip(scheduler.timesteps, schedule.steps, strict=True)):
        assert step.timestep == float(timestep)
        wanted = scheduler.scale_model_input(sample, timestep)
        worst = max(worst, relative(samples[-1] * step.input_factor, wanted))
        outputs.append(torch.randn(shape, generator=source) * scale)
        sample = scheduler.step(outputs[-1], timestep, sample, **extra).prev_sample
        drawn.append(
            torch.cat([torch.randn((1, *shape[1:]), generator=one) for one in noises])
            if step.draws
            else None
        )
        samples.append(schedule.next_sample(index, samples, outputs, drawn))
        worst = max(worst, relative(samples[-1], sample))
    for ours, theirs in zip(noises, generators, strict=True):
        if "generator" in step_arguments(scheduler, None):
            assert torch.equal(ours.get_state(), theirs.get_state()), "noise is drawn otherwise"
    return worst


@settings(max_examples=100)
@given(
    name=st.sampled_from(NAMES),
    steps=st.sampled_from([4, 1, 2, 3, 8]),
    spacing=st.sampled_from(["trailing", "leading", "linspace"]),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    scale=st.sampled_from([1.0, 0.1, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_the_sum_is_what_the_scheduler_gives(
    name: str, steps: int, spacing: str, prediction: str, scale: float, seed: int
) -> None:
    if name == "PNDMScheduler" and steps < 4:
        return  # diffusers' own set_timesteps fails there
    scheduler = made(name, timestep_spacing=spacing, prediction_type=prediction)
    schedule = read_schedule(scheduler, steps)
    assert own_steps(scheduler, schedule, steps, scale, seed) < TOLERANCE


def test_ancestral_steps_draw_and_others_do_not() -> None:
    assert read_schedule(made("EulerAncestralDiscreteScheduler"), 4).draws == 5
    assert read_schedule(made("EulerDiscreteScheduler"), 4).draws == 1
    lcm = read_schedule(made("LCMScheduler"), 4)
    assert [step.draws for step in lcm.steps] == [True, True, True, False]


def test_a_multistep_solver_reads_the_step_before() -> None:
    steps = read_schedule(made("DPMSolverMultistepScheduler"), 4).steps
    assert {term.step for term in steps[0].terms} == {0}
    assert {term.step for term in steps[1].terms} == {0, 1}


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DDPMScheduler", {"thresholding": True}, "thresholding"),
        ("LCMScheduler", {"clip_sample": True, "clip_sample_range": 1.0}, "clip_sample"),
    ],
)
def test_what_is_no_sum_is_refused(name: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_schedule(made(name, **more), 2)
    assert name in caught.value.what
    assert "not a sum" in caught.value.why
    assert said in caught.value.why
    assert "torch:mode=eager" in caught.value.next


class Greedy(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    """A test double: a scheduler that draws twice in a step."""

    def step(self, output: Any, timestep: Any, sample: Any, generator: Any = None) -> Any:
        torch.randn(3, generator=generator)
        torch.randn(sample.shape, generator=generator)
        return super().step(output, timestep, sample)


def test_other_noise_than_one_tensor_a_step_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="draws its noise otherwise"):
        read_schedule(Greedy.from_config(SDXL), 2)
