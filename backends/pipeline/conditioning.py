"""What goes into denoising and what comes out of it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings: hidden states [batch, 77, dim]; pooled [batch, dim] or None.

    `context`: what the UNet takes in place of the hidden states where it is split, by input: all
    that it makes of them alone. `negative`: those of the negative prompt, or of the empty one, for
    classifier-free guidance.
    """

    hidden_states: torch.Tensor
    text_embeds: torch.Tensor | None
    context: Mapping[str, torch.Tensor] = field(default_factory=dict)
    negative: Conditioning | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor, in the same order for two of the same form."""
        yield self.hidden_states
        if self.text_embeds is not None:
            yield self.text_embeds
        yield from self.context.values()
        if self.negative is not None:
            yield from self.negative.tensors()


def stack(rows: Sequence[Conditioning]) -> Conditioning:
    """Several prompts' embeddings as one batch."""
    pooled = [row.text_embeds for row in rows if row.text_embeds is not None]
    return Conditioning(
        torch.cat([row.hidden_states for row in rows]),
        torch.cat(pooled) if pooled else None,
        {name: torch.cat([row.context[name] for row in rows]) for name in rows[0].context},
    )


class EmbeddingCache:
    """What was made of the prompts used last, context included: of SDXL's, 0.6 MB each, or 52 MB
    where its UNet is split (FP32)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()
        self.zeros: dict[int, Conditioning] = {}
        """What stands for the empty prompt where a model takes zeros for it, by batch."""

    def encode(
        self,
        texts: Sequence[Sequence[str]],
        encode: Callable[[Sequence[Sequence[str]]], list[Conditioning]],
    ) -> list[Conditioning]:
        """Each batch of prompts as `encode` would give it, which is asked for what is missing."""
        wanted = list(dict.fromkeys(chain(*texts)))
        missing = [prompt for prompt in wanted if prompt not in self._kept]
        known = dict(zip(missing, encode([[prompt] for prompt in missing]), strict=True))
        known |= {prompt: self._kept[prompt] for prompt in wanted if prompt in self._kept}
        for prompt in wanted:
            self._kept[prompt] = known[prompt]
            self._kept.move_to_end(prompt)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return [stack([known[prompt] for prompt in prompts]) for prompts in texts]


class Start(NamedTuple):
    """Where denoising begins that starts from a picture: its latents, float32 [batch or 1,
    channels, height/8, width/8] on the host, and the first step that runs."""

    latents: torch.Tensor
    first: int


class Denoised(NamedTuple):
    """Final latents, float32 [batch, channels, height/8, width/8] on the host; seconds of every
    timestep; UNet evaluations of one image."""

    latents: torch.Tensor
    seconds: list[float]
    nfe: int


def guidance_embedding(scale: float, size: int) -> torch.Tensor:
    """Sinusoids of the guidance scale, float32 [1, size]: the `timestep_cond` of LCM's UNets.

    diffusers' `get_guidance_scale_embedding` of `scale - 1`.
    """
    half = size // 2
    frequencies = torch.exp(torch.arange(half) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (scale - 1) * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, size % 2))[None]
