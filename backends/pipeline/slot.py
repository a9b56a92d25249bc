"""The memory that a captured image reads from and writes to: fixed addresses on host and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from backends.pipeline.linear import Schedule


@dataclass
class Slot:
    """Fixed addresses of one (batch, steps), on the host and on the device.

    Attributes:
        ids: int64 [encoders, batch, 77]; `empty`: those of the empty prompt.
        noise: float32 [draws, batch, channels, height/8, width/8].
        image: uint8 [batch, height, width, 3]; `finite`: bool, whether it was before the cast.
        graph: what replays the whole image; None before it is captured, or where it never is.
        nfe: UNet evaluations of one image, counted when it was last launched op by op.
    """

    schedule: Schedule
    host_ids: Tensor
    ids: Tensor
    empty: Tensor
    host_noise: Tensor
    noise: Tensor
    host_image: Tensor
    image: Tensor
    host_finite: Tensor
    finite: Tensor
    graph: Any = None
    nfe: int = 0

    @classmethod
    def make(
        cls, schedule: Schedule, empty: Tensor, latents: tuple[int, ...], image: tuple[int, ...]
    ) -> Self:
        """Memory for latents and images of these shapes, on the device of `empty`."""
        device = empty.device

        def pair(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            if device.type == "cpu":
                both = torch.zeros(shape, dtype=dtype)
                return both, both
            # Pinned: a copy from or to it does not make the host wait.
            host = torch.zeros(shape, dtype=dtype, pin_memory=True)
            return host, torch.empty_like(host, device=device)

        return cls(
            schedule,
            *pair(tuple(empty.shape), torch.int64),
            empty,
            *pair((schedule.draws, *latents), torch.float32),
            *pair(image, torch.uint8),
            *pair((), torch.bool),
        )

    def upload(self) -> None:
        for host, device in ((self.host_ids, self.ids), (self.host_noise, self.noise)):
            if device is not host:
                device.copy_(host, non_blocking=True)

    def download(self) -> None:
        for host, device in ((self.host_image, self.image), (self.host_finite, self.finite)):
            if device is not host:
                host.copy_(device, non_blocking=True)
