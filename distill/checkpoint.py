"""What the student stage starts from: small networks trained here, or a checkpoint folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.errors import PreconditionError
from core.files import read_json
from distill.context import Context
from distill.features import TransformerFeatures, load_features
from distill.networks import TextEncoding, use_eager_attention
from distill.pipeline import PARTS, require_parts

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Checkpoint:
    """A teacher, loaded and frozen: `folder` of its parts, `vae` of its autoencoder.

    `zeros_for_empty`: the empty caption is embedded as zeros (SDXL), not by the text encoders.
    """

    folder: Path
    vae: Path
    tokenizer: Any
    tokenizer_2: Any
    text: TextEncoding
    teacher: Any
    scheduler_config: dict[str, Any]
    zeros_for_empty: bool


def open_checkpoint(context: Context) -> Checkpoint:
    """The teacher of a run.

    Raises:
        PreconditionError: a stage before is not finished, or the folder lacks a part.
    """
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    networks = context.config.networks
    dtype = torch.float32
    if networks.checkpoint:
        folder = Path(networks.checkpoint)
        vae = Path(networks.vae) if networks.vae else folder / "vae"
        require_parts(folder, [part for part in PARTS if part != "vae"])
        require_parts(vae.parent, [vae.name])
        # Large frozen networks are held in the precision that they run in.
        dtype = DTYPES.get(context.accelerator.mixed_precision, dtype)
        index = folder / "model_index.json"
        zeros = bool(index.exists() and read_json(index).get("force_zeros_for_empty_prompt", False))
    else:
        folder = context.weights("teacher") / "weights"
        vae = context.weights("autoencoder") / "weights"
        zeros = False
    try:
        first = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype)
        second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=dtype)
        tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in PARTS[:2]]
    except (OSError, ValueError) as error:
        raise PreconditionError(
            f"the text encoders of {folder} cannot be loaded", str(error), "download them again"
        ) from error
    teacher = load_unet(folder / "unet", dtype)
    text = TextEncoding(first, second)
    if not networks.checkpoint:
        use_eager_attention(first, second, teacher)
    for network in (text, teacher):
        network.to(context.device).eval().requires_grad_(False)
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    return Checkpoint(
        folder, vae, tokenizers[0], tokenizers[1], text, teacher, config, zeros_for_empty=zeros
    )


def load_unet(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import UNet2DConditionModel

    try:
        return UNet2DConditionModel.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise PreconditionError(
            f"the UNet in {folder} cannot be loaded", str(error), "download or train it again"
        ) from error


def open_features(context: Context) -> nn.Module:
    """The discriminator's feature network, frozen: a transformer from a folder, or ours."""
    folder = context.config.networks.features
    network: nn.Module
    if folder:
        network = TransformerFeatures(Path(folder), context.config.data.size)
    else:
        network = load_features(context.weights("features") / "weights", "pictures")
    return network.to(context.device).eval().requires_grad_(False)
