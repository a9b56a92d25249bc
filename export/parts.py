"""The torch wrapper of each part: what its graph takes and gives. Only `batch` is a named axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from export.models import PICTURE_PARTS, Model, TextEncoderForm

TOKENS = 77
"""Length of a tokenised prompt in every CLIP text encoder."""


class TextEncoder(nn.Module):
    """input_ids int64 [batch, 77] -> hidden_states [batch, 77, width] (, text_embeds [batch, n]).

    Runs only the layers it needs: without the pooled embedding it stops at the one that is taken,
    the last (`final`, normalised) or the one before (`penultimate`), less `clip_skip`.
    """

    def __init__(
        self, module: nn.Module, form: TextEncoderForm, pooled: bool, clip_skip: int = 0
    ) -> None:
        super().__init__()
        text_model: Any = getattr(module, "text_model", module)
        layers = list(text_model.encoder.layers)
        self.taken = len(layers) - (form == "penultimate") - clip_skip
        self.form, self.pooled = form, pooled
        self.embeddings = text_model.embeddings
        self.layers = nn.ModuleList(layers if pooled else layers[: self.taken])
        if pooled or form == "final":
            self.final_layer_norm = text_model.final_layer_norm
        if pooled:
            self.end_of_text = text_model.config.eos_token_id
            self.text_projection: Any = module.text_projection

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.embeddings(input_ids=input_ids)
        taken = hidden
        for index, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden, None, is_causal=True)
            if index == self.taken:
                taken = hidden
        normed = self.form == "final"
        if not self.pooled:
            return self.final_layer_norm(taken) if normed else taken
        whole = taken is hidden
        hidden = self.final_layer_norm(hidden)
        if normed:
            taken = hidden if whole else self.final_layer_norm(taken)
        ids = input_ids.to(torch.int32)
        # Configs from before transformers 4.31 say 2, and mean the highest id.
        is_end = ids if self.end_of_text == 2 else (ids == self.end_of_text).to(torch.int32)
        at = is_end.argmax(-1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return taken, self.text_projection(hidden.gather(1, at)[:, 0])


class UNet(nn.Module):
    """One evaluation of the UNet; `timestep` and `time_ids` are float32, the rest in its dtype.

    sample [batch, 4, h, w], timestep [1], encoder_hidden_states [batch, 77, width]
    -> out_sample [batch, 4, h, w]. SDXL's (`Pooled`) also take text_embeds [batch, n] and time_ids
    [batch, 6]; LCM's (`Embedded`) timestep_cond [batch, m], the guidance scale as sinusoids.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.unet: Any = module

    def predict(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added: dict[str, Tensor] | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        if added is not None:
            # diffusers concatenates text_embeds with the FP32 sinusoid of time_ids, then casts:
            # ONNX's Concat takes one type only, so both are FP32 there.
            added = {**added, "text_embeds": added["text_embeds"].float()}
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.predict(sample, timestep, encoder_hidden_states)


class PooledUNet(UNet):
    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.predict(sample, timestep, encoder_hidden_states, added)


class EmbeddedUNet(UNet):
    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor,
    ) -> Tensor:
        return self.predict(sample, timestep, encoder_hidden_states, None, timestep_cond)


class PooledEmbeddedUNet(UNet):
    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor,
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.predict(sample, timestep, encoder_hidden_states, added, timestep_cond)


UNETS = {
    (False, False): UNet,
    (True, False): PooledUNet,
    (False, True): EmbeddedUNet,
    (True, True): PooledEmbeddedUNet,
}
"""(takes the pooled embedding, takes the guidance scale) -> form."""


class AutoencoderHalf(nn.Module):
    """An encoder or decoder with what stands between its latents and those of the UNet: a factor,
    and of some VAEs the mean and deviation of each channel, in SDXL's form."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, module: nn.Module, half: nn.Module) -> None:
        super().__init__()
        config: Any = module.config
        self.scale = float(config.scaling_factor)
        statistics = {"mean": getattr(config, "latents_mean", None),
                      "deviation": getattr(config, "latents_std", None)}  # fmt: skip
        self.has_statistics = None not in statistics.values()
        like = next(half.parameters())
        for name, values in statistics.items() if self.has_statistics else ():
            channels = torch.tensor(values, dtype=like.dtype, device=like.device)
            self.register_buffer(name, channels.reshape(1, -1, 1, 1))


class VaeDecoder(AutoencoderHalf):
    """latent_sample [batch, 4, h, w] -> sample [batch, 3, 8h, 8w] in about [-1, 1], not clamped."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae, vae.decoder)
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        if self.has_statistics:
            latents = latent_sample * self.deviation / self.scale + self.mean
        else:
            latents = latent_sample / self.scale
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


class VaeEncoder(AutoencoderHalf):
    """image [batch, 3, height, width] in [-1, 1] -> latent_sample [batch, 4, h, w]: the mean of
    the posterior, scaled as the UNet knows latents. A sample of it would flicker from one frame to
    the next that is the same."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae, vae.encoder)
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, image: Tensor) -> Tensor:
        moments = self.encoder(image)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean = moments.chunk(2, dim=1)[0]
        if self.has_statistics:
            return (mean - self.mean) * self.scale / self.deviation
        return mean * self.scale


class TaesdEncoder(AutoencoderHalf):
    """image [batch, 3, height, width] in [-1, 1] -> latent_sample [batch, 4, h, w]."""

    def __init__(self, taesd: Any) -> None:
        super().__init__(taesd, taesd.encoder)
        self.encoder = taesd.encoder

    def forward(self, image: Tensor) -> Tensor:
        latents = self.encoder(image)
        return latents if self.scale == 1.0 else latents * self.scale


class TaesdDecoder(AutoencoderHalf):
    """latent_sample [batch, 4, h, w] -> sample [batch, 3, 8h, 8w] in about [-1, 1], not clamped."""

    def __init__(self, taesd: Any) -> None:
        super().__init__(taesd, taesd.decoder)
        self.decoder = taesd.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.decoder(latent_sample if self.scale == 1.0 else latent_sample / self.scale)


AUTOENCODERS: dict[str, Callable[[Any], AutoencoderHalf]] = {
    "vae_decoder": VaeDecoder,
    "taesd_decoder": TaesdDecoder,
    "vae_encoder": VaeEncoder,
    "taesd_encoder": TaesdEncoder,
}


def wrap(part: str, module: nn.Module, model: Model) -> nn.Module:
    """The module with the signature of the part's graph. It shares the weights of `module`."""
    if part.startswith("text_encoder"):
        index = 0 if part == "text_encoder" else 1
        pooled = model.pooled and index == len(model.text_encoders) - 1
        form = model.text_encoders[index]
        return TextEncoder(module, form, pooled, model.clip_skip).eval()
    if part == "unet":
        return UNETS[model.pooled, model.guidance_form == "embedding"](module).eval()
    return AUTOENCODERS[part](module).eval()


def output_names(part: str, model: Model) -> tuple[str, ...]:
    """Names of the graph's outputs, in order."""
    if part.startswith("text_encoder"):
        last = part == ("text_encoder", "text_encoder_2")[len(model.text_encoders) - 1]
        return ("hidden_states", "text_embeds") if model.pooled and last else ("hidden_states",)
    if part in PICTURE_PARTS:
        return ("latent_sample",)
    return ("out_sample",) if part == "unet" else ("sample",)


def example_inputs(
    part: str,
    module: nn.Module,
    batch: int,
    width: int,
    height: int,
    dtype: torch.dtype,
    seed: int = 0,
    scale: int = 8,
) -> dict[str, Tensor]:
    """Seeded inputs of the kind that the pipeline gives this part, drawn in float32, then cast.

    Args:
        module: the diffusers or transformers module (`Checkpoint.module`); its config is read.
        width, height: of the image, in pixels.
        dtype: of the float inputs, `timestep` and `time_ids` apart, which are float32.
        scale: pixels along one side of a latent.
    """
    config: Any = module.config
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if part.startswith("text_encoder"):
        return {"input_ids": _token_ids(config, batch, generator)}
    if part in PICTURE_PARTS:
        return {"image": normal(batch, 3, height, width).clamp(-1, 1)}
    latents = normal(batch, latent_channels(part, config), height // scale, width // scale)
    if part != "unet":
        return {"latent_sample": latents}
    inputs = {
        "sample": latents,
        "timestep": torch.tensor([999.0]),
        "encoder_hidden_states": normal(batch, TOKENS, context_width(config)),
    }
    if config.addition_embed_type == "text_time":
        pooled_width = (
            config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        )
        inputs["text_embeds"] = normal(batch, pooled_width)
        time_ids = torch.tensor([[height, width, 0, 0, height, width]] * batch)
        inputs["time_ids"] = time_ids.float()
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = normal(batch, config.time_cond_proj_dim)
    return inputs


def context_width(unet: Any) -> int:
    """Width of the hidden states that a UNet takes; a list has it once for each block."""
    width: Any = unet.cross_attention_dim
    return int(width[0] if isinstance(width, list | tuple) else width)


def latent_channels(part: str, config: Any) -> int:
    """Channels of the latents that a UNet or decoder takes."""
    return int(config.in_channels if part == "unet" else config.latent_channels)


def _token_ids(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    """Prompts of different lengths: start, words, end of text to the end."""
    end = config.eos_token_id if config.eos_token_id != 2 else config.vocab_size - 1
    ids = torch.full((batch, TOKENS), end)
    for row in ids:
        words = int(torch.randint(3, TOKENS - 1, (1,), generator=generator))
        row[0] = config.bos_token_id or 0
        row[1 : 1 + words] = torch.randint(1, config.vocab_size - 2, (words,), generator=generator)
    return ids
