"""A pretrained diffusion model: what the student starts from, and what teaches it.

Small networks trained here, or folders in diffusers format, of SDXL's form (two text encoders) or
of Stable Diffusion's (one). Teacher and student may be of different families: the teacher then
takes the student's pictures through its own autoencoder and captions through its own encoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import PreconditionError
from core.files import read_json
from distill.context import Context
from distill.features import TransformerFeatures, load_features
from distill.latents import Latents
from distill.networks import TextEncoding, size_ids, tokenize, use_eager_attention
from distill.pipeline import PARTS, require_parts
from distill.schedule import Schedule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Embedded:
    """Captions: `context` [n, 77, width], `pooled` [n, width], `mask` [n, 77] of own tokens."""

    context: Tensor
    pooled: Tensor
    mask: Tensor

    def expand(self, n: int) -> Embedded:
        """One caption's, for n pictures."""
        parts = (self.context, self.pooled, self.mask)
        return Embedded(*(part.expand(n, *part.shape[1:]) for part in parts))


@dataclass
class FrozenModel:
    """A diffusion model, loaded and frozen; `unet` is None where another model teaches.

    `zeros_for_empty`: the empty caption is embedded as zeros (SDXL), not by the text encoders.
    """

    context: Context
    folder: Path
    tokenizers: list[Any]
    text: TextEncoding
    unet: Any
    latents: Latents
    scheduler_config: dict[str, Any]
    zeros_for_empty: bool

    def __post_init__(self) -> None:
        self.schedule = Schedule.from_config(self.scheduler_config, self.context.device)

    @torch.no_grad()
    def embed(self, captions: list[str]) -> Embedded:
        ids = [tokenize(t, captions).to(self.context.device) for t in self.tokenizers]
        with self.context.accelerator.autocast():
            context, pooled = self.text(*ids)
        if self.zeros_for_empty and captions == [""]:
            context, pooled = torch.zeros_like(context), torch.zeros_like(pooled)
        ends = (ids[0] == self.tokenizers[0].eos_token_id).int()
        return Embedded(context.float(), pooled.float(), ends.cumsum(1) - ends == 0)

    def predict(self, unet: Any, noisy: Tensor, t: Tensor, told: Embedded) -> Tensor:
        """The raw output of this model's UNet, or of a student of its form."""
        added = None
        if self.text.second is not None:
            ids = size_ids(len(noisy), self.context.config.data.size, self.context.device)
            added = {"text_embeds": told.pooled, "time_ids": ids}
        with self.context.accelerator.autocast():
            output: Tensor = unet(noisy, t, told.context, added_cond_kwargs=added).sample
        return output.float()


def open_checkpoint(context: Context, which: str = "checkpoint") -> FrozenModel:
    """The model that a run starts from, or with `which` = `teacher` the one that teaches it.

    Raises:
        PreconditionError: a stage before is not finished, or the folder lacks a part.
    """
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

    networks = context.config.networks
    named = getattr(networks, which)
    dtype = torch.float32
    zeros, parts = False, list(PARTS)
    if named:
        folder = Path(named)
        vae = Path(networks.vae) if networks.vae and which == "checkpoint" else folder / "vae"
        require_parts(folder, ["unet"])
        if read_json(folder / "unet" / "config.json").get("addition_embed_type") is None:
            parts = [part for part in parts if not part.endswith("_2")]
        require_parts(folder, [part for part in parts if part != "vae"])
        require_parts(vae.parent, [vae.name])
        # Large frozen networks are held in the precision that they run in.
        dtype = DTYPES.get(context.accelerator.mixed_precision, dtype)
        index = folder / "model_index.json"
        zeros = bool(index.exists() and read_json(index).get("force_zeros_for_empty_prompt", False))
    else:
        folder = context.weights("teacher") / "weights"
        vae = context.weights("autoencoder") / "weights"
    second = None
    try:
        first = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype)
        if "text_encoder_2" in parts:
            second = CLIPTextModelWithProjection.from_pretrained(
                folder / "text_encoder_2", dtype=dtype
            )
        tokenizers = [
            AutoTokenizer.from_pretrained(folder / name)
            for name in parts
            if name.startswith("tokenizer")
        ]
    except (OSError, ValueError) as error:
        raise PreconditionError(
            f"the text encoders of {folder} cannot be loaded", str(error), "download them again"
        ) from error
    # The student loads its own: where another model teaches, this one's UNet has nothing to do.
    teaches = which == "teacher" or not networks.teacher
    unet = load_unet(folder / "unet", dtype) if teaches else None
    text = TextEncoding(first, second)
    frozen: list[Any] = [text, unet] if teaches else [text]
    if not named:
        use_eager_attention(first, second, *frozen[1:])
    for network in frozen:
        network.to(context.device).eval().requires_grad_(False)
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    drawn = context.config.data.kind == "shapes"
    latents = Latents(context, vae, cache=which == "checkpoint" and drawn)
    return FrozenModel(context, folder, tokenizers, text, unet, latents, config, zeros)


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
