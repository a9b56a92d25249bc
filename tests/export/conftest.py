"""A checkpoint in diffusers format, written as its libraries write it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from folders import lay_out

from export.models import MODELS
from export.source.checkpoint import ARCHITECTURES, COMPONENTS, open_checkpoint


@pytest.fixture(scope="session")
def _saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = open_checkpoint(MODELS["tiny-sdxl"], "random", seed=5)
    folder = tmp_path_factory.mktemp("saved") / "my-sdxl"
    for part in checkpoint.model.parts:
        module = checkpoint.module(part, torch.float32)
        module.save_pretrained(folder / COMPONENTS[part].folder)  # type: ignore[operator]
    checkpoint.save_tokenizers(folder)
    architecture = ARCHITECTURES / "tiny-sdxl"
    shutil.copytree(architecture / "scheduler", folder / "scheduler")
    shutil.copy(architecture / "model_index.json", folder)
    return folder


@pytest.fixture
def folder(_saved_folder: Path, tmp_path: Path) -> Path:
    """tiny-sdxl of seed 5, FP32 safetensors, with a `taesd` of its own; the test may change it."""
    return Path(shutil.copytree(_saved_folder, tmp_path / "my-sdxl"))


@pytest.fixture
def hub_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds org/tiny (fp16 and fp32 weights) and org/taesd; no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for part in ("text_encoder", "text_encoder_2", "unet", "vae_decoder"):
        component = COMPONENTS[part]
        plain = folder / component.folder / f"{component.stem}.safetensors"
        shutil.copy(plain, plain.with_suffix(".fp16.safetensors"))
    shutil.move(folder / "taesd", tmp_path / "taesd")
    lay_out(cache, "org/tiny", folder, "1" * 40)
    lay_out(cache, "org/taesd", tmp_path / "taesd", "2" * 40)
    return cache
