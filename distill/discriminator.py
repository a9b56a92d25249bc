"""Heads over a frozen feature network: the only part of the discriminator that learns.

Every head gives a verdict for each place of its feature map, and is told the caption and the
picture that the student started from by projection: the inner product of the place's features
with an embedding. The caption's embedding differs from place to place - with `tokens` each place
asks the caption's tokens what belongs there - because one vector averaged over the picture
cannot say that an object stands on the wrong side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

HEADS = 4
"""Attention heads between places and tokens."""


@dataclass(frozen=True)
class Condition:
    """What the heads are told; None where the conditioning leaves it out.

    tokens [batch, length, width] with mask [batch, length] (true: a token of the caption),
    pooled [batch, width], image [batch, width].
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    image: Tensor | None = None

    def cat(self, other: Condition) -> Condition:
        def join(first: Tensor | None, second: Tensor | None) -> Tensor | None:
            return None if first is None or second is None else torch.cat([first, second])

        return Condition(
            join(self.tokens, other.tokens),
            join(self.mask, other.mask),
            join(self.pooled, other.pooled),
            join(self.image, other.image),
        )

    def rolled(self) -> Condition:
        """Each picture with its neighbour's caption; the picture's own embedding stays."""

        def roll(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.roll(1, 0)

        return Condition(roll(self.tokens), roll(self.mask), roll(self.pooled), self.image)


class Head(nn.Module):
    """One feature map [batch, channels, side, side] -> logits [batch, side, side]."""

    def __init__(
        self, channels: int, side: int, width: int, text: str | None, text_dim: int, image_dim: int
    ) -> None:
        super().__init__()
        self.text, self.width = text, width
        self.entry = spectral_norm(nn.Conv2d(channels, width, 1))
        # Above 16 x 16 a place judges itself and the deeper maps judge the arrangement.
        kernel = 3 if side <= 16 else 1
        self.mix = spectral_norm(nn.Conv2d(width, width, kernel, padding=kernel // 2))
        self.out = spectral_norm(nn.Conv2d(width, 1, 1))
        self.place = nn.Parameter(torch.randn(1, width, side, side) * 0.02)
        if text == "tokens":
            self.query = nn.Conv2d(width, width, 1)
            self.key = nn.Linear(text_dim, width)
            self.value = nn.Linear(text_dim, width)
        elif text == "pooled":
            # One projection per place where the map is small, one for all where it is large.
            self.cells = min(side, 8)
            self.pooled = nn.Linear(text_dim, width * self.cells**2)
        self.image = nn.Linear(image_dim, width) if image_dim else None

    def forward(self, feature: Tensor, condition: Condition) -> Tensor:
        hidden = functional.leaky_relu(self.entry(feature) + self.place, 0.2)
        hidden = hidden + functional.leaky_relu(self.mix(hidden), 0.2)
        logits: Tensor = self.out(hidden)[:, 0]
        scale = self.width**-0.5
        if self.text == "tokens" and condition.tokens is not None and condition.mask is not None:
            asked = self._asked(hidden, condition.tokens, condition.mask)
            logits = logits + (hidden * asked).sum(1) * scale
        elif self.text == "pooled" and condition.pooled is not None:
            told = self.pooled(condition.pooled).unflatten(1, (-1, self.cells, self.cells))
            told = functional.interpolate(told, hidden.shape[-2:])
            logits = logits + (hidden * told).sum(1) * scale
        if self.image is not None and condition.image is not None:
            logits = logits + (hidden * self.image(condition.image)[..., None, None]).sum(1) * scale
        return logits

    def _asked(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """What the caption says of each place: attention from places to tokens."""

        def split(x: Tensor) -> Tensor:  # [batch, n, width] -> [batch, heads, n, width / heads]
            return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        query = split(self.query(hidden + self.place).flatten(2).transpose(1, 2))
        key, value = split(self.key(tokens)), split(self.value(tokens))
        scores = query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        asked = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)  # [batch, places, width]
        return asked.transpose(1, 2).unflatten(2, hidden.shape[-2:])


class Discriminator(nn.Module):
    """A head per feature map.

    Args:
        channels, sides: of each feature map.
        text: `tokens`, `pooled` or None.
        text_dim, image_dim: widths of the embeddings; image_dim 0: not told the picture.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sides: Sequence[int],
        *,
        width: int,
        text: str | None,
        text_dim: int,
        image_dim: int,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            Head(channel, side, width, text, text_dim, image_dim)
            for channel, side in zip(channels, sides, strict=True)
        )

    def forward(self, features: Sequence[Tensor], condition: Condition) -> list[Tensor]:
        # float32 throughout: R1 differentiates twice, and the heads are small.
        with torch.autocast(features[0].device.type, enabled=False):
            return [
                head(feature.float(), condition)
                for head, feature in zip(self.heads, features, strict=True)
            ]
