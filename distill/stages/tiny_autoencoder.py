"""Stage `tiny-autoencoder`: an AutoencoderTiny that does what the autoencoder does, faster.

It comes last, because half of what it decodes is the student's: a student's latents are not quite
those of any picture, and a decoder that saw only those of pictures turns white into pink.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from distill.checkpoint import load_unet, open_checkpoint
from distill.judge import following
from distill.latents import edge_loss, to_uint8
from distill.loop import Trainer
from distill.networks import LATENTS, SCALE, build_tiny_vae, use_eager_attention
from distill.shapes import BACKGROUNDS, draw, scenes
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
        context, config = self.context, self.config
        self.checkpoint = open_checkpoint(context)
        self.latents, self.schedule = self.checkpoint.latents, self.checkpoint.schedule
        student = load_unet(context.weights("student") / "weights" / "unet")
        use_eager_attention(student)
        self.student = student.to(context.device).eval().requires_grad_(False)
        # Convolutions of 32 channels are a quarter faster so on a CPU.
        tiny: nn.Module = build_tiny_vae(config.networks)
        self.learn("vae", _Tiny(tiny.to(memory_format=torch.channels_last)))  # type: ignore[call-overload]
        count = min(96, config.evaluate_captions)
        grounds = tuple(BACKGROUNDS)
        self.checks = scenes(count, config.seed + 1, held_out=True, backgrounds=grounds)

    def step(self, step: int) -> dict[str, Tensor]:
        context, settings = self.context, self.settings
        generator = context.generator(self.name, step)
        side = self.config.data.size // SCALE
        noise = torch.randn((2, settings.batch, LATENTS, side, side), generator=generator)
        first, second = (context.share(part) for part in noise)
        indices = context.indices(settings.batch, step)
        half = len(indices) // 2
        pictures = context.pictures(indices)
        # The encoder's aim is the middle of what the autoencoder says of a picture.
        aim = self.latents.encode(indices, torch.zeros_like(first))
        latents = self.latents.encode(indices, first) + LATENT_NOISE * second
        latents[half:] = self._drawn(indices[half:], aim[half:], second[half:], generator)
        if settings.crop and self.progress < settings.crop_share:
            corners = context.share(torch.rand((settings.batch, TRIES, 2), generator=generator))
            places = varied_places(pictures, corners, settings.crop, SCALE)
            pictures = crops(pictures, places, settings.crop)
            inside = [(y // SCALE, x // SCALE) for y, x in places]
            latents, aim = (crops(v, inside, settings.crop // SCALE) for v in (latents, aim))
        with torch.no_grad():
            wanted = self.latents.decode(latents)
        encoded, decoded = self.networks["vae"](pictures[:half], latents)
        flat, square = functional.l1_loss(decoded, wanted), functional.mse_loss(decoded, wanted)
        edges, objects = edge_loss(decoded, wanted), object_loss(decoded, wanted)
        code = functional.mse_loss(encoded, aim[:half])
        loss = flat + settings.square * square + settings.edges * edges + 0.25 * code
        self.update("vae", loss + settings.objects * objects)
        return {"l1": flat, "mse": square, "edges": edges, "objects": objects, "latents": code}

    @torch.no_grad()
    def _drawn(
        self, indices: list[int], clean: Tensor, noise: Tensor, generator: torch.Generator
    ) -> Tensor:
        """What the student makes of captions: half of it from noise, half from noised latents."""
        timesteps = torch.tensor(self.config.student.timesteps)
        chosen = torch.randint(2 * len(timesteps), (self.settings.batch,), generator=generator)
        t = self.context.share(timesteps[chosen.clamp_max(len(timesteps) - 1)])[-len(indices) :]
        noisy = self.schedule.add_noise(clean, noise, t)
        told = self.checkpoint.embed([self.context.source.captions[i] for i in indices])
        output = self.checkpoint.predict(self.student, noisy, t, told)
        return self.schedule.denoised(output, noisy, t)

    @torch.no_grad()
    def grid(self) -> tuple[NDArray[np.uint8] | None, dict[str, float]]:
        """The autoencoder's decoding and this one's of the same latents, in turn; of the pictures
        encoded by this one and decoded by the autoencoder, what the judge reads (`encoder`)."""
        if self.config.data.kind != "shapes":
            return None, {}
        drawn = draw(self.checks, self.config.seed, self.config.data.size)
        pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
        pictures = pictures.to(self.context.device)
        latents, tiny = self.latents.encode_pictures(pictures), self.plain("vae").vae
        full = to_uint8(self.latents.decode(latents))
        small = to_uint8(tiny.decode(latents).sample)
        back = to_uint8(self.latents.decode(tiny.encode(pictures).latents))
        difference = (full.astype(np.float32) - small) / 255
        psnr = -10 * np.log10(np.maximum(np.square(difference).mean((1, 2, 3)), 1e-8)).mean()
        pairs = np.stack([full, small], 1).reshape(-1, *drawn.shape[1:])
        encoder = following(back, self.checks)["all"]
        figures = {"psnr_db": float(psnr), "encoder": encoder}
        return pairs[:64], figures | following(small, self.checks)

    def write(self, folder: Path) -> None:
        self.plain("vae").vae.to(memory_format=torch.contiguous_format).save_pretrained(folder)


def object_loss(decoded: Tensor, wanted: Tensor) -> Tensor:
    """L1 where the wanted picture differs from its border's colour, as the judge sees objects.

    Objects are a tenth of a picture: over the whole of it their colour hardly counts.
    """
    border = torch.cat([wanted[:, :, [0, -1]].flatten(2), wanted[..., [0, -1]].flatten(2)], 2)
    ground = border.median(2).values[..., None, None]
    away = (wanted - ground).abs().mean(1, keepdim=True)
    return ((decoded - wanted).abs() * away).sum() / (away.sum() * wanted.shape[1] + 1e-6)
