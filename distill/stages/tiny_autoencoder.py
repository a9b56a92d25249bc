"""Stage `tiny-autoencoder`: an AutoencoderTiny that does what the autoencoder does, faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from distill.judge import following
from distill.latents import Latents, edge_loss, to_uint8
from distill.loop import Trainer
from distill.networks import LATENTS, SCALE, build_tiny_vae
from distill.shapes import draw, scenes
from distill.stages.autoencoder import TRIES, crops, varied_places

LATENT_NOISE = 0.05
"""Deviation of noise on the latents (whose own is 1): a denoiser's latents are never exact."""


class _Tiny(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        return self.vae.encode(pictures).latents, self.vae.decode(latents).sample


class TinyAutoencoderTrainer(Trainer):
    name = "tiny-autoencoder"

    def setup(self) -> None:
        folder = self.context.weights("autoencoder") / "weights"
        self.latents = Latents(self.context, folder, cache=self.config.data.kind == "shapes")
        self.learn("vae", _Tiny(build_tiny_vae(self.config.networks)))
        count = min(96, self.config.evaluate_captions)
        self.checks = scenes(count, self.config.seed + 1, held_out=True)

    def step(self, step: int) -> dict[str, Tensor]:
        context, settings = self.context, self.settings
        generator = context.generator(self.name, step)
        side = self.config.data.size // SCALE
        shape = (settings.batch, LATENTS, side, side)
        posterior = context.share(torch.randn(shape, generator=generator))
        indices = context.indices(settings.batch, step)
        latents = self.latents.encode(indices, posterior)
        noisy = latents + LATENT_NOISE * context.share(torch.randn(shape, generator=generator))
        pictures = context.pictures(indices)
        if settings.crop and self.progress < settings.crop_share:
            corners = context.share(torch.rand((settings.batch, TRIES, 2), generator=generator))
            places = varied_places(pictures, corners, settings.crop, SCALE)
            pictures = crops(pictures, places, settings.crop)
            inside = [(y // SCALE, x // SCALE) for y, x in places]
            latents, noisy = (crops(v, inside, settings.crop // SCALE) for v in (latents, noisy))
        with torch.no_grad():
            wanted = self.latents.decode(noisy)
        encoded, decoded = self.networks["vae"](pictures, noisy)
        flat, square = functional.l1_loss(decoded, wanted), functional.mse_loss(decoded, wanted)
        edges = edge_loss(decoded, wanted)
        code = functional.mse_loss(encoded, latents)
        loss = flat + settings.square * square + settings.edges * edges + 0.1 * code
        self.update("vae", loss)
        return {"l1": flat, "mse": square, "edges": edges, "latents": code}

    @torch.no_grad()
    def grid(self) -> tuple[NDArray[np.uint8] | None, dict[str, float]]:
        """The autoencoder's decoding and this one's of the same latents, in turn."""
        if self.config.data.kind != "shapes":
            return None, {}
        drawn = draw(self.checks, self.config.seed, self.config.data.size)
        pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = self.latents.vae.encode(pictures.to(self.context.device)).latent_dist.mean
        full = to_uint8(self.latents.decode(latents))
        tiny = to_uint8(self.plain("vae").vae.decode(latents).sample)
        difference = (full.astype(np.float32) - tiny) / 255
        psnr = -10 * np.log10(np.maximum(np.square(difference).mean((1, 2, 3)), 1e-8)).mean()
        pairs = np.stack([full, tiny], 1).reshape(-1, *drawn.shape[1:])
        return pairs[:64], {"psnr_db": float(psnr)} | following(tiny, self.checks)

    def write(self, folder: Path) -> None:
        self.plain("vae").vae.save_pretrained(folder)
