"""A checkpoint of random weights that are drawn on the device whenever they are loaded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from export.models import Model
from export.source.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn


class DrawnCheckpoint(Checkpoint):
    """A checkpoint whose random weights are drawn where they are wanted."""

    def skeleton(self, part: str) -> nn.Module:
        import torch

        with torch.device("meta"):
            return self.construct(part)

    def module(self, part: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
        import torch
        from torch import nn

        from export.source.random_weights import draw_in_place

        with torch.device(device):
            module = self.construct(part).requires_grad_(False)
        nn.Module.to(module, dtype=dtype)  # diffusers' own `to` warns of what does not apply here
        draw_in_place(module, self.origins[part].seed)
        return module


def drawn_checkpoint(model: Model, seed: int) -> DrawnCheckpoint:
    opened = open_checkpoint(model, "random", seed=seed)
    return DrawnCheckpoint(
        **{field.name: getattr(opened, field.name) for field in dataclasses.fields(opened)}
    )
