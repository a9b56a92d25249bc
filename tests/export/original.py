"""Writes a checkpoint in diffusers format as one file under the original names of its release.

The inverse of what diffusers' single-file loaders do, for the small models of the tests.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}  # fmt: skip
TOP = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
       "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
       "add_embedding.linear_1": "label_emb.0.0",
       "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip


VAE = {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k",
       "to_v": "v", "to_out.0": "proj_out", "conv_shortcut": "nin_shortcut",
       "conv_norm_out": "norm_out"}  # fmt: skip


def unet_name(name: str, layers: int, attended: set[str]) -> str:
    for ours, theirs in TOP.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    kind, _, rest = name.partition(".")
    if kind == "mid_block":
        which, index, rest = rest.split(".", 2)
        place = "middle_block.1" if which == "attentions" else f"middle_block.{2 * int(index)}"
    else:
        block, which, index, rest = rest.split(".", 3)
        step = layers + 1
        if kind == "down_blocks":
            number = step * int(block) + int(index) + 1
            place = f"input_blocks.{number}.{int(which == 'attentions')}"
            if which == "downsamplers":
                return f"input_blocks.{step * (int(block) + 1)}.0." + rest.replace("conv", "op", 1)
        else:
            place = f"output_blocks.{step * int(block) + int(index)}.{int(which == 'attentions')}"
            if which == "upsamplers":
                last = 2 if f"up_blocks.{block}" in attended else 1
                return f"output_blocks.{step * int(block) + layers}.{last}.{rest}"
    if which == "resnets":
        part, _, end = rest.partition(".")
        rest = f"{RESNET[part]}.{end}"
    return f"{place}.{rest}"


def vae_name(name: str) -> str:
    count = 4
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{count - 1 - int(m[1])}.", name)
    name = name.replace("upsamplers.0", "upsample")
    name = re.sub(r"(up\.\d)\.resnets", r"\1.block", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for ours, theirs in VAE.items():
        name = name.replace(ours, theirs)
    return name


def original_vae(tensors: Tensors) -> Tensors:
    return {
        vae_name(name): tensor[:, :, None, None] if "attentions" in name and tensor.ndim == 2
        and "group_norm" not in name else tensor
        for name, tensor in tensors.items()
    }  # fmt: skip


def original_unet(tensors: Tensors, layers: int) -> Tensors:
    attended = {".".join(n.split(".")[:2]) for n in tensors if ".attentions." in n}
    return {unet_name(name, layers, attended): tensor for name, tensor in tensors.items()}


def open_clip(tensors: Tensors) -> Tensors:
    """The second text encoder of SDXL, as OpenCLIP names it."""
    out: Tensors = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", name):
            key = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"
            stacked.setdefault(key, {})[match[2]] = tensor
            continue
        name = name.replace("encoder.layers", "transformer.resblocks")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace("embeddings.token_embedding", "token_embedding")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        name = name.replace("final_layer_norm", "ln_final")
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T.contiguous()
        out[name] = tensor
    return out | {key: torch.cat([each[k] for k in "qkv"]) for key, each in stacked.items()}


def write_single_file(folder: Path, file: Path, layers: int = 1) -> None:
    """One file of all that draws in a folder: SDXL's form where it has a second text encoder."""

    def read(name: str, stem: str = "diffusion_pytorch_model") -> Tensors:
        return load_file(folder / name / f"{stem}.safetensors")

    def under(prefix: str, tensors: Tensors) -> Tensors:
        return {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}

    first = {
        "text_model." + name.removeprefix("text_model."): tensor
        for name, tensor in read("text_encoder", "model").items()
    }
    whole = under("model.diffusion_model.", original_unet(read("unet"), layers))
    whole |= under("first_stage_model.", original_vae(read("vae")))
    if (folder / "text_encoder_2").is_dir():
        whole |= under("conditioner.embedders.0.transformer.", first)
        second = open_clip(read("text_encoder_2", "model"))
        whole |= under("conditioner.embedders.1.model.", second)
    else:
        whole |= under("cond_stage_model.transformer.", first)
    save_file(whole, file)
