"""LoRA weights, fused into a module's own as it is loaded: the graph has no trace of them.

A file may hold them in diffusers', PEFT's or kohya's names; each entry adds
`weight * scale * up @ down` to the weight of one linear layer or convolution. The scale is
alpha / rank, where alpha is in the file, in its header, or in PEFT's adapter_config.json beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from export.source.layout import CheckpointError, read_object

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
class LayerDelta:
    """What is added to one layer: up [out, rank, ...] @ down [rank, in, ...], times a scale."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, shape: torch.Size) -> Tensor:
        """Return the sum in float32 and in the shape of the layer's weight."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(shape)

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


def read_lora(file: Path, unet: Mapping[str, Any]) -> dict[str, dict[str, LayerDelta]]:
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
    if odd:
        raise not_plain(file, odd[0])
    if any(key.startswith(PEFT) and not key.startswith(NESTED) for key in tensors):
        part, config = peft_part(file, tensors), adapter_config(file)
        named = {f"{part}.{key.removeprefix(PEFT)}": tensors[key] for key in tensors}
        return _entries(file, named, {}, {part: config})
    settings = header_settings(file, header)
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


# ---- PEFT's settings

PEFT, NESTED = "base_model.model.", ("base_model.model.unet.", "base_model.model.text_encoder")
"""How PEFT begins every key, and how it does where the model was a whole pipeline's part."""
SETTINGS = {"lora_alpha", "use_rslora", "alpha_pattern", "r", "rank_pattern"}
"""What decides the scale in adapter_config.json. Ranks are read off the tensors."""
WITHOUT_EFFECT = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size", "corda_config", "eva_config",
    "loftq_config", "ensure_weight_tying", "target_parameters", "runtime_config",
}  # fmt: skip
"""How an adapter was trained; its tensors are what came of it."""
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}
"""Keys of which these values alone leave the model's own weights as they are."""


def not_plain(file: Path, key: str) -> CheckpointError:
    return CheckpointError(
        f"{file.name} is not plain LoRA",
        f"it holds {key}: another method, which does more than add a product of two",
        "fuse it with the program that made it, and export the checkpoint that it saves",
    )


def adapter_config(file: Path) -> dict[str, Any]:
    """PEFT's settings, which lie beside the weights."""
    place = file.parent / "adapter_config.json"
    if not place.is_file():
        raise CheckpointError(
            f"{place} is missing",
            f"{file.name} is in PEFT's own layout, whose alpha and rank rule are in that file",
            "put it beside the weights; PEFT writes both into one folder",
        )
    return require_plain(file, read_object(place))


def header_settings(file: Path, header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """part -> PEFT's settings, as diffusers keeps them in the header of a file."""
    settings: dict[str, dict[str, Any]] = {}
    for key, value in json.loads(header.get(METADATA, "{}")).items():
        part, _, name = key.partition(".")
        settings.setdefault(part, {})[name] = value
    return {part: require_plain(file, values) for part, values in settings.items()}


def require_plain(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Refuse settings of PEFT that do more than scale a product, by their name."""
    if config.get("peft_type", "LORA") != "LORA":
        raise not_plain(file, f"peft_type {config['peft_type']}")
    for key, value in config.items():
        if key in PLAIN and (value in PLAIN[key] or value is None):
            continue
        if value and key not in SETTINGS | WITHOUT_EFFECT:
            raise not_plain(file, f"{key} {value!r}")
    return config


def peft_part(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """The part that a file in PEFT's own layout is for: by its folder's name, else by its keys."""
    if file.parent.name in PREFIXES:
        return file.parent.name
    blocks = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_emb|add_emb)")
    if all(blocks.match(key.removeprefix(PEFT)) for key in tensors):
        return "unet"
    return "text_encoder"


def scale_of(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """What PEFT multiplies the product of one layer by.

    Args:
        layer: its name with dots; a key of `alpha_pattern` is its end, or a pattern of it.
    """
    alpha = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
            break
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def _entries(
    file: Path,
    named: Mapping[str, Tensor],
    alphas: dict[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, LayerDelta]]:
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
        layer = bare.removeprefix(start)
        piece = pieces.setdefault((part, flat(layer)), {"layer": layer})
        piece[kind] = float(value) if kind == "alpha" else value
    entries: dict[str, dict[str, LayerDelta]] = {}
    for (part, name), piece in pieces.items():
        if not {"up", "down"} <= piece.keys():
            unknown.append(f"{part} {name}, of which one half is missing")
            continue
        rank = piece["down"].shape[0]
        if "alpha" in piece:
            scale = piece["alpha"] / rank
        else:
            scale = scale_of(settings.get(part, {}), piece["layer"], rank)
        entries.setdefault(part, {})[name] = LayerDelta(piece["down"], piece["up"], scale)
    if unknown or not entries:
        raise CheckpointError(
            f"{file.name} does not hold LoRA weights",
            f"the key {unknown[0]} is of no LoRA layer" if unknown else "it holds no tensors",
            "pass a file in the format of diffusers, PEFT or kohya",
        )
    return entries
