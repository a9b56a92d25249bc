"""The models that ship with the checkout: they load in diffusers and draw what captions say."""

from __future__ import annotations

from core.files import ROOT
from distill.judge import following
from distill.pipeline import generate, open_folder
from distill.shapes import scenes

TEACHER = ROOT / "models" / "shapes-teacher"


def test_the_teacher_is_small() -> None:
    weights = {file: file.stat().st_size for file in TEACHER.rglob("*.safetensors")}
    assert sum(weights.values()) <= 25e6
    assert weights[TEACHER / "unet" / "diffusion_pytorch_model.safetensors"] <= 20e6


def test_the_teacher_draws_captions_it_never_saw() -> None:
    held_out = scenes(12, seed=11, held_out=True)
    pictures = generate(
        open_folder(TEACHER),
        [scene.caption for scene in held_out],
        steps=12,
        guidance=3.0,
        seeds=range(12),
        size=64,
    )
    assert following(pictures, held_out)["all"] >= 0.75
