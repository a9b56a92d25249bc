"""Stage `student`: adversarial diffusion distillation (Sauer et al., arXiv 2311.17042)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import PreconditionError
from distill import losses
from distill.captions import CHECKED, captions
from distill.checkpoint import Embedded, load_unet, open_checkpoint, open_features
from distill.discriminator import Condition, Discriminator
from distill.distillation import nfsd_target, rediffuse, teacher_target
from distill.judge import saying
from distill.loop import Trainer
from distill.networks import LATENTS, SCALE, use_eager_attention
from distill.pipeline import assemble, generate
from distill.sharding import gather, shard

CHECKS = 64
SHOWN = 8
"""Captions of a folder or of shards that sample pictures are drawn of."""
PULL_EVERY = 25
"""Steps between looks at how hard each loss pulls."""


@dataclass(frozen=True)
class Batch:
    """Real latents and pictures, the student's input, and its captions."""

    clean: Tensor
    noisy: Tensor
    s: Tensor
    told: Embedded
    indices: list[int]


def pull(term: Tensor, sample: Tensor) -> Tensor:
    """Mean norm of a (weighted) loss's gradient at a picture's sample.

    Where one loss pulls far less than the other it is not heard: `student.lambda` sets that.
    """
    (gradient,) = torch.autograd.grad(term, sample, retain_graph=True)
    return gradient.flatten(1).norm(dim=1).mean() * len(sample)


class StudentTrainer(Trainer):
    name = "student"

    def setup(self) -> None:
        context, config, settings = self.context, self.config, self.settings
        if settings.weighting == "nfsd" and settings.teacher_steps != 1:
            raise PreconditionError(
                "NFSD weighting goes with one teacher step",
                f"student.teacher-steps is {settings.teacher_steps}",
                "set it to 1, or take exp or sds weighting",
            )
        if settings.weighting == "nfsd" and not settings.negative:
            raise PreconditionError(
                "NFSD weighting needs a caption of bad pictures",
                "student.negative is empty, and without it the method's second term vanishes",
                "set it, e.g. --set student.negative='\"blurry, low quality\"'",
            )
        if config.networks.teacher and settings.space == "latent":
            raise PreconditionError(
                "a teacher of another family meets the student in pixels only",
                "student.space is latent, and each has latents of its own",
                "set student.space to pixel, or leave networks.teacher empty",
            )
        self.checkpoint = self.teacher = open_checkpoint(context)
        if config.networks.teacher:
            self.teacher = open_checkpoint(context, "teacher")
        self.schedule, self.latents = self.checkpoint.schedule, self.checkpoint.latents
        shapes = config.data.kind == "shapes"
        self.timesteps = torch.tensor(settings.timesteps)
        student = self._student()
        if settings.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        if shapes:
            use_eager_attention(student)
        self.learn("student", student, sharded=context.shard)
        if context.shard:
            shard(self.teacher.unet, context.accelerator)
        self.adversarial = settings.loss in ("adversarial", "both")
        self.distils = settings.loss in ("distillation", "both")
        if self.adversarial:
            self.features: Any = open_features(context)
            self.learn("discriminator", self._discriminator(), settings.discriminator_rate)
        self.fixed = {which: self.teacher.embed([text]) for which, text in
                      (("empty", ""), ("negative", settings.negative))}  # fmt: skip
        count = min(CHECKS, config.evaluate_captions)
        self.checks = captions(count, config.seed + 1, True, CHECKED) if shapes else []

    def _student(self) -> Any:
        folder = self.config.networks.student
        unet = load_unet(Path(folder) if folder else self.checkpoint.folder / "unet")
        if self.settings.pretrained:
            return unet
        torch.manual_seed(self.context.seed(self.name, "student"))
        return type(unet).from_config(unet.config)

    def _discriminator(self) -> Discriminator:
        kind = self.settings.conditioning
        text = self.settings.text if kind in ("text", "both") else None
        widths = {
            "tokens": self.plain("student").config.cross_attention_dim,
            "pooled": self.checkpoint.text.pooled_width,
        }
        torch.manual_seed(self.context.seed(self.name, "heads"))
        return Discriminator(
            self.features.channels,
            self.features.sides,
            width=self.settings.head_width,
            text=text,
            text_dim=widths.get(text or "", 0),
            image_dim=self.features.embedding if kind in ("image", "both") else 0,
        )

    def _batch(self, step: int, generator: torch.Generator) -> Batch:
        context, batch = self.context, self.settings.batch
        indices = context.indices(batch, step)
        side = self.config.data.size // SCALE
        shape = (batch, LATENTS, side, side)
        posterior = context.share(torch.randn(shape, generator=generator))
        noise = context.share(torch.randn(shape, generator=generator))
        s = self.timesteps[torch.randint(len(self.timesteps), (batch,), generator=generator)]
        if self.settings.terminal is not None:
            last = torch.rand(batch, generator=generator) < self.settings.terminal
            others = self.timesteps[:-1][
                torch.randint(len(self.timesteps) - 1, (batch,), generator=generator)
            ]
            s = torch.where(last, self.timesteps[-1], others)
        s = context.share(s)
        clean = self.latents.encode(indices, posterior)
        told = self.checkpoint.embed([context.source.captions[i] for i in indices])
        return Batch(clean, self.schedule.add_noise(clean, noise, s), s, told, indices)

    def step(self, step: int) -> dict[str, Tensor]:
        generator = self.context.generator(self.name, step)
        batch = self._batch(step, generator)
        head_start = self.adversarial and step < self.settings.headstart
        with torch.set_grad_enabled(not head_start):
            output = self.checkpoint.predict(
                self.networks["student"], batch.noisy, batch.s, batch.told
            )
            sample = self.schedule.denoised(output, batch.noisy, batch.s)
            in_pixels = self.adversarial or self.settings.space == "pixel"
            fake = self.latents.decode(sample) if in_pixels else sample
        logged: dict[str, Tensor] = {}
        terms: list[Tensor] = []
        if self.adversarial:
            told, real_features = self._condition(batch)
            fake_features, _ = self._features(fake)
            if not head_start:
                heads = self.plain("discriminator").eval().requires_grad_(False)
                logged["adv"] = losses.hinge_generator(heads(fake_features, told))
                heads.train().requires_grad_(True)
                terms.append(logged["adv"])
        if self.distils and not head_start:
            logged["distill"] = self._distillation(sample, fake, batch, generator)
            terms.append(self.settings.lambda_ * logged["distill"])
        if len(terms) == 2 and step % PULL_EVERY == 0:
            logged["adv_pull"], logged["distill_pull"] = (pull(term, sample) for term in terms)
        if terms:
            self.update("student", torch.stack(terms).sum())
        if self.adversarial:
            frozen = [feature.detach() for feature in fake_features]
            logged |= self._discriminate(step, real_features, frozen, told)
        return logged

    def _features(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        with self.context.accelerator.autocast():
            maps, embedding = self.features(pictures)
        return [level.float() for level in maps], embedding.float()

    @torch.no_grad()
    def _condition(self, batch: Batch) -> tuple[Condition, list[Tensor]]:
        """What the heads are told, and the real pictures' features."""
        if self.settings.reals == "reconstructed":
            pictures = self.latents.decode(batch.clean)
        else:
            pictures = self.context.pictures(batch.indices)
        maps, embedding = self._features(pictures)
        # At the last timestep the student saw nothing of the picture and cannot match it.
        seen = (batch.s != self.timesteps[-1]).float()[:, None]
        length = int(batch.told.mask.sum(1).max())
        told = Condition(
            tokens=batch.told.context[:, :length],
            mask=batch.told.mask[:, :length],
            pooled=batch.told.pooled,
            image=embedding * seen,
        )
        return told, maps

    def _distillation(
        self, sample: Tensor, fake: Tensor, batch: Batch, generator: torch.Generator
    ) -> Tensor:
        settings, teacher, told = self.settings, self.teacher, batch.told
        schedule = teacher.schedule
        if teacher is not self.checkpoint:
            sample = teacher.latents.encode_pictures(fake)
            told = teacher.embed([self.context.source.captions[i] for i in batch.indices])
        low, high = (round(share * len(schedule)) for share in settings.teacher_range)
        t = self.context.share(torch.randint(low, high, (settings.batch,), generator=generator))
        drawn = torch.randn((settings.batch, *sample.shape[1:]), generator=generator)
        noisy = rediffuse(sample, self.context.share(drawn), schedule, t)

        def predict(noisy: Tensor, t: Tensor, which: str) -> Tensor:
            asked = told if which == "given" else self.fixed[which].expand(len(noisy))
            return teacher.predict(teacher.unet, noisy, t, asked)

        if settings.weighting == "nfsd":
            target = nfsd_target(predict, sample, noisy, schedule, t)
        else:
            target = teacher_target(
                predict,
                noisy,
                schedule,
                t,
                steps=settings.teacher_steps,
                guidance=settings.guidance,
            )
        c = losses.weight(settings.weighting, schedule, t)
        if settings.space == "latent":
            return losses.distillation_loss(sample, target, c, settings.reduction)
        with torch.no_grad():
            wanted = teacher.latents.decode(target)
        return losses.distillation_loss(fake, wanted, c, settings.reduction)

    def _discriminate(
        self, step: int, real: list[Tensor], fake: list[Tensor], told: Condition
    ) -> dict[str, Tensor]:
        settings = self.settings
        penalised = settings.gamma > 0 and step % settings.r1_every == 0
        real = [feature.detach().requires_grad_(penalised) for feature in real]
        pieces, condition = [real, fake], told.cat(told)
        if settings.mismatch:
            pieces.append(real)
            condition = condition.cat(told.rolled())
        # One forward for all, as data parallelism wants it.
        joined = [torch.cat(level) for level in zip(*pieces, strict=True)]
        verdicts = [
            logits.split(len(real[0]))
            for logits in self.networks["discriminator"](joined, condition)
        ]
        good, bad = ([parts[i] for parts in verdicts] for i in (0, 1))
        loss = losses.hinge_discriminator(good, bad)
        logged = {"disc": loss}
        if settings.mismatch:
            wrong = torch.stack([(1 + parts[2]).relu().mean() for parts in verdicts]).sum()
            logged["mismatch"] = wrong
            loss = loss + settings.mismatch * wrong
        if penalised:
            logged["r1"] = losses.r1_penalty(good, real)
            loss = loss + settings.gamma * settings.r1_every * logged["r1"]
        self.update("discriminator", loss)
        with torch.no_grad():
            logged["gap"] = torch.stack(
                [a.mean() - b.mean() for a, b in zip(good, bad, strict=True)]
            ).mean()
        return logged

    def scheduler(self) -> Any:
        """The student's sampler: it predicts x_0 at each of its timesteps and noises it again."""
        import diffusers

        config = dict(self.checkpoint.scheduler_config) | {"timestep_spacing": "trailing"}
        if self.settings.scheduler == "LCMScheduler":
            config |= {"original_inference_steps": len(self.timesteps), "clip_sample": False}
        return getattr(diffusers, self.settings.scheduler).from_config(config)

    def grid(self) -> tuple[NDArray[np.uint8] | None, dict[str, float]]:
        """Pictures at one step, then at four: of held-out captions, with what the judge reads,
        or of the first captions of a folder."""
        checkpoint = self.checkpoint
        texts = [caption.text for caption in self.checks]
        texts = texts or list(self.context.source.captions[:SHOWN])
        pipeline = assemble(
            tokenizers=checkpoint.tokenizers,
            text=checkpoint.text,
            unet=self.plain("student"),
            vae=self.latents.vae,
            scheduler=self.scheduler(),
        )
        sheets = []
        figures: dict[str, float] = {}
        for steps in (1, 4):
            pictures = generate(
                pipeline,
                texts,
                steps=steps,
                guidance=0.0,
                seeds=range(len(texts)),
                size=self.config.data.size,
                batch=64 if self.checks else 1,
                autocast=self.context.accelerator.autocast,
            )
            sheets.append(pictures[:32])
            if self.checks:
                shares = saying(pictures, [caption.said for caption in self.checks])
                figures |= {f"{name}@{steps}": share for name, share in shares.items()}
        return np.concatenate(sheets), figures

    def collect(self) -> None:
        student = self.plain("student")
        self.finished = gather(student) if self.context.shard else student

    def write(self, folder: Path) -> None:
        self.finished.save_pretrained(folder / "unet")
        self.scheduler().save_pretrained(folder / "scheduler")
