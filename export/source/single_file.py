"""One file with a whole model under its original names, as most checkpoints outside the hub are.

diffusers' own single-file loaders convert the tensors, offline: which architecture they are of is
told from the keys, its configs are those of the entry in `export/models.py`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.source.layout import COMPONENTS, CheckpointError, require_whole
from export.source.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae_decoder": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
"""part -> how the keys of its tensors begin."""
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"


def shapes_of(file: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor in a file, without reading any."""
    from safetensors import safe_open

    require_whole(file)
    with safe_open(file, framework="numpy") as opened:
        return {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118


def tell_architecture(file: Path) -> str:
    """Return the name of the entry whose architecture a whole model's file is of.

    Raises:
        CheckpointError: it is no whole model, of another kind, or draws on a picture.
    """
    shapes = shapes_of(file)

    def has(*starts: str) -> bool:
        return any(key.startswith(starts) for key in shapes)

    if FIRST_LAYER not in shapes:
        first = next(iter(shapes), "nothing")
        raise CheckpointError(
            f"{file} holds no whole model under its original names",
            f"there is no model.diffusion_model.*; the first of its {len(shapes)} keys is {first}",
            "a UNet alone goes with --unet FILE, a VAE with --vae FILE, LoRA with --lora FILE; or"
            " pass the folder in diffusers format",
        )
    channels = shapes[FIRST_LAYER][1]
    if channels != 4:
        raise CheckpointError(
            f"the UNet in {file.name} draws on a picture: it takes {channels} channels",
            "beside four of latents it takes those of a picture or a mask",
            "pass a checkpoint that draws from text alone",
        )
    if has("conditioner.embedders.1."):
        return "sdxl-base"
    if has("cond_stage_model.transformer."):
        return "sd15"
    if has("cond_stage_model.model."):
        return "sd-turbo"
    raise CheckpointError(
        f"{file.name} holds a UNet and no text encoder that is read here",
        "there is neither conditioner.embedders.1.* (SDXL) nor cond_stage_model.* (SD)",
        "pass it as the UNet of a model: --model NAME --unet FILE",
    )


def has_part(shapes: dict[str, list[int]], part: str) -> bool:
    return any(key.startswith(PREFIXES.get(part, ())) for key in shapes)


def load_part(part: str, file: Path, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load one part's module by diffusers' single-file loader.

    Args:
        folder: with the config.json of the architecture.
    """
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from safetensors import safe_open

    component = COMPONENTS[part]
    cls: Any = getattr(importlib.import_module(component.library), component.cls)
    with safe_open(file, framework="pt") as opened:
        keys = list(opened.keys())
        starts = PREFIXES.get(part, ())
        own = [key for key in keys if key.startswith(starts)] or keys
        tensors = {key: opened.get_tensor(key) for key in own}
    try:
        with quiet_libraries():
            if component.library == "transformers":
                module = create_diffusers_clip_model_from_ldm(
                    cls, tensors, config=str(folder), torch_dtype=dtype, local_files_only=True
                )
            else:
                module = cls.from_single_file(
                    tensors, config=str(folder), torch_dtype=dtype, local_files_only=True
                )
    except Exception as error:  # another library's code on a stranger's file
        raise unfit(
            part, file, " ".join(str(error).split())[:300] or type(error).__name__
        ) from error
    missing = [name for name, value in module.named_parameters() if value.device.type == "meta"]
    if missing:
        raise unfit(part, file, f"{len(missing)} tensors are missing, the first: {missing[0]}")
    return module


def unfit(part: str, file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} does not hold the weights of a {COMPONENTS[part].cls}",
        why,
        "pass a file of the model that --model names",
    )
