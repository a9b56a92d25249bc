"""Where the weights come from: the hub, a folder in diffusers format, or random numbers.

Opening a checkpoint finds and checks files and imports neither torch nor diffusers;
`Checkpoint.module` loads one module at a time.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.files import read_json
from export.models import PICTURE_PARTS, Model
from export.request import (
    EmbeddingPlace,
    ExportRequest,
    LoraPlace,
    Place,
    find_place,
    length,
    make_request,
)
from export.source.configs import (
    index_class,
    pipeline_class,
    require_index,
    require_readable,
    require_scheduler_keys,
)
from export.source.layout import (
    COMPONENTS,
    TOKENIZER_FILES,
    CheckpointError,
    Component,
    Stored,
    read_object,
)
from export.source.quiet import quiet_libraries
from export.source.reader import Origin, Reader, tokenizer_names
from export.source.scheduler import ResolvedScheduler, resolve_scheduler
from export.source.single_file import has_part, shapes_of, tell_architecture
from export.source.taesd import both_halves

if TYPE_CHECKING:
    import torch
    from torch import nn

    from export.source.embedding import Embedding
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
        embeddings: learned vectors that are put into the text encoders as they are loaded.
    """

    model: Model
    kind: str
    source: dict[str, Any]
    origins: dict[str, Origin]
    root: Path
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    remarks: tuple[str, ...] = ()
    tokenizer_root: Path | None = None

    @property
    def is_single(self) -> bool:
        """Whether it is one file, whose configs and tokenizers are those of the model's entry."""
        return self.tokenizer_root is not None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that there are, encoders included: TAESD may be out of reach."""
        return tuple(part for part in (*self.model.parts, *PICTURE_PARTS) if part in self.origins)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how the checkpoint is read."""
        return (*self.remarks, *self.scheduler.notes)

    def find(self, name: str) -> Path:
        """A file or folder of the checkpoint that is no part's."""
        if self.kind == "random" or self.is_single:
            return architecture(self.model, name)
        return self.root / name

    def config(self, part: str) -> dict[str, Any]:
        """The diffusers or transformers config of the module that `part` is cut from."""
        return self.origins[part].config()

    def skeleton(self, part: str) -> nn.Module:
        """The module without weights, learned tokens included: it is on the meta device."""
        module = self.construct_bare(part)
        self._extend(part, module)
        return module

    def construct_bare(self, part: str) -> nn.Module:
        """The module on the meta device, as its config has it."""
        from accelerate import init_empty_weights

        with init_empty_weights():
            return self.construct(part)

    def construct(self, part: str) -> nn.Module:
        """The module as its class makes it, in eval mode."""
        component, config = COMPONENTS[part], self.config(part)
        cls = getattr(importlib.import_module(component.library), component.cls)
        try:
            with quiet_libraries():
                if component.library == "transformers":
                    return cls(cls.config_class.from_dict(config)).eval()
                return cls.from_config(config).eval()
        except Exception as error:  # the class judges its own settings, by errors of any kind
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(
                f"{self.origins[part].folder / 'config.json'} is no config of a {component.cls}",
                reason,
                "correct the file, or download the checkpoint again",
            ) from error

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
            module = self.construct_bare(part)
            if not _fill(module, origin.file, dtype):
                from export.source.single_file import load_part

                module = load_part(part, origin.file, origin.folder, dtype)
        else:
            module = _load(COMPONENTS[part], origin.folder, origin.stored, dtype)
        module = module.eval().requires_grad_(False)
        for lora in self.loras:
            # Random weights are FP16 numbers in every dtype; they stay so.
            lora.fuse(part, module, self.config("unet"), half=origin.stored is None)
        if origin.stored is not None:  # random weights are filled into a whole skeleton
            self._extend(part, module)
        if origin.stored is not None or self.loras:
            _require_finite(module, origin)
        return module.to(device)

    def _extend(self, part: str, module: nn.Module) -> None:
        """Put the learned vectors of a text encoder where its tokenizer has their tokens."""
        vectors = [e.vectors[part] for e in self.embeddings if part in e.vectors]
        if not vectors or not part.startswith("text_encoder"):
            return
        import torch

        from export.source.embedding import extend

        tokenizer = self.tokenizers()[0 if part == "text_encoder" else 1]
        extend(module, torch.cat(vectors), len(tokenizer))

    @property
    def multiple(self) -> int:
        """Pixels along one side of a latent: what the sides of an image are multiples of."""
        # diffusers' default is one block.
        vae = self.config("vae_decoder")
        return int(2 ** (length(vae.get("block_out_channels"), 1) - 1))

    @property
    def index(self) -> dict[str, Any]:
        """What model_index.json holds; empty where there is none."""
        file = self.find("model_index.json")
        return read_object(file) if file.is_file() else {}

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline class that the checkpoint is for."""
        return pipeline_class(self.model, self.index)

    @property
    def scheduler(self) -> ResolvedScheduler:
        """The scheduler's config, with what the model's entry says of it."""
        stored = read_object(self.find("scheduler") / "scheduler_config.json")
        named = index_class(self.index, "scheduler")
        resolved = resolve_scheduler(self.model, stored, named, self.pipeline_class)
        # An architecture of our own has no other opinion than its entry.
        return resolved if self.kind != "random" else replace(resolved, notes=())

    def scheduler_config(self) -> dict[str, Any]:
        return self.scheduler.config

    @property
    def force_zeros(self) -> bool:
        """Whether an empty prompt's embeddings are zeros, as diffusers' SDXL pipeline reads it."""
        return self.model.pooled and bool(self.index.get("force_zeros_for_empty_prompt", True))

    def require_readable(self) -> None:
        """Refuse what the JSON of the checkpoint asks for and is not done, by the key's name."""
        require_index(self.model, self.index)
        for part in self.parts:
            require_readable(part, self.config(part), self.pipeline_class)
        require_scheduler_keys(self.scheduler_config())

    def save_tokenizers(self, folder: Path) -> None:
        """Write `tokenizer/` and, for a second text encoder, `tokenizer_2/` into `folder`."""
        from export.source.tokenizer import save_tokenizer

        for name, part in zip(tokenizer_names(self.model), ENCODERS, strict=False):
            source = (self.tokenizer_root or self.root) / name
            if self.kind == "random":
                source = self.find(name)
            if (self.kind == "random" or self.is_single) and not (
                source / "tokenizer.json"
            ).is_file():
                save_tokenizer(read_json(source / "tokenizer_config.json"), folder / name)
            else:
                (folder / name).mkdir()
                for pattern in TOKENIZER_FILES:
                    for file in source.glob(pattern):
                        shutil.copyfile(file, folder / name / file.name)
            tokens = [token for each in self.embeddings for token in each.tokens(part)]
            if tokens:
                tokenizer = open_tokenizer(folder / name)
                taken = sorted(set(tokens) & set(tokenizer.get_vocab()))
                if taken:
                    raise CheckpointError(
                        f"--embedding: the token {taken[0]} is there already",
                        f"{source} has it",
                        f"give it another name: --embedding FILE:{taken[0]}-2",
                    )
                tokenizer.add_tokens(tokens)
                tokenizer.save_pretrained(folder / name)

    def tokenizers(self) -> list[Any]:
        """One transformers tokenizer for each text encoder."""
        with tempfile.TemporaryDirectory() as scratch:
            self.save_tokenizers(Path(scratch))
            return load_tokenizers(self.model, Path(scratch))

    def require_tokenizers(self, rows: Sequence[int]) -> None:
        """Check that what a bundle will hold gives the ids that the checkpoint's own files give.

        Args:
            rows: of the text encoders' tables of tokens.
        """
        names = tokenizer_names(self.model)
        for name, tokenizer, count in zip(names, self.tokenizers(), rows, strict=True):
            place = (self.tokenizer_root or self.root) / name
            if len(tokenizer) > count:
                raise CheckpointError(
                    f"{place} has {len(tokenizer)} tokens and its text encoder {count} vectors",
                    "a prompt with one of the last tokens would have no vector",
                    "pass a checkpoint whose tokenizer and text encoder belong to each other",
                )
            if tokenizer.model_max_length < 1_000_000 and tokenizer.model_max_length != TOKENS:
                raise CheckpointError(
                    f"{place / 'tokenizer_config.json'}: model_max_length is"
                    f" {tokenizer.model_max_length}",
                    f"prompts are {TOKENS} tokens long here, as CLIP was trained",
                    f"set it to {TOKENS}, or pass another checkpoint",
                )
            trained = not any((place / file).is_file() for file in ("tokenizer.json", "vocab.json"))
            if trained or self.embeddings:
                continue
            own = open_tokenizer(place)
            own.model_max_length = tokenizer.model_max_length = (
                10**6
            )  # no warning of the long probe
            added = [str(token) for token in own.get_added_vocab()]
            for text in (*PROBES, *added, *(f"a {token}, in the rain" for token in added)):
                if own(text)["input_ids"] != tokenizer(text)["input_ids"]:
                    raise CheckpointError(
                        f"{place} cannot be carried into a bundle",
                        f"its copy reads {text!r} as other tokens",
                        "save it again with transformers (tokenizer.save_pretrained)",
                    )


ENCODERS = ("text_encoder", "text_encoder_2")
TOKENS = 77
"""Length of a CLIP prompt in tokens."""
PROBES = (
    "", "a lighthouse at dusk, long exposure", "EMPHASIS  and   spaces", "naïve café, 東京, 🙂",
    "it's (very:1.3) [blue] <lora:x:1>", "word " * 90,
)  # fmt: skip
"""Texts on which a copied tokenizer is held against its source."""


def open_tokenizer(folder: Path) -> Any:
    """Open a CLIP tokenizer from its own folder.

    Raises:
        CheckpointError: transformers cannot read it, or it lacks its merges.
    """
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder} is no tokenizer: {name} is missing",
                    "without tokenizer.json, vocab.json and merges.txt make one together",
                    "download the checkpoint's tokenizer again",
                )
    try:
        with quiet_libraries():
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # another library's code on a stranger's files
        raise CheckpointError(
            f"{folder} cannot be opened as a CLIP tokenizer",
            " ".join(str(error).split())[:300] or type(error).__name__,
            "download the checkpoint's tokenizer again",
        ) from error


def load_tokenizers(model: Model, folder: Path) -> list[Any]:
    return [open_tokenizer(folder / name) for name in tokenizer_names(model)]


def _load(component: Component, folder: Path, stored: Stored, dtype: torch.dtype) -> nn.Module:
    cls = getattr(importlib.import_module(component.library), component.cls)
    dtype_key = "dtype" if component.library == "transformers" else "torch_dtype"
    try:
        with quiet_libraries():  # what is missing is looked at below
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


def _fill(module: nn.Module, file: Path, dtype: torch.dtype) -> bool:
    """Give `module` (on the meta device) the weights of a file; False when it has other names."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    from export.source.single_file import PREFIXES, unfit

    part = next(p for p, c in COMPONENTS.items() if c.cls == type(module).__name__)
    tensors = both_halves(file) if part == "taesd_decoder" else None
    if tensors is None:
        with safe_open(file, framework="numpy") as opened:
            names = set(opened.keys())
        starts = tuple(start for each in PREFIXES.values() for start in each)
        starts += ("encoder.down.", "decoder.up.")  # a VAE that is alone in its file
        if not set(module.state_dict()) & names or any(name.startswith(starts) for name in names):
            return False
        tensors = load_file(file)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise unfit(part, file, " ".join(str(error).split())[:300]) from error
    return True


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
    embeddings: Sequence[str] = (),
    variant: str | None = None,
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
        embeddings: `FILE[:TOKEN]` or hub ids of learned vectors.
        variant: of the weights' files, as in diffusers; None for the one of `dtype`, else any.

    Raises:
        CheckpointError: it cannot be had, or is not whole.
    """
    request = make_request(
        model, weights, vae, taesd, seed, allow_pickle, unet, loras, embeddings, variant
    )
    return open_request(model, request, dtype)


def open_request(model: Model, request: ExportRequest, dtype: str) -> Checkpoint:
    """`open_checkpoint` of what was asked for in its own form."""
    place, asked_unet = request.weights, request.unet
    model = replace(model, clip_skip=request.clip_skip)
    reader, notes = Reader(dtype, request.allow_pickle, request.variant), list[str]()
    if asked_unet is None and model.unet and (place.kind, place.id) == ("hub", model.checkpoint):
        asked_unet = find_place(model.unet, "--unet", files=True)
    elif asked_unet is None and model.unet and place.kind != "random":
        raise CheckpointError(
            f"{model.name} is a UNet over the rest of {model.checkpoint}, and none was passed",
            f"the UNet in {place.path or place.id} would be taken for it: where the two have the"
            " same shapes, nobody would see",
            f"pass it too: --unet {model.unet}, or a folder or file of it",
        )
    origins: dict[str, Origin] = {}
    tokenizer_root = None
    if place.kind == "file" or (place.kind == "hub" and place.file):
        file, place = reader.file(place, "--weights")
        root = ARCHITECTURES / model.architecture
        shapes = shapes_of(file)
        for part in model.parts:
            if has_part(shapes, part):
                stored = Stored((file.name,), None, False)
                folder = architecture(model, COMPONENTS[part].folder)
                origins[part] = Origin(folder, stored, file=file)
        lacking = [
            p
            for p in model.parts[:-1]
            if p not in origins and (p != "vae_decoder" or not request.vae)
        ]
        if lacking:
            raise CheckpointError(
                f"{file} holds no {lacking[0]} of a {model.name} under its original names",
                f"it holds {len(shapes)} tensors, the first {next(iter(shapes), 'nothing')}",
                "pass a file of the model that --model names, or --unet FILE for a UNet alone",
            )
        told = tell_architecture(file)
        notes.append(f"{file.name} is of the architecture of {told}, by its keys")
        tokenizer_root = reader.tokenizers(model, root)
    elif place.kind == "random":
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
        "variant": request.variant,
    }
    if request.clip_skip:
        source["clip_skip"] = request.clip_skip
    if asked_unet is not None:
        config = origins["unet"].folder if "unet" in origins else root / "unet"
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
            continue
        if asked is None and part in origins:  # in the same file
            source[name] = asdict(Place("own"))
            continue
        default = model.vae if name == "vae" else model.taesd
        config = root / name if (root / name).is_dir() else architecture(model, name)
        try:
            origins[part], used = reader.autoencoder(part, root, place, asked, default, config)
        except CheckpointError as error:
            if (
                name == "vae"
                or asked is not None
                or ((root / name).is_dir() and tokenizer_root is None)
            ):
                raise
            # An extra of ours: the checkpoint has none, and the model's usual one is out of reach.
            reason = "the file holds none" if tokenizer_root is not None else error.what
            notes.append(f"there is no taesd decoder ({reason}): --taesd PATH would add one")
            source[name] = None
        else:
            source[name] = asdict(used)
    if request.clip_skip:
        require_layers(model, origins)
    # 512 is transformers' default.
    widths = [int(origins[part].config().get("hidden_size", 512)) for part in model.parts[:-3]]
    embeddings = [reader.embedding(embedding, widths) for embedding in request.embeddings]
    for part in PICTURE_PARTS:  # of the decoder's own module
        if (decoder := part.replace("encoder", "decoder")) in origins:
            origins[part] = origins[decoder]
    if embeddings:
        source["embeddings"] = [
            used.as_dict() | {"name": embedding.name}
            for embedding, (_, used) in zip(request.embeddings, embeddings, strict=True)
        ]
    return Checkpoint(
        model,
        "folder" if place.kind == "file" else place.kind,
        source,
        origins,
        root,
        tuple(lora for lora, _ in loras),
        tuple(embedding for embedding, _ in embeddings),
        tuple(notes),
        tokenizer_root,
    )


def require_layers(model: Model, origins: dict[str, Origin]) -> None:
    """Refuse a `clip_skip` that leaves a text encoder no layer to take.

    Raises:
        CheckpointError: it does.
    """
    for part, form in zip(model.parts, model.text_encoders, strict=False):
        layers = int(origins[part].config().get("num_hidden_layers", 12))  # transformers' default
        most = layers - 1 - (form == "penultimate")
        if model.clip_skip > most:
            raise CheckpointError(
                f"--clip-skip {model.clip_skip} leaves no layer of {part}",
                f"it has {layers}, and the pipeline reads the"
                f" {'last but one' if form == 'penultimate' else 'last'} without it",
                f"pass --clip-skip {most} or less" if most else "leave --clip-skip out",
            )


def reopen(model: Model, source: dict[str, Any], dtype: str) -> Checkpoint:
    """Open again what a manifest's `source` names: the same files, or the same random numbers."""

    def other(name: str) -> Place | None:
        place = Place.of(source[name]) if source.get(name) else None
        return None if place is None or place.kind in ("own", "random") else place

    loras = (LoraPlace(Place.of(lora["place"]), lora["weight"]) for lora in source.get("loras", ()))
    request = ExportRequest(
        weights=Place.of(source),
        vae=other("vae"),
        taesd=other("taesd"),
        seed=source["seed"],
        allow_pickle=source["allow_pickle"],
        variant=source.get("variant"),
        clip_skip=source.get("clip_skip", 0),
        unet=other("unet"),
        loras=tuple(loras),
        embeddings=tuple(
            EmbeddingPlace(Place.of(entry["place"]), entry["token"])
            for entry in source.get("embeddings", ())
        ),
    )
    return open_request(model, request, dtype)
