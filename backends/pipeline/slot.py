"""The memory that a captured image reads from and writes to: fixed addresses on host and device."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from backends.pipeline.conditioning import Conditioning
from backends.pipeline.linear import LinearSchedule


@dataclass
class Slot:
    """Fixed addresses of one (batch, steps, first step), on the host and on the device.

    A graph reads from them whatever it replays, so what is new is copied to where it was.

    Attributes:
        ids: int64 [encoders, batch, 77]; `refused`: those of the negative prompt.
        picture: uint8 [batch, height, width, 3], what the images start from; not read where they
            start from noise.
        noise: float32 [draws, batch, channels, height/8, width/8].
        image: uint8 [batch, height, width, 3]; `finite`: bool, whether it was before the cast.
        refuses: whether the negative prompt is encoded.
        told: what the prompts were encoded to before, at addresses of its own; None where they are
            encoded with every image. `held`: what it is a copy of.
        graph: what replays the whole image; None before it is captured, or where it never is.
        nfe: UNet evaluations of one image, counted when it was last launched op by op.
    """

    schedule: LinearSchedule
    host_ids: Tensor
    ids: Tensor
    host_refused: Tensor
    refused: Tensor
    host_picture: Tensor
    picture: Tensor
    host_noise: Tensor
    noise: Tensor
    host_image: Tensor
    image: Tensor
    host_finite: Tensor
    finite: Tensor
    refuses: bool
    told: Conditioning | None = None
    held: Conditioning | None = None
    graph: Any = None
    nfe: int = 0

    def hold(self, conditioning: Conditioning) -> None:
        """Take in what prompts were encoded to, where it is not what is there."""
        if self.held is conditioning:
            return
        if self.told is None:
            self.told = deepcopy(conditioning)
        else:
            for mine, new in zip(self.told.tensors(), conditioning.tensors(), strict=True):
                mine.copy_(new)
        self.held = conditioning

    @classmethod
    def make(
        cls,
        schedule: LinearSchedule,
        *,
        ids: tuple[int, ...],
        latents: tuple[int, ...],
        image: tuple[int, ...],
        device: torch.device,
        refuses: bool,
    ) -> Self:
        """Memory for token ids, latents and images of these shapes, on `device`."""

        def pair(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            if device.type == "cpu":
                both = torch.zeros(shape, dtype=dtype)
                return both, both
            # Pinned: a copy from or to it does not make the host wait.
            host = torch.zeros(shape, dtype=dtype, pin_memory=True)
            return host, torch.empty_like(host, device=device)

        starts = image if schedule.picture else (0,)
        return cls(
            schedule,
            *pair(ids, torch.int64),
            *pair(ids if refuses else (0,), torch.int64),
            *pair(starts, torch.uint8),
            *pair((schedule.draws, *latents), torch.float32),
            *pair(image, torch.uint8),
            *pair((), torch.bool),
            refuses=refuses,
        )

    def upload(self) -> None:
        for host, device in (
            (self.host_ids, self.ids),
            (self.host_refused, self.refused),
            (self.host_picture, self.picture),
            (self.host_noise, self.noise),
        ):
            if device is not host:
                device.copy_(host, non_blocking=True)

    def download(self) -> None:
        for host, device in ((self.host_image, self.image), (self.host_finite, self.finite)):
            if device is not host:
                host.copy_(device, non_blocking=True)
