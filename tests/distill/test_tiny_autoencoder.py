"""The tiny autoencoder's lessons: objects count, and half of what it decodes is the student's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import load_config
from distill.shapes import draw, parse_caption
from distill.stages.tiny_autoencoder import TinyAutoencoderTrainer, object_loss


def picture(caption: str) -> torch.Tensor:
    drawn = torch.from_numpy(draw([parse_caption(caption)], 0))
    return drawn.permute(0, 3, 1, 2).float() / 127.5 - 1


def test_the_object_loss_sees_an_object_s_colour_and_no_background() -> None:
    wanted = picture("a small white star on the left of a black background")
    pink = picture("a small purple star on the left of a black background")
    gone = torch.full_like(wanted, -1.0)
    assert object_loss(wanted, wanted) == 0
    assert object_loss(pink, wanted) > 0.2
    assert object_loss(gone, wanted) > object_loss(pink, wanted)
    # A shift of the background alone costs nothing here; the other losses see it.
    shifted = torch.where(wanted < -0.99, wanted + 0.5, wanted)
    assert object_loss(shifted, wanted) < 0.01
    # A small object's colour counts as much as a large one's.
    large, its_pink = (
        picture(f"a large {colour} star on the left of a black background")
        for colour in ("white", "purple")
    )
    small = float(object_loss(pink, wanted))
    assert float(object_loss(its_pink, large)) == pytest.approx(small, rel=0.05)


def test_the_object_loss_of_a_blank_picture_is_finite() -> None:
    blank = torch.zeros(2, 3, 64, 64, requires_grad=True)
    loss = object_loss(blank, torch.zeros(2, 3, 64, 64))
    loss.backward()
    assert loss == 0
    assert blank.grad is not None
    assert torch.isfinite(blank.grad).all()


def test_half_of_what_it_decodes_is_the_student_s(
    smoke: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.train import make_context
    from tests.distill.settings import SMALL

    monkeypatch.setenv("ADDBENCH_BUILD", str(smoke))
    config = load_config("smoke", SMALL[1::2])
    trainer = TinyAutoencoderTrainer(make_context(config, "smoke", device="cpu", precision="fp32"))
    trainer.setup()
    trainer.progress = 1.0  # whole pictures
    decoded: list[torch.Tensor] = []
    asked: list[tuple[Any, torch.Tensor]] = []
    decode = trainer.latents.decode

    def kept(latents: torch.Tensor) -> torch.Tensor:
        decoded.append(latents)
        return decode(latents)

    def predicted(unet: Any, noisy: torch.Tensor, t: torch.Tensor, _: Any) -> torch.Tensor:
        asked.append((unet, t))
        return torch.full_like(noisy, 7.0)

    monkeypatch.setattr(trainer.latents, "decode", kept)
    monkeypatch.setattr(trainer.checkpoint, "predict", predicted)
    losses = trainer.step(0)
    assert set(losses) == {"l1", "mse", "edges", "objects", "latents"}
    ((unet, t),) = asked
    assert unet is trainer.student
    assert len(t) == config.tiny_autoencoder.batch // 2
    assert 999 in t  # one step from pure noise, where this student says: all -7
    (latents,) = decoded
    shown = latents[len(t) :]
    assert (shown[t == 999] == -7).all()
    assert latents[: len(t)].abs().max() < 7
