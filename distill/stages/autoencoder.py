"""Stage `autoencoder`: an AutoencoderKL on the pictures, latents of zero mean and unit variance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from distill.judge import following
from distill.latents import edge_loss, to_uint8
from distill.loop import Trainer
from distill.networks import LATENTS, SCALE, build_vae
from distill.shapes import BACKGROUNDS, draw, scenes

TRIES = 4
"""Random pieces of a picture among which the most varied one is kept."""


def varied_places(
    pictures: Tensor, corners: Tensor, side: int, grid: int = 1
) -> list[tuple[int, int]]:
    """(y, x) of each picture's most varied piece of `side` pixels, of those at `corners`.

    corners: [batch, tries, 2] in [0, 1); the places are multiples of `grid` pixels.
    """
    room = (pictures.shape[-1] - side) // grid + 1
    kept = []
    for picture, places in zip(pictures, ((corners * room).long() * grid).tolist(), strict=True):
        pieces = torch.stack([picture[:, y : y + side, x : x + side] for y, x in places])
        y, x = places[int(pieces.flatten(1).var(1).argmax())]
        kept.append((y, x))
    return kept


def crops(pictures: Tensor, places: Sequence[tuple[int, int]], side: int) -> Tensor:
    """[batch, channels, side, side]: the piece of each picture that begins at (y, x)."""
    return torch.stack(
        [p[:, y : y + side, x : x + side] for p, (y, x) in zip(pictures, places, strict=True)]
    )


class _Autoencoder(nn.Module):
    """One forward for both directions, so that data parallelism sees it."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pictures).latent_dist
        latents = posterior.mean + posterior.std * noise
        # Per latent element, so that its weight does not depend on the size.
        kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        return self.vae.decode(latents).sample, kl


class AutoencoderTrainer(Trainer):
    name = "autoencoder"

    def setup(self) -> None:
        self.learn("vae", _Autoencoder(build_vae(self.config.networks, self.config.data.size)))
        count = min(96, self.config.evaluate_captions)
        grounds = tuple(BACKGROUNDS)
        self.checks = scenes(count, self.config.seed + 1, held_out=True, backgrounds=grounds)

    def step(self, step: int) -> dict[str, Tensor]:
        context, settings = self.context, self.settings
        generator = context.generator(self.name, step)
        pictures = context.pictures(context.indices(settings.batch, step))
        if settings.crop and self.progress < settings.crop_share:
            corners = torch.rand((settings.batch, TRIES, 2), generator=generator)
            places = varied_places(pictures, context.share(corners), settings.crop)
            pictures = crops(pictures, places, settings.crop)
        side = pictures.shape[-1] // SCALE
        drawn = torch.randn((settings.batch, LATENTS, side, side), generator=generator)
        decoded, kl = self.networks["vae"](pictures, context.share(drawn))
        # L1 alone is content to leave the small objects out of the picture for a long time.
        flat, square = functional.l1_loss(decoded, pictures), functional.mse_loss(decoded, pictures)
        edges = edge_loss(decoded, pictures)
        # The KL term comes in slowly: latents that are small from the start are slow to learn.
        kl_weight = settings.kl * min(1.0, 2 * self.progress)
        loss = flat + settings.square * square + settings.edges * edges + kl_weight * kl
        self.update("vae", loss)
        return {"l1": flat, "mse": square, "edges": edges, "kl": kl}

    @torch.no_grad()
    def grid(self) -> tuple[NDArray[np.uint8] | None, dict[str, float]]:
        """Held-out pictures and their reconstructions in turn; PSNR, and what the judge reads."""
        if self.config.data.kind != "shapes":
            return None, {}
        drawn = draw(self.checks, self.config.seed, self.config.data.size)
        pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
        vae = self.plain("vae").vae
        decoded = vae.decode(vae.encode(pictures.to(self.context.device)).latent_dist.mean).sample
        error = (decoded.float().clamp(-1, 1).cpu() - pictures).square().mean((1, 2, 3)) / 4
        pairs = np.stack([drawn, to_uint8(decoded)], 1).reshape(-1, *drawn.shape[1:])
        figures = {"psnr_db": float(-10 * error.log10().mean())}
        return pairs[:64], figures | following(to_uint8(decoded), self.checks)

    def write(self, folder: Path) -> None:
        vae = self.plain("vae").vae
        self._standardise(vae)
        vae.save_pretrained(folder)

    @torch.no_grad()
    def _standardise(self, vae: Any) -> None:
        """Fold each latent channel's mean and deviation into the 1x1 convolutions around it.

        The latents then have zero mean and unit variance per channel, the scaling factor is 1,
        and the pictures are the same.
        """
        count = min(2048, len(self.context.source.captions))
        means, deviations = [], []
        for start in range(0, count, 64):
            indices = range(start, min(start + 64, count))
            posterior = vae.encode(self.context.pictures(indices)).latent_dist
            means.append(posterior.mean.float())
            deviations.append(posterior.std.float())
        latents = torch.cat(means)
        latents = latents + torch.cat(deviations) * torch.randn_like(latents)
        deviation, mean = torch.std_mean(latents, (0, 2, 3))
        before, after = vae.quant_conv, vae.post_quant_conv
        # after(z) with z = deviation * z' + mean
        after.bias.add_(after.weight[:, :, 0, 0] @ mean)
        after.weight.mul_(deviation[None, :, None, None])
        # The encoder's output: means, then log variances.
        before.weight[:LATENTS].div_(deviation[:, None, None, None])
        before.bias[:LATENTS].sub_(mean).div_(deviation)
        before.bias[LATENTS:].sub_(2 * deviation.log())
