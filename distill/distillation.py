"""The teacher's side of the distillation loss: re-diffuse the student's sample, denoise it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.schedule import Schedule

Predict = Callable[[Tensor, Tensor, str], Tensor]
"""(noisy, t, caption) -> the teacher's raw output; caption is `given`, `empty` or `negative`."""

NFSD_SCALE = 7.5
"""s and the timestep below which the unconditional prediction stands for the noise-free residual,
both from Katzir et al., arXiv 2310.17590."""
NFSD_CLEAN = 200


def rediffuse(sample: Tensor, noise: Tensor, schedule: Schedule, t: Tensor) -> Tensor:
    """x_hat_t = alpha_t sg(x_hat) + sigma_t eps'. Not a function of the student."""
    return schedule.add_noise(sample.detach(), noise, t)


@torch.no_grad()
def guided(predict: Predict, noisy: Tensor, t: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance on the teacher's raw output; 1 is none."""
    given = predict(noisy, t, "given")
    if guidance == 1.0:
        return given
    empty = predict(noisy, t, "empty")
    return empty + guidance * (given - empty)


@torch.no_grad()
def teacher_target(
    predict: Predict, noisy: Tensor, schedule: Schedule, t: Tensor, *, steps: int, guidance: float
) -> Tensor:
    """x_hat_psi: the teacher's x_0 after `steps` deterministic (DDIM) steps from t towards 0."""
    current, now = noisy, t
    clean = noisy
    for step in range(steps):
        output = guided(predict, current, now, guidance)
        clean = schedule.denoised(output, current, now)
        if step + 1 < steps:
            after = (t * (steps - 1 - step)) // steps
            current = schedule.add_noise(clean, schedule.noise(output, current, now), after)
            now = after
    return clean


@torch.no_grad()
def nfsd_target(
    predict: Predict, sample: Tensor, noisy: Tensor, schedule: Schedule, t: Tensor
) -> Tensor:
    """The point whose distance to x_hat has the gradient of noise-free score distillation.

    sg(x_hat) - sigma / alpha (delta_D + s delta_C), with delta_C = eps(given) - eps(empty) and
    delta_D = eps(empty) below t = 200, eps(empty) - eps(negative) above.
    """
    given, empty, negative = (
        schedule.noise(predict(noisy, t, which), noisy, t)
        for which in ("given", "empty", "negative")
    )
    clean = (t < NFSD_CLEAN).view(-1, 1, 1, 1)
    residual = torch.where(clean, empty, empty - negative)
    alpha, sigma = schedule.at(t)
    return sample.detach() - sigma / alpha * (residual + NFSD_SCALE * (given - empty))
