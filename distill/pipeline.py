"""Trained networks as diffusers' own pipeline: the path that every user of the folder takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from core.errors import PreconditionError
from distill.networks import TextEncoding

PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler")


def assemble(
    *,
    tokenizers: Sequence[Any],
    text: TextEncoding,
    unet: nn.Module,
    vae: Any,
    scheduler: Any,
) -> Any:
    """A diffusers pipeline of these networks, without copies: SDXL's, or with one text encoder
    Stable Diffusion's."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts: dict[str, Any] = {
        "tokenizer": tokenizers[0],
        "text_encoder": text.first,
        "unet": unet,
        "vae": vae,
        "scheduler": scheduler,
    }
    pipeline: Any
    if text.second is None:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    else:
        pipeline = StableDiffusionXLPipeline(
            **parts,
            tokenizer_2=tokenizers[1],
            text_encoder_2=text.second,
            # The networks saw the empty caption, not zeros in its place.
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_folder(folder: Path, device: str | torch.device = "cpu") -> Any:
    """A pipeline from a folder in diffusers format, in float32.

    Raises:
        PreconditionError: it is not such a folder, or a part is missing or damaged.
    """
    from diffusers import StableDiffusionXLPipeline

    require_parts(folder, PARTS)
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            folder, dtype=torch.float32, add_watermarker=False, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise PreconditionError(
            f"{folder} cannot be loaded as a checkpoint",
            str(error),
            "copy or train it again; the folder is damaged",
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def use_tiny_decoder(pipeline: Any, folder: Path) -> None:
    """Let a pipeline decode through the AutoencoderTiny of a folder."""
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny.from_pretrained(folder, dtype=torch.float32)
    pipeline.vae = tiny.to(pipeline.device)


def require_parts(folder: Path, parts: Sequence[str]) -> None:
    """Refuse a checkpoint folder that lacks a part, naming it."""
    if not folder.is_dir():
        raise PreconditionError(
            f"there is no checkpoint folder {folder}",
            "a folder in diffusers format was asked for",
            "check the path; networks.checkpoint in the config, or --model on the command line",
        )
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise PreconditionError(
            f"the checkpoint {folder} lacks {', '.join(missing)}",
            "a checkpoint in diffusers format has a folder for every part",
            "download or train it again, all parts of it",
        )


@torch.no_grad()
def generate(
    pipeline: Any,
    captions: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seeds: Sequence[int],
    size: int,
    batch: int = 64,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> NDArray[np.uint8]:
    """Pictures uint8 [n, size, size, 3]; each has a generator of its own, so batches do not matter.

    guidance: classifier-free guidance scale; 0 and 1 mean none, and one UNet evaluation a step.
    """
    batches = []
    for start in range(0, len(captions), batch):
        with autocast():
            pictures = pipeline(
                prompt=list(captions[start : start + batch]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(s) for s in seeds[start : start + batch]],
                height=size,
                width=size,
                output_type="np",
            ).images
        batches.append(
            np.rint(np.asarray(pictures, np.float32) * 255).clip(0, 255).astype(np.uint8)
        )
    return np.concatenate(batches)
