"""LoRA weights, fused into a module's own as it is loaded: the graph has no trace of them.

A file may hold them in diffusers', PEFT's or kohya's names; each entry adds
`weight * alpha / rank * up @ down` to the weight of one linear layer or convolution.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from export.source.layout import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings in the header of a file."""
PREFIXES = {
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
    "text_encoder": ("text_encoder.", "lora_te1_", "lora_te_"),
    "unet": ("unet.", "base_model.model.unet.", "lora_unet_"),
}
ENDS = re.compile(
    r"[._](lora_A|lora_B|lora[._](down|up)|lora_linear_layer[._](down|up)|alpha)(\.default)?(\.weight)?$"
)
UP = re.compile(r"(lora_B|[._]up)(\.default)?\.weight$")


@dataclass(frozen=True)
class Entry:
    """What is added to one layer: up [out, rank, ...] @ down [rank, in, ...], times alpha/rank."""

    down: Tensor
    up: Tensor
    alpha: float | None

    def delta(self, shape: torch.Size) -> Tensor:
        """In float32 and in the shape of the layer's weight."""
        rank = self.down.shape[0]
        scale = 1.0 if self.alpha is None else self.alpha / rank
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (scale * product).reshape(shape)

    def fits(self, shape: torch.Size) -> bool:
        rank = self.down.shape[0]
        if self.up.flatten(1).shape != (shape[0], rank):
            return False
        return self.down.flatten(1).shape[1] == shape[1:].numel()


@dataclass(frozen=True)
class Lora:
    """One file of LoRA weights and the strength they are fused with."""

    file: Path
    weight: float

    def fuse(self, part: str, module: nn.Module, unet: Mapping[str, Any], half: bool) -> None:
        """Add what the file has for `part` to the weights of `module`, in place.

        Args:
            unet: config of the UNet, see `read_lora`.
            half: round the sums to FP16: what a bundle stores and its FP32 reference then agree.
        """
        import torch

        layers = layers_of(module)
        for name, entry in read_lora(self.file, unet).get(part, {}).items():
            weight = layers[name].get_parameter("weight")
            fused = weight.float() + self.weight * entry.delta(weight.shape)
            weight.data.copy_(fused.to(torch.float16) if half else fused)

    def check(self, modules: Mapping[str, nn.Module], unet: Mapping[str, Any]) -> None:
        """Every entry has its layer, of its shape, in one of the parts' `modules`.

        Raises:
            CheckpointError: the file is of another model.
        """
        found = read_lora(self.file, unet)
        wrong = []
        for part, entries in found.items():
            layers = layers_of(modules[part]) if part in modules else {}
            for name, entry in entries.items():
                if name not in layers:
                    wrong.append(f"{part} has no layer {name}")
                elif not entry.fits(layers[name].get_parameter("weight").shape):
                    shape = list(layers[name].get_parameter("weight").shape)
                    wrong.append(f"{part} {name} is {shape} and its entry has another shape")
        if wrong:
            total = sum(map(len, found.values()))
            raise CheckpointError(
                f"{self.file.name} does not fit this model",
                f"{len(wrong)} of its {total} layers have no place, the first: {wrong[0]}",
                "pass LoRA weights that were made for this model, or another --model",
            )


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer and convolution by its flattened name."""
    from torch import nn

    return {
        flat(name): layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def flat(name: str) -> str:
    """One spelling for all formats: no dots, no `text_model`, diffusers' old processors undone."""
    name = name.removeprefix("text_model.").removeprefix("text_model_")
    name = name.replace(".processor", "").replace(".", "_")
    name = re.sub(r"to_out_lora$", "to_out_0", name)
    name = re.sub(r"to_([qkv])_lora$", r"to_\1", name)
    if ".self_attn." in name or "_self_attn_to_" in name:  # text encoders by diffusers' old names
        name = re.sub(r"_to_([qkv])$", r"_\1_proj", name).replace("_to_out_0", "_out_proj")
    return name


def read_lora(file: Path, unet: Mapping[str, Any]) -> dict[str, dict[str, Entry]]:
    """part -> flattened layer name -> entry.

    Args:
        unet: its config, for files that name blocks as the original release of SDXL does.

    Raises:
        CheckpointError: it is no file of LoRA weights, or of a kind that is not fused here.
    """
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as LoRA weights", str(error), "pass a whole .safetensors file"
        ) from error
    odd = [key for key in tensors if re.search("dora|magnitude|hada|lokr|glora", key)]
    settings = json.loads(header.get(METADATA, "{}"))
    odd += [
        key
        for key, value in settings.items()
        if value and key.endswith(("rslora", "alpha_pattern"))
    ]
    if odd:
        raise CheckpointError(
            f"{file.name} is not plain LoRA",
            f"it holds {odd[0]}: another method, which does more than add a product of two",
            "fuse it with the program that made it, and export the checkpoint that it saves",
        )
    try:
        named, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
            dict(tensors),
            unet_config=SimpleNamespace(layers_per_block=unet.get("layers_per_block", 2)),
        )
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{file.name} does not fit this model", reason[0][:300], "pass other LoRA weights"
        ) from error
    return _entries(file, named, dict(alphas or {}), settings)


def _entries(
    file: Path, named: Mapping[str, Tensor], alphas: dict[str, Any], settings: Mapping[str, Any]
) -> dict[str, dict[str, Entry]]:
    pieces: dict[tuple[str, str], dict[str, Any]] = {}
    unknown = []
    for key, value in (*named.items(), *alphas.items()):
        part = next((p for p, starts in PREFIXES.items() if key.startswith(starts)), None)
        # diffusers names the alpha of an old processor `...to_q_lora.down.weight.alpha`.
        bare = re.sub(r"\.(down|up)\.weight(?=\.alpha$)", "", key)
        bare = ENDS.sub("", re.sub(r"_lora\.(down|up)\.weight$", "_lora", bare))
        if part is None or bare == key:
            unknown.append(key)
            continue
        start = next(start for start in PREFIXES[part] if key.startswith(start))
        kind = "alpha" if key.endswith("alpha") else "up" if UP.search(key) else "down"
        piece = pieces.setdefault((part, flat(bare.removeprefix(start))), {})
        piece[kind] = float(value) if kind == "alpha" else value
    found: dict[str, dict[str, Entry]] = {}
    for (part, name), piece in pieces.items():
        if not {"up", "down"} <= piece.keys():
            unknown.append(f"{part} {name}, of which one half is missing")
            continue
        alpha = piece.get("alpha", settings.get(f"{part}.lora_alpha"))
        found.setdefault(part, {})[name] = Entry(piece["down"], piece["up"], alpha)
    if unknown or not found:
        raise CheckpointError(
            f"{file.name} does not hold LoRA weights",
            f"the key {unknown[0]} is of no LoRA layer" if unknown else "it holds no tensors",
            "pass a file in the format of diffusers, PEFT or kohya",
        )
    return found
