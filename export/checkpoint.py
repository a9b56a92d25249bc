"""Where the weights come from: the hub, a folder in diffusers format, or random numbers.

Opening a checkpoint finds and checks files and imports neither torch nor diffusers;
`Checkpoint.module` loads one module at a time.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.files import read_json
from export.layout import (
    COMPONENTS,
    TOKENIZER_FILES,
    CheckpointError,
    Component,
    Stored,
    find_weights,
    pick_weights,
    read_config,
    require_pipeline,
)
from export.models import Model
from export.request import Place, make_request

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint", "reopen"]

ARCHITECTURES = Path(__file__).resolve().parent / "architectures"


@dataclass(frozen=True)
class Origin:
    """Where the module of one part is read from. `stored` None: random numbers of `seed`."""

    folder: Path
    stored: Stored | None
    seed: int = 0

    def config(self) -> dict[str, Any]:
        return read_config(self.folder)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        kind: "hub", "folder" or "random".
        source: for the manifest; enough to open the same again (see `reopen`).
        origins: part -> where its module is read from.
        root: the folder with scheduler and tokenizers.
    """

    model: Model
    kind: str
    source: dict[str, Any]
    origins: dict[str, Origin]
    root: Path

    def config(self, part: str) -> dict[str, Any]:
        """The diffusers or transformers config of the module that `part` is cut from."""
        return self.origins[part].config()

    def skeleton(self, part: str) -> nn.Module:
        """The module without weights: its parameters are on the meta device."""
        from accelerate import init_empty_weights

        component, config = COMPONENTS[part], self.config(part)
        cls = getattr(importlib.import_module(component.library), component.cls)
        with init_empty_weights():
            if component.library == "transformers":
                module = cls(cls.config_class.from_dict(config))
            else:
                module = cls.from_config(config)
        return module.eval()

    def module(self, part: str, dtype: torch.dtype) -> nn.Module:
        """Load the module that `part` is cut from, in eval mode. One copy, which the caller frees.

        Raises CheckpointError when weights are missing, of other shapes, or not finite in `dtype`.
        """
        origin = self.origins[part]
        if origin.stored is None:
            from export.random_weights import fill_random

            module = self.skeleton(part)
            fill_random(module, origin.seed, dtype)
            return module.requires_grad_(False)
        module = _load(COMPONENTS[part], origin.folder, origin.stored, dtype)
        _require_finite(module, origin)
        return module.eval().requires_grad_(False)

    def scheduler_config(self) -> dict[str, Any]:
        """The config of the scheduler, with the class and the spacing of the model's entry."""
        config: dict[str, Any] = read_json(self.root / "scheduler" / "scheduler_config.json")
        return config | {
            "_class_name": self.model.scheduler,
            "timestep_spacing": self.model.spacing,
        }

    def save_tokenizers(self, folder: Path) -> None:
        """Write `tokenizer/` and, for a second text encoder, `tokenizer_2/` into `folder`."""
        from export.tokenizer import save_tokenizer

        for name in tokenizer_names(self.model):
            if self.kind == "random":
                save_tokenizer(read_json(self.root / name / "tokenizer_config.json"), folder / name)
                continue
            (folder / name).mkdir()
            for file in TOKENIZER_FILES:
                if (self.root / name / file).is_file():
                    (folder / name / file).write_bytes((self.root / name / file).read_bytes())

    def tokenizers(self) -> list[Any]:
        """One transformers tokenizer for each text encoder."""
        import tempfile

        with tempfile.TemporaryDirectory() as scratch:
            self.save_tokenizers(Path(scratch))
            return load_tokenizers(self.model, Path(scratch))


def tokenizer_names(model: Model) -> tuple[str, ...]:
    return ("tokenizer", "tokenizer_2")[: len(model.text_encoders)]


def load_tokenizers(model: Model, folder: Path) -> list[Any]:
    from transformers import CLIPTokenizer

    return [CLIPTokenizer.from_pretrained(folder / name) for name in tokenizer_names(model)]


def _load(component: Component, folder: Path, stored: Stored, dtype: torch.dtype) -> nn.Module:
    from transformers.utils import logging as transformers_logging

    cls = getattr(importlib.import_module(component.library), component.cls)
    dtype_key = "dtype" if component.library == "transformers" else "torch_dtype"
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what is missing is looked at below
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
) -> Checkpoint:
    """Find a checkpoint, download what is missing, and check that its files are whole.

    Args:
        weights: "hub" (the model's own repository), "random", a hub id `org/name[@revision]`, or a
            folder in diffusers format.
        vae, taesd: hub id or folder of an autoencoder that replaces the one of the model's rule.
        allow_pickle: read .bin files where there is no safetensors; unpickling can run code.
        seed: of random weights.
        dtype: "fp16" or "fp32": which stored variant to prefer.

    Raises:
        CheckpointError: it cannot be had, or is not whole.
    """
    request = make_request(model, weights, vae, taesd, seed, allow_pickle)
    place, own_parts = request.weights, model.parts[:-2]
    reader = _Reader(dtype, allow_pickle)
    origins = {}
    if place.kind == "random":
        root = ARCHITECTURES / model.architecture
        origins = {part: Origin(root / COMPONENTS[part].folder, None, seed) for part in model.parts}
    else:
        root, place = reader.pipeline(place, model)
        for part in own_parts:
            origins[part] = reader.origin(root / COMPONENTS[part].folder, part)
    source: dict[str, Any] = asdict(place) | {"seed": request.seed, "allow_pickle": allow_pickle}
    for part, asked in (("vae_decoder", request.vae), ("taesd_decoder", request.taesd)):
        name = COMPONENTS[part].folder
        if asked is None and place.kind == "random":
            source[name] = asdict(Place("random"))
        else:
            default = model.vae if name == "vae" else model.taesd
            origins[part], used = reader.autoencoder(part, root, place, asked, default)
            source[name] = asdict(used)
    return Checkpoint(model, place.kind, source, origins, root)


@dataclass(frozen=True)
class _Reader:
    """Finds the files of a checkpoint: which variant, and whether pickles may be read."""

    dtype: str
    allow_pickle: bool

    def origin(self, folder: Path, part: str) -> Origin:
        return Origin(folder, find_weights(folder, part, self.dtype, self.allow_pickle))

    def pipeline(self, place: Place, model: Model) -> tuple[Path, Place]:
        """The folder of a checkpoint, downloaded if need be, and its place with the commit."""
        names = tokenizer_names(model)
        if place.kind == "hub":
            folders = {COMPONENTS[part].folder: part for part in model.parts[:-2]}
            small = ["model_index.json", "scheduler/*.json", "*/config.json"]
            small += [f"{name}/{file}" for name in names for file in TOKENIZER_FILES]
            root, place = self._fetch(place, folders, small, "--weights")
        else:
            root = Path(str(place.path))
        require_pipeline(root, names)
        return root, place

    def autoencoder(
        self, part: str, root: Path, place: Place, asked: Place | None, default: str | None
    ) -> tuple[Origin, Place]:
        """The autoencoder asked for; else the checkpoint's own; else the default of the model.

        A VAE whose config does not deny `force_upcast` overflows in FP16: the model's default comes
        before it.
        """
        name = COMPONENTS[part].folder
        own = root / name
        has_own = (own / "config.json").is_file()
        safe = name != "vae" or (has_own and not read_config(own).get("force_upcast", True))
        if asked is None and (default is None or (has_own and safe)):
            if place.kind == "hub":
                self._fetch(place, {name: part}, [f"{name}/config.json"], "--weights")
            return self.origin(own, part), Place("own")
        asked = asked or Place("hub", default)
        if asked.kind == "hub":
            small = ["config.json", f"{name}/config.json"]
            try:
                folder, asked = self._fetch(asked, {"": part, name: part}, small, f"--{name}")
            except CheckpointError as error:
                if not has_own:
                    raise
                next_step = f"{error.next}; or take the checkpoint's own: --{name} {own}"
                raise CheckpointError(error.what, error.why, next_step) from error
        else:
            folder = Path(str(asked.path))
        if not (folder / "config.json").is_file() and (folder / name).is_dir():
            folder = folder / name
        return self.origin(folder, part), asked

    def _fetch(
        self, place: Place, folders: dict[str, str], small: list[str], flag: str
    ) -> tuple[Path, Place]:
        from export.hub import fetch

        def choose(names: list[str]) -> list[str]:
            wanted = []
            for folder, part in folders.items():
                prefix = f"{folder}/" if folder else ""
                inside = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
                stem = COMPONENTS[part].stem
                stored = pick_weights(inside, stem, self.dtype, pickle=False)
                if stored is None and self.allow_pickle:
                    stored = pick_weights(inside, stem, self.dtype, pickle=True)
                wanted += [prefix + file for file in stored.files] if stored else []
            return wanted

        folder, commit = fetch(str(place.id), place.revision, small, choose, flag)
        return folder, Place("hub", place.id, commit)


def reopen(model: Model, source: dict[str, Any], dtype: str) -> Checkpoint:
    """Open again what a manifest's `source` names: the same files, or the same random numbers."""

    def spec(place: dict[str, Any]) -> str | None:
        return Place(**{key: place[key] for key in ("kind", "id", "revision", "path")}).spec

    return open_checkpoint(
        model,
        spec(source) or "random",
        vae=spec(source["vae"]),
        taesd=spec(source["taesd"]),
        allow_pickle=source["allow_pickle"],
        seed=source["seed"] or 0,
        dtype=dtype,
    )
