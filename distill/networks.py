"""The small networks, SDXL's topology in little: tokenizer, text encoders, UNet, autoencoders."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import Networks
from distill.schedule import scheduler_config

LATENTS = 4
SCALE = 8
"""Pixels along one side of a latent."""
POSITIONS = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: Iterable[str]) -> Any:
    """A CLIP BPE tokenizer trained on captions; every byte has a token, so none is unknown.

    End-of-text gets the highest id: transformers pools at the highest id when a config's
    `eos_token_id` is 2, and other readers of CLIP do the same.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>",
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), START, END]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS)


def build_text_encoder(networks: Networks, tokenizer: Any, second: bool) -> nn.Module:
    """CLIPTextModel, or with a projection for the second."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=networks.text_width,
        intermediate_size=4 * networks.text_width,
        num_hidden_layers=networks.text_layers[second],
        num_attention_heads=max(1, networks.text_width // 32),
        projection_dim=networks.text_width,
        max_position_embeddings=POSITIONS,
        hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: nn.Module = (CLIPTextModelWithProjection if second else CLIPTextModel)(config)
    return model


def build_unet(networks: Networks, size: int) -> Any:
    """UNet2DConditionModel with text-time conditioning on latents of size / 8."""
    from diffusers import UNet2DConditionModel

    levels = len(networks.unet_channels)
    attends = [level < networks.attention_levels for level in range(levels)]
    down = ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends]
    up = ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)]
    time_width = 32
    return UNet2DConditionModel(
        sample_size=size // SCALE,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=networks.unet_channels,
        layers_per_block=networks.unet_layers,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        cross_attention_dim=2 * networks.text_width,
        attention_head_dim=[width // 32 for width in networks.unet_channels],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=6 * time_width + networks.text_width,
        norm_num_groups=16,
    )


def build_vae(networks: Networks, size: int) -> Any:
    """AutoencoderKL: 8 pixels a latent, 4 channels."""
    from diffusers import AutoencoderKL

    levels = len(networks.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=networks.vae_channels,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=min(16, *networks.vae_channels),
        sample_size=size,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def build_tiny_vae(networks: Networks) -> Any:
    """AutoencoderTiny over the same latents."""
    from diffusers import AutoencoderTiny

    channels, blocks = networks.tiny_channels, networks.tiny_blocks
    return AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 4,
        decoder_block_out_channels=(channels,) * 4,
        num_encoder_blocks=(1, blocks, blocks, blocks),
        num_decoder_blocks=(blocks, blocks, blocks, 1),
        latent_channels=LATENTS,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build_scheduler(kind: str, beta_start: float, beta_end: float) -> Any:
    """A stock diffusers scheduler by class name on our schedule."""
    import diffusers

    config = scheduler_config(beta_start, beta_end)
    if kind == "LCMScheduler":
        # Its grid of 4 is the student's timesteps; no more steps than that.
        config |= {"original_inference_steps": 4, "clip_sample": False}
    return getattr(diffusers, kind)(**config)


def use_eager_attention(*modules: Any) -> None:
    """Plain attention in training: on a CPU the fused backward in bfloat16 is far slower."""
    from diffusers.models.attention_processor import AttnProcessor

    for module in modules:
        if hasattr(module, "set_attn_processor"):
            module.set_attn_processor(AttnProcessor())
        elif hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("eager")


@functools.cache
class TextEncoding(nn.Module):
    """The text encoders as the pipelines read them.

    ids of each tokenizer, int64 [batch, 77] -> context [batch, 77, width], pooled [batch, width].
    SDXL: penultimate hidden states of both, joined, and the second's projection. Stable Diffusion
    (no second): the last hidden state, and that of the end of text.
    """

    def __init__(self, first: Any, second: Any = None) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def pooled_width(self) -> int:
        width: int = (
            self.first.config.hidden_size
            if self.second is None
            else self.second.config.projection_dim
        )
        return width

    def forward(self, ids: Tensor, ids_2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.second is None:
            only = self.first(ids)
            return only.last_hidden_state, only.pooler_output
        one = self.first(ids, output_hidden_states=True).hidden_states[-2]
        two = self.second(ids_2, output_hidden_states=True)
        return torch.cat([one, two.hidden_states[-2]], -1), two.text_embeds


class TextToImage(nn.Module):
    """Text encoders and UNet as one module, so that data parallelism sees one forward."""

    def __init__(self, text: TextEncoding, unet: Any) -> None:
        super().__init__()
        self.text, self.unet = text, unet
        # The first encoder's last layer is read by nobody (SDXL takes the one before it).
        body = getattr(text.first, "text_model", text.first)  # nested before transformers 5
        for module in (body.encoder.layers[-1], body.final_layer_norm):
            module.requires_grad_(False)

    def forward(
        self, noisy: Tensor, t: Tensor, ids: Tensor, ids_2: Tensor, time_ids: Tensor
    ) -> Tensor:
        context, pooled = self.text(ids, ids_2)
        out: Tensor = self.unet(
            noisy, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
        ).sample
        return out


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """int64 [n, 77], padded and cut as the pipeline does."""
    ids: Tensor = tokenizer(
        captions, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def size_ids(batch: int, size: int, device: torch.device | str) -> Tensor:
    """SDXL's time_ids of an uncropped square picture: original size, crop, target size."""
    return torch.tensor([[size, size, 0, 0, size, size]] * batch, device=device).float()
