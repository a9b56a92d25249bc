"""The schedule's identities, and its agreement with diffusers' schedulers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import PreconditionError
from distill.networks import build_scheduler
from distill.schedule import Schedule, scheduler_config

OURS = scheduler_config(0.00085, 0.012)
SDXL = {**OURS, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def schedule(prediction: str = "v_prediction") -> Schedule:
    return Schedule.from_config(OURS if prediction == "v_prediction" else SDXL)


def tensors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))  # type: ignore[return-value]


def test_variance_is_preserved_and_the_end_is_pure_noise() -> None:
    ours = schedule()
    assert torch.allclose(ours.alpha**2 + ours.sigma**2, torch.ones(1000), atol=1e-6)
    assert ours.alpha[999] == 0
    assert ours.sigma[999] == 1
    assert (ours.alpha.diff() < 0).all()
    assert schedule("epsilon").alpha[999] == pytest.approx(0.0683, abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 998), st.sampled_from(["v_prediction", "epsilon"]))
def test_a_perfect_prediction_gives_back_both(seed: int, t: int, prediction: str) -> None:
    clean, noise = tensors(seed)
    at = torch.full((3,), t)
    used = schedule(prediction)
    noisy = used.add_noise(clean, noise, at)
    output = used.target(clean, noise, at)
    assert torch.allclose(used.denoised(output, noisy, at), clean, atol=2e-3)
    assert torch.allclose(used.noise(output, noisy, at), noise, atol=2e-3)


def test_at_the_end_v_is_minus_the_picture() -> None:
    clean, noise = tensors(0)
    end = torch.full((3,), 999)
    assert torch.equal(schedule().target(clean, noise, end), -clean)
    assert torch.equal(schedule().add_noise(clean, noise, end), noise)


def test_epsilon_from_pure_noise_is_refused() -> None:
    with pytest.raises(PreconditionError, match="pure noise"):
        Schedule.from_config({**OURS, "prediction_type": "epsilon"})
    with pytest.raises(PreconditionError, match="prediction type"):
        Schedule.from_config({**OURS, "prediction_type": "sample"})


@pytest.mark.parametrize("kind", ["EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_samplers_visit_the_student_s_timesteps(kind: str) -> None:
    for steps, wanted in ((1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])):
        scheduler = build_scheduler(kind, 0.00085, 0.012)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == wanted


@pytest.mark.parametrize("kind", ["EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_one_sampler_step_is_our_denoised(kind: str) -> None:
    noise, output = tensors(1)
    scheduler = build_scheduler(kind, 0.00085, 0.012)
    scheduler.set_timesteps(1)
    latents = noise * scheduler.init_noise_sigma
    given = scheduler.scale_model_input(latents, scheduler.timesteps[0])
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    result = scheduler.step(output, scheduler.timesteps[0], latents, generator=generators)
    assert torch.allclose(given, noise, atol=1e-3)
    ours = schedule().denoised(output, noise, torch.full((3,), 999))
    assert torch.allclose(result.prev_sample, ours, atol=2e-3)
