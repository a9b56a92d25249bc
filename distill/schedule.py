"""Noise schedule: x_t = alpha_t x_0 + sigma_t eps, and what a network's output says of x_0 and eps.

A model of one's own predicts v = alpha eps - sigma x_0 with betas rescaled to zero terminal SNR
(Lin et al., arXiv 2305.08891); an epsilon checkpoint such as SDXL keeps its own schedule, because
with epsilon x_0 = (x_t - sigma eps) / alpha divides by alpha = 0 at the last timestep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from core.errors import PreconditionError

Prediction = Literal["v_prediction", "epsilon"]


@dataclass(frozen=True)
class Schedule:
    """`alpha` and `sigma`: float32 [T], alpha^2 + sigma^2 = 1; t is an index, int64 [batch]."""

    alpha: Tensor
    sigma: Tensor
    prediction: Prediction

    @classmethod
    def from_config(cls, config: dict[str, Any], device: torch.device | str = "cpu") -> Self:
        """Read a diffusers scheduler's config.

        Raises:
            PreconditionError: epsilon prediction on a schedule that ends in pure noise.
        """
        from diffusers import DDPMScheduler

        keys = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
        )
        kept = {key: config[key] for key in keys if config.get(key) is not None}
        bars = DDPMScheduler(**kept).alphas_cumprod.double()
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("v_prediction", "epsilon"):
            raise PreconditionError(
                f"prediction type {prediction!r} is not supported",
                "the scheduler's config asks for it",
                "use a checkpoint with v_prediction or epsilon",
            )
        if prediction == "epsilon" and float(bars[-1]) < 1e-6:
            raise PreconditionError(
                "epsilon prediction cannot start from pure noise",
                "the schedule has zero terminal SNR, so x_0 would be divided by alpha = 0",
                "set prediction_type to v_prediction, or rescale_betas_zero_snr to false",
            )
        return cls(
            alpha=bars.sqrt().float().to(device),
            sigma=(1 - bars).sqrt().float().to(device),
            prediction=prediction,
        )

    def __len__(self) -> int:
        return len(self.alpha)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of each t, [batch, 1, 1, 1]."""
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.at(t)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should have said."""
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self.at(t)
        return alpha * noise - sigma * clean

    def denoised(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """x_0 as the network's output has it."""
        alpha, sigma = self.at(t)
        if self.prediction == "epsilon":
            return (noisy - sigma * output) / alpha
        return alpha * noisy - sigma * output

    def noise(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """eps as the network's output has it."""
        if self.prediction == "epsilon":
            return output
        alpha, sigma = self.at(t)
        return alpha * output + sigma * noisy


def scheduler_config(beta_start: float, beta_end: float, steps: int = 1000) -> dict[str, Any]:
    """Config of the schedulers of our own models: v prediction, zero terminal SNR, trailing.

    Trailing spacing takes t = 999, 749, 499, 249 at four steps: the student's timesteps.
    """
    return {
        "num_train_timesteps": steps,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
