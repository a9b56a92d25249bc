"""The autoencoder as the other stages use it: frozen, cached for shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from core.files import sha256_file, write_atomic
from distill.context import Context


class Latents:
    """Encode and decode in the scheduler's latents: [batch, 4, side, side], scaled.

    For a pool of drawn pictures the posterior of every picture is computed once and kept in the
    run's folder, named after the weights it came from.
    """

    def __init__(self, context: Context, folder: Path, cache: bool) -> None:
        from diffusers import AutoencoderKL

        self.context = context
        vae: Any = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
        self.vae = vae.to(context.device).eval().requires_grad_(False)
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(vae.config.get("shift_factor") or 0.0)
        self.moments: Tensor | None = None
        if cache:
            weights = next(folder.glob("*.safetensors"))
            self.moments = self._cached(sha256_file(weights)[:16])

    def encode(self, indices: Sequence[int], noise: Tensor) -> Tensor:
        """Latents of the source's pictures, sampled with `noise` from the posterior."""
        if self.moments is not None:
            moments = self.moments[list(indices)].to(self.context.device).float()
        else:
            moments = self._moments(self.context.pictures(indices))
        mean, deviation = moments.chunk(2, 1)
        return ((mean + deviation * noise) - self.shift) * self.scale

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents of any pictures in [-1, 1], the posterior's mean."""
        mean, _ = self._moments(pictures).chunk(2, 1)
        return (mean - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures about in [-1, 1], [batch, 3, size, size]; gradients pass through."""
        with self.context.accelerator.autocast():
            pictures: Tensor = self.vae.decode(latents / self.scale + self.shift).sample
        return pictures.float()

    @torch.no_grad()
    def _moments(self, pictures: Tensor) -> Tensor:
        with self.context.accelerator.autocast():
            posterior = self.vae.encode(pictures).latent_dist
        return torch.cat([posterior.mean, posterior.std], 1).float()

    def _cached(self, key: str) -> Tensor:
        import io

        path = (self.context.base or self.context.folder) / f"latents-{key}.npy"
        if self.context.accelerator.is_main_process and not path.exists():
            count = len(self.context.source.captions)
            chunks = [
                self._moments(self.context.pictures(range(start, min(start + 64, count)))).cpu()
                for start in range(0, count, 64)
            ]
            buffer = io.BytesIO()
            np.save(buffer, torch.cat(chunks).half().numpy())
            write_atomic(path, buffer.getvalue())
        self.context.accelerator.wait_for_everyone()
        return torch.from_numpy(np.load(path))


def edge_loss(decoded: Tensor, wanted: Tensor) -> Tensor:
    """L1 of the differences between neighbouring pixels: makes blurred edges cost more."""
    rows = functional.l1_loss(decoded.diff(dim=2), wanted.diff(dim=2))
    return rows + functional.l1_loss(decoded.diff(dim=3), wanted.diff(dim=3))


def to_uint8(pictures: Tensor) -> np.ndarray[tuple[int, int, int, int], np.dtype[np.uint8]]:
    """[n, 3, h, w] in [-1, 1] -> uint8 [n, h, w, 3]."""
    scaled = (pictures.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()
