"""Diffusers folder format: where each module, its weights and the tokenizers lie, and if whole."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core.errors import AddbenchError, PreconditionError
from core.files import read_json

TOKENIZER_FILES = ("*.json", "*.txt")
"""All that transformers may read of a tokenizer's folder, learned tokens included."""
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""The names under which diffusers and PEFT save a LoRA."""


class CheckpointError(PreconditionError):
    """The checkpoint cannot be had, or is not what it should be."""


@dataclass(frozen=True)
class Component:
    """How diffusers format stores the module of a part."""

    folder: str
    library: Literal["transformers", "diffusers"]
    cls: str

    @property
    def stem(self) -> str:
        """How the names of the weights' files begin."""
        return "model" if self.library == "transformers" else "diffusion_pytorch_model"


COMPONENTS = {
    "text_encoder": Component("text_encoder", "transformers", "CLIPTextModel"),
    "text_encoder_2": Component("text_encoder_2", "transformers", "CLIPTextModelWithProjection"),
    "unet": Component("unet", "diffusers", "UNet2DConditionModel"),
    "vae_decoder": Component("vae", "diffusers", "AutoencoderKL"),
    "taesd_decoder": Component("taesd", "diffusers", "AutoencoderTiny"),
    "vae_encoder": Component("vae", "diffusers", "AutoencoderKL"),
    "taesd_encoder": Component("taesd", "diffusers", "AutoencoderTiny"),
}
"""part -> the module that it is cut from."""

FOLDERS = (
    *dict.fromkeys(part.folder for part in COMPONENTS.values()),
    *("scheduler", "tokenizer", "tokenizer_2"),
)
"""The folders of a whole checkpoint."""


@dataclass(frozen=True)
class Stored:
    """Weights files of one module: names in its folder, which variant, whether a pickle."""

    files: tuple[str, ...]
    variant: str | None
    pickle: bool


def pick_weights(
    names: Iterable[str], stem: str, prefer: str, pickle: bool, variant: str | None = None
) -> Stored | None:
    """The files that hold a module's weights, out of the `names` in its folder.

    Args:
        stem: `Component.stem`.
        prefer: "fp16" or "fp32"; the other one serves when this one is not there, and else the
            variant that is there.
        pickle: look for .bin files rather than safetensors.
        variant: the one to take, and no other; None for the rule.
    """
    ending = "bin" if pickle else "safetensors"
    if pickle and stem == "model":
        stem = "pytorch_model"
    # Shards of a variant have its name before the number (diffusers today) or after it.
    shard, word = r"-\d{5}-of-\d{5}", r"[A-Za-z][\w-]*?"
    pattern = re.compile(
        rf"{stem}(\.(?P<a>{word}))?({shard})?(\.(?P<b>{word}))?\.{ending}"
        rf"|{stem}\.{ending}\.index(\.(?P<c>{word}))?\.json"
    )
    held: dict[str | None, list[str]] = {}
    for name in sorted(names):
        if match := pattern.fullmatch(name):
            kind = match["a"] or match["b"] or match["c"]
            held.setdefault(kind, []).append(name)
    held = {k: v for k, v in held.items() if any(not name.endswith(".json") for name in v)}
    order = ("fp16", None) if prefer == "fp16" else (None, "fp16")
    wanted = (variant,) if variant else (*order, *sorted(kind for kind in held if kind))
    return next((Stored(tuple(held[k]), k, pickle) for k in wanted if k in held), None)


def find_weights(
    folder: Path, part: str, prefer: str, allow_pickle: bool, variant: str | None = None
) -> Stored:
    """The weights of one module in its local `folder`, checked to be there and whole."""
    component = COMPONENTS[part]
    read_config(folder)
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    stored = pick_weights(names, component.stem, prefer, False, variant)
    pickled = pick_weights(names, component.stem, prefer, True, variant)
    if stored is None and pickled is not None and not allow_pickle:
        raise CheckpointError(
            f"{folder} holds its weights as a pickle only: {pickled.files[0]}",
            "reading a pickle can run code that is in the file",
            "get the safetensors, or pass --allow-pickle if you trust where it is from",
        )
    stored = stored or pickled
    if stored is None:
        called = f"{component.stem}{f'.{variant}' if variant else ''}.safetensors"
        raise CheckpointError(
            f"{folder} holds no weights by a name that is read",
            f"that is {called}, in shards too; the folder holds {', '.join(names)}",
            f"call the file {called}" + (", or leave --variant out" if variant else ""),
        )
    for name in stored.files:
        if name.endswith(".safetensors"):
            require_whole(folder / name)
        shard = re.search(r"-of-(\d{5})\.", name)
        count = sum(not file.endswith(".json") for file in stored.files)
        if shard and int(shard[1]) != count:
            raise CheckpointError(
                f"{folder} holds {count} of {int(shard[1])} files of its weights",
                f"beside {name} some are missing",
                "download the checkpoint again",
            )
    return stored


def require_whole(file: Path) -> None:
    """A safetensors file says in its header how long it is: a cut or foreign one is an error."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            return
    except (SafetensorError, OSError) as error:
        why = str(error)
    with file.open("rb") as start:
        if start.read(20).startswith(b"version https://git"):
            why = "it is a Git LFS pointer, not the file it points to (git lfs pull gets it)"
    raise CheckpointError(f"{file} is not a whole safetensors file", why, "download it again")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of one module's folder."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is missing" if not folder.is_dir() else f"{folder} has no config.json",
            "a checkpoint in diffusers format has a folder with a config.json for each part",
            "download the checkpoint again, or pass the folder that holds its model_index.json",
        )
    return read_object(folder / "config.json")


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object that a file of a checkpoint holds."""
    try:
        value = read_json(file)
    except AddbenchError as error:
        raise CheckpointError(error.what, error.why, "download the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file} does not hold a JSON object",
            f"it holds a {type(value).__name__}",
            "correct the file, or download the checkpoint again",
        )
    return value


def require_pipeline(root: Path, tokenizers: Iterable[str]) -> None:
    """The scheduler's and the tokenizers' files are in a checkpoint's folder."""
    wanted: dict[str, tuple[str, ...]] = {"scheduler": ("scheduler_config.json",)}
    wanted |= {name: ("tokenizer.json", "vocab.json") for name in tokenizers}
    for name, files in wanted.items():
        if not any((root / name / file).is_file() for file in files):
            raise CheckpointError(
                f"{root / name} is missing or empty",
                f"it should hold {' or '.join(files)}",
                "download the checkpoint again, or pass the folder that holds its model_index.json",
            )
