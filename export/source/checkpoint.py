"""Where the weights come from: the hub, a folder in diffusers format, or random numbers.

Opening a checkpoint finds and checks files and imports neither torch nor diffusers;
`Checkpoint.module` loads one module at a time.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.files import read_json
from export.models import Model
from export.request import LoraPlace, Place, Request, find_place, make_request
from export.source.layout import COMPONENTS, TOKENIZER_FILES, CheckpointError, Component, Stored
from export.source.reader import Origin, Reader, tokenizer_names

if TYPE_CHECKING:
    import torch
    from torch import nn

    from export.source.lora import Lora

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint", "reopen", "tokenizer_names"]

ARCHITECTURES = Path(__file__).resolve().parent.parent / "architectures"


def architecture(model: Model, name: str) -> Path:
    """A component's configs of a model; what its architecture lacks, one that it is like has."""
    places = [ARCHITECTURES / folder / name for folder in (model.architecture, *model.like)]
    return next((place for place in places if place.exists()), places[0])


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        kind: "hub", "folder" or "random".
        source: for the manifest; enough to open the same again (see `reopen`).
        origins: part -> where its module is read from.
        root: the folder with scheduler and tokenizers.
        loras: weights that are fused into the modules as they are loaded.
    """

    model: Model
    kind: str
    source: dict[str, Any]
    origins: dict[str, Origin]
    root: Path
    loras: tuple[Lora, ...] = ()

    def find(self, name: str) -> Path:
        """A file or folder of the checkpoint that is no part's."""
        return architecture(self.model, name) if self.kind == "random" else self.root / name

    def config(self, part: str) -> dict[str, Any]:
        """The diffusers or transformers config of the module that `part` is cut from."""
        return self.origins[part].config()

    def skeleton(self, part: str) -> nn.Module:
        """The module without weights: its parameters are on the meta device."""
        from accelerate import init_empty_weights

        with init_empty_weights():
            return self.construct(part)

    def construct(self, part: str) -> nn.Module:
        """The module as its class makes it, in eval mode."""
        component, config = COMPONENTS[part], self.config(part)
        cls = getattr(importlib.import_module(component.library), component.cls)
        if component.library == "transformers":
            module = cls(cls.config_class.from_dict(config))
        else:
            module = cls.from_config(config)
        return module.eval()

    def module(self, part: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
        """Load the module that `part` is cut from, in eval mode. One copy, which the caller frees.

        Args:
            device: where it goes at the end, through the host's memory.

        Raises CheckpointError when weights are missing, of other shapes, or not finite in `dtype`.
        """
        origin = self.origins[part]
        if origin.stored is None:
            from export.source.random_weights import fill_random

            module = self.skeleton(part)
            fill_random(module, origin.seed, dtype)
        elif origin.file is not None:
            module = self.skeleton(part)
            _fill(module, origin.file, dtype)
        else:
            module = _load(COMPONENTS[part], origin.folder, origin.stored, dtype)
        module = module.eval().requires_grad_(False)
        for lora in self.loras:
            # Random weights are FP16 numbers in every dtype; they stay so.
            lora.fuse(part, module, self.config("unet"), half=origin.stored is None)
        if origin.stored is not None or self.loras:
            _require_finite(module, origin)
        return module.to(device)

    @property
    def multiple(self) -> int:
        """Pixels that the sides of an image are multiples of: what VAE and UNet halve."""
        blocks = [self.config(part).get("block_out_channels") for part in ("vae_decoder", "unet")]
        # diffusers' defaults: one block in the VAE, four in the UNet.
        halvings = len(blocks[0] or [64]) + len(blocks[1] or [320] * 4) - 2
        return int(2**halvings)

    def scheduler_config(self) -> dict[str, Any]:
        """The config of the scheduler, with what the model's entry says of it."""
        config: dict[str, Any] = read_json(self.find("scheduler") / "scheduler_config.json")
        entry = {
            "_class_name": self.model.scheduler,
            "timestep_spacing": self.model.spacing,
            "prediction_type": self.model.prediction,
        }
        return config | {key: value for key, value in entry.items() if value}

    @property
    def force_zeros(self) -> bool:
        """Whether an empty prompt's embeddings are zeros, as diffusers' SDXL pipeline reads it."""
        index = self.find("model_index.json")
        known = read_json(index) if index.is_file() else {}
        return self.model.pooled and bool(known.get("force_zeros_for_empty_prompt", True))

    def save_tokenizers(self, folder: Path) -> None:
        """Write `tokenizer/` and, for a second text encoder, `tokenizer_2/` into `folder`."""
        from export.source.tokenizer import save_tokenizer

        for name in tokenizer_names(self.model):
            source = self.find(name)
            if self.kind == "random" and not (source / "tokenizer.json").is_file():
                save_tokenizer(read_json(source / "tokenizer_config.json"), folder / name)
                continue
            (folder / name).mkdir()
            for file in TOKENIZER_FILES:
                if (source / file).is_file():
                    shutil.copyfile(source / file, folder / name / file)

    def tokenizers(self) -> list[Any]:
        """One transformers tokenizer for each text encoder."""
        import tempfile

        with tempfile.TemporaryDirectory() as scratch:
            self.save_tokenizers(Path(scratch))
            return load_tokenizers(self.model, Path(scratch))


def load_tokenizers(model: Model, folder: Path) -> list[Any]:
    from transformers import CLIPTokenizer

    return [CLIPTokenizer.from_pretrained(folder / name) for name in tokenizer_names(model)]


def _load(component: Component, folder: Path, stored: Stored, dtype: torch.dtype) -> nn.Module:
    cls = getattr(importlib.import_module(component.library), component.cls)
    logging = importlib.import_module(f"{component.library}.utils.logging")
    dtype_key = "dtype" if component.library == "transformers" else "torch_dtype"
    logging.disable_progress_bar()
    # What is missing is looked at below; diffusers warns of a key that it wrote itself.
    logging.set_verbosity_error()
    try:
        module, info = cls.from_pretrained(
            folder,
            variant=stored.variant,
            use_safetensors=not stored.pickle,
            local_files_only=True,
            output_loading_info=True,
            **{dtype_key: dtype},
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded as {component.cls}",
            str(error).strip().splitlines()[0],
            "download the checkpoint again, or check that its config.json fits its weights",
        ) from error
    missing = sorted([*info["missing_keys"], *map(str, info.get("mismatched_keys", ()))])
    if missing:
        raise CheckpointError(
            f"{folder} lacks weights that its config.json asks for",
            f"{len(missing)} tensors are missing or of another shape, the first: {missing[0]}",
            "download the checkpoint again, or check that its config.json fits its weights",
        )
    return module


def _fill(module: nn.Module, file: Path, dtype: torch.dtype) -> None:
    """Give `module` (on the meta device) the weights of one file, which must be exactly its own."""
    from safetensors.torch import load_file

    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file} does not hold the weights of {type(module).__name__}",
            reason,
            "pass a file of the model that --model names",
        ) from error


def _require_finite(module: nn.Module, origin: Origin) -> None:
    import torch

    for name, parameter in module.named_parameters():
        low, high = torch.aminmax(parameter)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(
                f"{origin.folder}: the weights {name!r} are not finite in {parameter.dtype}",
                "the file holds inf or NaN, or numbers beyond what FP16 can hold (65504)",
                "download the checkpoint again, or export with --dtype fp32",
            )


def open_checkpoint(
    model: Model,
    weights: str = "hub",
    *,
    vae: str | None = None,
    taesd: str | None = None,
    allow_pickle: bool = False,
    seed: int = 0,
    dtype: str = "fp16",
    unet: str | None = None,
    loras: Sequence[str] = (),
) -> Checkpoint:
    """Find a checkpoint, download what is missing, and check that its files are whole.

    Args:
        weights: "hub" (the model's own repository), "folder" (the one that ships with the
            checkout), "random", a hub id `org/name[@revision]`, or a folder in diffusers format.
        vae, taesd: hub id or folder of an autoencoder that replaces the one of the model's rule.
        allow_pickle: read .bin files where there is no safetensors; unpickling can run code.
        seed: of random weights.
        dtype: "fp16" or "fp32": which stored variant to prefer.
        unet: hub id, folder or file of a UNet that replaces the one of the model's rule.
        loras: `FILE[:WEIGHT]` or hub ids; fused into the modules in this order.

    Raises:
        CheckpointError: it cannot be had, or is not whole.
    """
    return open_request(
        model, make_request(model, weights, vae, taesd, seed, allow_pickle, unet, loras), dtype
    )


def open_request(model: Model, request: Request, dtype: str) -> Checkpoint:
    """`open_checkpoint` of what was asked for in its own form."""
    place, asked_unet = request.weights, request.unet
    reader = Reader(dtype, request.allow_pickle)
    if asked_unet is None and model.unet and (place.kind, place.id) == ("hub", model.checkpoint):
        asked_unet = find_place(model.unet, "--unet", files=True)
    elif asked_unet is None and model.unet and place.kind != "random":
        raise CheckpointError(
            f"{model.name} is a UNet over the rest of {model.checkpoint}, and none was passed",
            f"the UNet in {place.path or place.id} would be taken for it: where the two have the"
            " same shapes, nobody would see",
            f"pass it too: --unet {model.unet}, or a folder or file of it",
        )
    origins = {}
    if place.kind == "random":
        root, seed = ARCHITECTURES / model.architecture, request.seed or 0
        for part in model.parts:
            origins[part] = Origin(architecture(model, COMPONENTS[part].folder), None, seed)
    else:
        root, place = reader.pipeline(place, model, without="unet" if asked_unet else None)
        for part in model.parts[:-2]:
            if asked_unet is None or part != "unet":
                origins[part] = reader.origin(root / COMPONENTS[part].folder, part)
    source: dict[str, Any] = asdict(place) | {
        "seed": request.seed,
        "allow_pickle": request.allow_pickle,
    }
    if asked_unet is not None:
        config = origins["unet"].folder if place.kind == "random" else root / "unet"
        origins["unet"], used = reader.unet(config, asked_unet)
        source["unet"] = asdict(used)
    loras = [reader.lora(lora) for lora in request.loras]
    if loras:
        # By the name that was asked for: many repositories call their file the same.
        source["loras"] = [
            used.as_dict() | {"name": lora.name}
            for lora, (_, used) in zip(request.loras, loras, strict=True)
        ]
    for part, asked in (("vae_decoder", request.vae), ("taesd_decoder", request.taesd)):
        name = COMPONENTS[part].folder
        if asked is None and place.kind == "random":
            source[name] = asdict(Place("random"))
        else:
            default = model.vae if name == "vae" else model.taesd
            origins[part], used = reader.autoencoder(part, root, place, asked, default)
            source[name] = asdict(used)
    return Checkpoint(model, place.kind, source, origins, root, tuple(lora for lora, _ in loras))


def reopen(model: Model, source: dict[str, Any], dtype: str) -> Checkpoint:
    """Open again what a manifest's `source` names: the same files, or the same random numbers."""

    def other(name: str) -> Place | None:
        place = Place.of(source[name]) if source.get(name) else None
        return None if place is None or place.kind in ("own", "random") else place

    loras = (LoraPlace(Place.of(lora["place"]), lora["weight"]) for lora in source.get("loras", ()))
    request = Request(
        weights=Place.of(source),
        vae=other("vae"),
        taesd=other("taesd"),
        seed=source["seed"],
        allow_pickle=source["allow_pickle"],
        unet=other("unet"),
        loras=tuple(loras),
    )
    return open_request(model, request, dtype)
