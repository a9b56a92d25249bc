"""What a checkpoint's JSON says, held against what is read: a key with an effect is not dropped.

diffusers' pipelines, models and schedulers act on the arguments of their classes and on a few keys
beside them. Those of the models act inside the modules, which are exported as they are. The rest is
listed here: a key that would change the image and is not followed is refused by its name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from export.models import PICTURE_PARTS, Model
from export.source.layout import COMPONENTS, CheckpointError

SD, SDXL, LCM = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "LatentConsistencyModelPipeline",
)
IGNORED_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of a pipeline that judge an image, or read one that is put in; none of them draws."""
INDEX_SETTINGS = ("force_zeros_for_empty_prompt", "requires_safety_checker")

NEEDS_INPUT = "the UNet would take another input, which no prompt gives"
REFUSED: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "unet": {
        "class_embed_type": ((None,), NEEDS_INPUT),
        "num_class_embeds": ((None,), NEEDS_INPUT),
        "encoder_hid_dim_type": ((None,), NEEDS_INPUT),
        "encoder_hid_dim": ((None,), NEEDS_INPUT),
        "addition_embed_type": ((None, "text_time"), NEEDS_INPUT),
        "dual_cross_attention": ((None, False), NEEDS_INPUT),
    },
    "vae_decoder": {
        "shift_factor": (
            (None, 0, 0.0),
            "diffusers' pipelines of this form do not read it: which image is meant is not clear",
        ),
        "out_channels": ((3,), "an image has three channels"),
        "in_channels": ((3,), "a picture has three channels"),
    },
    "taesd_decoder": {
        "upsampling_scaling_factor": ((2,), "it decodes to another size than the VAE"),
        "out_channels": ((3,), "an image has three channels"),
        "in_channels": ((3,), "a picture has three channels"),
    },
    "text_encoder": {"use_attention_mask": ((None, False), "padding is not masked here")},
}
"""part -> key -> the values that are read, and why no other is."""
UNSET: tuple[Any, ...] = (None, False, 0, "", [], {})
"""What a key that nothing reads may hold without having been set."""


def refusal(where: str, key: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {key} is {value!r}, which is not read here",
        why,
        f"use a checkpoint without it; if it has no effect, take {key} out of the file",
    )


def require_readable(part: str, config: Mapping[str, Any], pipeline: str) -> None:
    """Refuse the config of a part whose keys ask for what is not done.

    Args:
        pipeline: the diffusers pipeline class that the checkpoint is for.
    """
    component = COMPONENTS[part]
    where = f"{component.folder}/config.json"
    if part in PICTURE_PARTS:  # in the same file as the decoder
        part = part.replace("encoder", "decoder")
    refused = dict(REFUSED.get("text_encoder" if part.startswith("text") else part, {}))
    if part == "vae_decoder" and pipeline != SDXL:
        for key in ("latents_mean", "latents_std"):
            refused[key] = ((None,), f"{pipeline} of diffusers does not read it")
    for key, (values, why) in refused.items():
        if key in config and config[key] not in values:
            raise refusal(where, key, config[key], why)
    require_known(where, config, component_keys(part), component.cls)


def require_known(where: str, config: Mapping[str, Any], keys: frozenset[str], cls: str) -> None:
    for key, value in config.items():
        if not (key in keys or key.startswith("_") or value in UNSET):
            raise refusal(where, key, value, f"{cls} of the installed library knows no such key")


def component_keys(part: str) -> frozenset[str]:
    """Keys that the config of a part may have: what its class takes."""
    component = COMPONENTS[part]
    cls: Any = getattr(importlib.import_module(component.library), component.cls)
    if component.library == "diffusers":
        own = {"block_out_channels", "force_upcast"}  # AutoencoderTiny writes both beside these
        return frozenset(inspect.signature(cls.__init__).parameters) | own
    import transformers

    # Before transformers 5 a model's config held the settings of text generation too.
    return frozenset(
        {
            *cls.config_class().to_dict(),
            *transformers.GenerationConfig().to_dict(),
            *("torch_dtype", "torchscript", "use_bfloat16", "dropout", "tie_word_embeddings"),
            *("is_decoder", "add_cross_attention", "tie_encoder_decoder", "pruned_heads"),
            "use_cache",
        }
    )


def require_scheduler_keys(config: Mapping[str, Any]) -> None:
    """Refuse a scheduler's config with a key that no scheduler of diffusers has."""
    import diffusers

    keys = {"scale_model_input"}
    for name in dir(diffusers.schedulers):
        cls: Any = getattr(diffusers, name, None)
        if name.endswith("Scheduler") and isinstance(cls, type):
            keys |= set(inspect.signature(cls).parameters)
    where = "scheduler/scheduler_config.json"
    require_known(where, config, frozenset(keys), str(config.get("_class_name")))


def pipeline_class(model: Model, index: Mapping[str, Any]) -> str:
    """The diffusers pipeline that a checkpoint is for: what its index names, else by its form."""
    own = SDXL if model.pooled else SD
    named = index.get("_class_name")
    if named is None:
        return own
    allowed = (SDXL,) if model.pooled else (SD, LCM)
    if named in allowed:
        return str(named)
    raise CheckpointError(
        f"model_index.json: _class_name is {named!r}, which is not read here",
        f"a checkpoint of this form draws from text alone with {' or '.join(allowed)}",
        "pass a checkpoint that draws from text, or correct _class_name in model_index.json",
    )


def index_class(index: Mapping[str, Any], name: str) -> str | None:
    """The class that model_index.json names for a component; None where it names none."""
    entry = index.get(name)
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
        return entry[1]
    return None


def require_index(model: Model, index: Mapping[str, Any]) -> None:
    """Refuse an index that names other classes or components than those that are read here."""
    expected: dict[str, tuple[str, ...]] = {
        COMPONENTS[part].folder: (COMPONENTS[part].cls,) for part in model.parts
    }
    for name in ("tokenizer", "tokenizer_2")[: len(model.text_encoders)]:
        expected[name] = ("CLIPTokenizer", "CLIPTokenizerFast")
    if not index:
        return
    for name, value in index.items():
        where = "model_index.json"
        if name.startswith("_") or name in (*INDEX_SETTINGS, *IGNORED_COMPONENTS, "scheduler"):
            continue
        if name in expected:
            named = index_class(index, name)
            if named not in (None, *expected[name]):
                raise refusal(where, name, named, f"{' or '.join(expected[name])} is")
        elif name == "add_watermarker" and value:
            raise refusal(where, name, value, "diffusers would draw a mark into every image")
        elif value not in (*UNSET, [None, None]):
            raise refusal(where, name, value, "the pipelines of this form have no such component")
