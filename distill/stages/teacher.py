"""Stage `teacher`: text encoders and a UNet, by denoising score matching in v prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from distill.captions import CHECKED, captions
from distill.judge import saying
from distill.latents import Latents
from distill.loop import Trainer
from distill.networks import (
    LATENTS,
    SCALE,
    TextEncoding,
    TextToImage,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    size_ids,
    tokenize,
    use_eager_attention,
)
from distill.pipeline import assemble, generate
from distill.schedule import Schedule

CHECKS = 64
"""Held-out captions judged at every grid."""
CHECK_STEPS = 16


class TeacherTrainer(Trainer):
    name = "teacher"

    def setup(self) -> None:
        context, config = self.context, self.config
        networks = config.networks
        folder = context.weights("autoencoder") / "weights"
        self.latents = Latents(context, folder, cache=config.data.kind == "shapes")
        self.tokenizer = build_tokenizer(context.source.captions)
        text = TextEncoding(
            build_text_encoder(networks, self.tokenizer, second=False),
            build_text_encoder(networks, self.tokenizer, second=True),
        )
        unet = build_unet(networks, config.data.size)
        use_eager_attention(text.first, text.second, unet)
        self.learn("teacher", TextToImage(text, unet))
        self.ids = tokenize(self.tokenizer, list(context.source.captions))
        self.empty = tokenize(self.tokenizer, [""])
        self.schedule = Schedule.from_config(dict(self.scheduler().config), context.device)
        count = min(CHECKS, config.evaluate_captions)
        self.checks = captions(count, config.seed + 1, held_out=True, shares=CHECKED)

    def scheduler(self) -> Any:
        settings = self.settings
        return build_scheduler("EulerDiscreteScheduler", settings.beta_start, settings.beta_end)

    def step(self, step: int) -> dict[str, Tensor]:
        context, batch = self.context, self.settings.batch
        generator = context.generator(self.name, step)
        side = self.config.data.size // SCALE
        shape = (batch, LATENTS, side, side)
        posterior = context.share(torch.randn(shape, generator=generator))
        noise = context.share(torch.randn(shape, generator=generator))
        # Evenly spread over the schedule in every batch: less variance than independent draws.
        spread = (
            torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
        ) / batch
        t = context.share((spread * len(self.schedule)).long())
        drop = context.share(torch.rand(batch, generator=generator) < self.settings.empty)
        indices = context.indices(batch, step)
        ids = torch.where(drop.cpu()[:, None], self.empty, self.ids[indices]).to(context.device)
        clean = self.latents.encode(indices, posterior)
        noisy = self.schedule.add_noise(clean, noise, t)
        time_ids = size_ids(len(indices), self.config.data.size, context.device)
        output = self.networks["teacher"](noisy, t, ids, ids, time_ids)
        loss = functional.mse_loss(output.float(), self.schedule.target(clean, noise, t))
        self.update("teacher", loss)
        return {"v_mse": loss}

    def pipeline(self) -> Any:
        model = self.plain("teacher")
        return assemble(
            tokenizers=[self.tokenizer, self.tokenizer],
            text=model.text,
            unet=model.unet,
            vae=self.latents.vae,
            scheduler=self.scheduler(),
        )

    def grid(self) -> tuple[NDArray[np.uint8] | None, dict[str, float]]:
        """Held-out captions with guidance; what the judge reads of them."""
        if self.config.data.kind != "shapes":
            return None, {}
        pictures = generate(
            self.pipeline(),
            [caption.text for caption in self.checks],
            steps=min(CHECK_STEPS, self.settings.steps),
            guidance=self.settings.guidance,
            seeds=range(len(self.checks)),
            size=self.config.data.size,
            autocast=self.context.accelerator.autocast,
        )
        return pictures, saying(pictures, [caption.said for caption in self.checks])

    def write(self, folder: Path) -> None:
        model = self.plain("teacher")
        model.unet.save_pretrained(folder / "unet")
        model.text.first.save_pretrained(folder / "text_encoder")
        model.text.second.save_pretrained(folder / "text_encoder_2")
        for name in ("tokenizer", "tokenizer_2"):
            self.tokenizer.save_pretrained(folder / name)
        self.scheduler().save_pretrained(folder / "scheduler")
