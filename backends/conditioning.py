"""What goes into denoising and what comes out of it."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings: hidden states [batch, 77, dim]; pooled [batch, dim] or None.

    `negative`: those of the empty prompt, for classifier-free guidance.
    """

    hidden_states: torch.Tensor
    text_embeds: torch.Tensor | None
    negative: Conditioning | None = None


class Denoised(NamedTuple):
    """Final latents, float32 [batch, channels, height/8, width/8] on the host; seconds of every
    timestep; UNet evaluations of one image."""

    latents: torch.Tensor
    seconds: list[float]
    nfe: int


def takes_generator(scheduler: Any) -> bool:
    """Whether the scheduler's `step` draws noise, and so takes the images' generators."""
    return "generator" in inspect.signature(scheduler.step).parameters


def guidance_embedding(scale: float, size: int) -> torch.Tensor:
    """Sinusoids of the guidance scale, float32 [1, size]: the `timestep_cond` of LCM's UNets.

    diffusers' `get_guidance_scale_embedding` of `scale - 1`.
    """
    half = size // 2
    frequencies = torch.exp(torch.arange(half) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (scale - 1) * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, size % 2))[None]
