"""What the user asked for, in one form: decides whether a bundle is already there."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import AddbenchError, PreconditionError
from core.files import ROOT, read_json, sha256_json
from export.models import MODELS, SOLVERS, Model
from export.source.layout import FOLDERS, LORA_FILES, CheckpointError
from export.source.taesd import encoder_of

HUB_ID = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<file>[\w./-]+\.safetensors))?(@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class Place:
    """Where files come from: a hub repository, a local folder, or nowhere (random numbers).

    Attributes:
        path: a folder, or (kind `file`) one file; relative to the checkout if it ships with it.
        file: one file of a hub repository.
    """

    kind: str
    id: str | None = None
    revision: str | None = None
    path: str | None = None
    file: str | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Place:
        """Read a manifest's fields, which may be more and, in an older one, fewer."""
        known: dict[str, Any] = {
            key: fields.get(key) for key in ("kind", "id", "revision", "path", "file")
        }
        return cls(**known)

    @property
    def spec(self) -> str | None:
        """What to write behind a flag to get the same again."""
        if self.kind == "hub":
            file = f"/{self.file}" if self.file else ""
            return f"{self.id}{file}" + (f"@{self.revision}" if self.revision else "")
        return self.path if self.kind in ("folder", "file") else None

    @property
    def local(self) -> Path:
        """The folder or file of a local place."""
        return ROOT / str(self.path)


@dataclass(frozen=True)
class LoraPlace:
    """LoRA weights to fuse, and the strength."""

    place: Place
    weight: float

    @property
    def name(self) -> str:
        """Stem of the file or last word of the hub id, and the weight where it is not 1."""
        source = self.place.file or self.place.path or str(self.place.id)
        stem = Path(source).name.removesuffix(".safetensors")
        return stem if self.weight == 1 else f"{stem}@{self.weight:g}"

    def as_dict(self) -> dict[str, Any]:
        """Return what the manifest's source says."""
        return {"name": self.name, "place": asdict(self.place), "weight": self.weight}


@dataclass(frozen=True)
class EmbeddingPlace:
    """Learned vectors of a token; `token` None for the one that the file names."""

    place: Place
    token: str | None

    @property
    def name(self) -> str:
        """Stem of the file or last word of the hub id, or the token in words for file names."""
        source = self.token or self.place.file or self.place.path or str(self.place.id)
        return re.sub(r"[^\w.-]", "", Path(source).name.removesuffix(".safetensors")) or "token"

    def as_dict(self) -> dict[str, Any]:
        """Return what the manifest's source says."""
        return {"name": self.name, "place": asdict(self.place), "token": self.token}


@dataclass(frozen=True)
class ExportRequest:
    """One checkpoint as asked for, before any file of it is looked at.

    Attributes:
        vae, taesd: None for the rule of the model.
        seed: of random weights; None otherwise.
        unet: None for the rule of the model.
    """

    weights: Place
    vae: Place | None
    taesd: Place | None
    seed: int | None
    allow_pickle: bool
    unet: Place | None = None
    loras: tuple[LoraPlace, ...] = ()
    embeddings: tuple[EmbeddingPlace, ...] = ()
    variant: str | None = None
    clip_skip: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return what the manifest says, local files with a fingerprint (names, sizes, times)."""
        fields = asdict(self)
        for key in ("loras", "embeddings"):
            fields[key] = list(fields[key]) or None
        if not self.clip_skip:  # bundles from before it existed say nothing of it
            del fields["clip_skip"]
        return fields | {"fingerprint": fingerprint(local_paths(fields))}


def make_request(
    model: Model,
    weights: str,
    vae: str | None = None,
    taesd: str | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    unet: str | None = None,
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    variant: str | None = None,
    clip_skip: int = 0,
) -> ExportRequest:
    """Read `--weights` and the flags beside it. CheckpointError for what they cannot mean."""
    if weights == "random":
        place = Place("random")
    elif weights == "folder" and model.folder is not None:
        place = Place("folder", path=model.folder)
    elif weights == "hub":
        if model.checkpoint is None:
            raise CheckpointError(
                f"{model.name} has no checkpoint on the hub",
                model.licence,
                "use --weights random, or pass a checkpoint: --weights PATH",
            )
        place = Place("hub", model.checkpoint)
    else:
        place = find_place(weights, "--weights", files=True)
    return ExportRequest(
        place,
        find_place(vae, "--vae", files=True) if vae else None,
        find_place(taesd, "--taesd", files=True) if taesd else None,
        seed if place.kind == "random" else None,
        allow_pickle,
        find_place(unet, "--unet", files=True) if unet else None,
        tuple(map(find_lora, loras)),
        tuple(map(find_embedding, embeddings)),
        variant,
        clip_skip,
    )


FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""How the files of weights end."""


def files_read(flag: str) -> tuple[str, ...]:
    """Return how the files that a flag takes may end."""
    return {"--embedding": FILES, "--taesd": (".safetensors", ".pth")}.get(flag, FILES[:1])


def find_place(text: str, flag: str, *, files: bool = False) -> Place:
    """`org/name[@revision]` or a folder; a folder that exists comes first, as in diffusers.

    Args:
        files: a file will do too: `x.safetensors` or `org/name/x.safetensors[@revision]`.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return Place("folder", path=str(path.resolve()))
    if files and path.is_file() and path.suffix in (*files_read(flag),):
        return Place("file", path=str(path.resolve()))
    match = HUB_ID.fullmatch(text)
    if (path.suffix in FILES or path.is_file()) and (match is None or not match["file"]):
        raise CheckpointError(
            f"{flag} {text}: there is no such file"
            if not path.is_file()
            else f"{flag} {text}: this file is not read",
            f"the current folder is {Path.cwd()}"
            if not path.is_file()
            else f"{flag} takes {' and '.join(files_read(flag))} files"
            if files
            else f"{flag} takes no file",
            "check the path"
            if not path.is_file()
            else "convert it to .safetensors"
            if files
            else "pass a folder in diffusers format",
        )
    if match is None or text.startswith(".") or (match["file"] and not files):
        raise CheckpointError(
            f"{flag} {text}: there is no such folder" + (" or file" if files else ""),
            "it is no hub id (org/name) either",
            f"check the path; {flag} takes a folder in diffusers format or a hub id"
            + (", or one .safetensors file of either" if files else ""),
        )
    return Place("hub", match["id"], match["revision"], file=match["file"])


def find_lora(text: str) -> LoraPlace:
    """`FILE[:WEIGHT]` or a hub id with the same; the weight is how strongly it is fused (1)."""
    name, colon, last = text.rpartition(":")
    try:
        weight = float(last) if colon else 1.0
    except ValueError:
        name, weight = text, 1.0
    else:
        name = name if colon else text
    if not math.isfinite(weight) or weight == 0:
        raise CheckpointError(
            f"--lora {text}: {weight:g} is not a weight",
            "it is a finite number other than 0, 1 for the full strength",
            f"use --lora {name}:1",
        )
    place = find_place(name, "--lora", files=True)
    if place.kind == "folder":
        held = sorted(place.local.glob("*.safetensors"))
        held = [file for file in held if file.name in LORA_FILES][:1] or held
        if len(held) != 1:
            raise CheckpointError(
                f"--lora {name}: the folder holds {len(held)} .safetensors files",
                "LoRA weights are one file",
                "name the file",
            )
        place = Place("file", path=str(held[0]))
    return LoraPlace(place, weight)


def find_embedding(text: str) -> EmbeddingPlace:
    """`FILE[:TOKEN]` or a hub id with the same."""
    name, colon, token = text.rpartition(":")
    if not colon or Path(text).expanduser().is_file():
        name, token = text, ""
    return EmbeddingPlace(find_place(name, "--embedding", files=True), token or None)


def local_paths(fields: dict[str, Any]) -> list[Path]:
    """The local folders and files that a request names."""
    found = [fields.get(key) for key in ("weights", "vae", "taesd", "unet")]
    for key in ("loras", "embeddings"):
        found += [entry["place"] for entry in fields.get(key) or ()]
    places = [Place.of(place) for place in found if place]
    return [place.local for place in places if place.path]


def require_unchanged(fields: dict[str, Any]) -> None:
    """The local files of a bundle's request are still those that it was exported from."""
    now = fingerprint(local_paths(fields))
    if now != fields["fingerprint"]:
        folders = ", ".join(map(str, local_paths(fields)))
        state = "is gone" if now is None else "has changed since the export"
        raise CheckpointError(
            f"the checkpoint of this bundle {state}: {folders}",
            "what is compared with the bundle has to be what it was made from",
            "put it back, or export again with --force",
        )


def fingerprint(paths: list[Path]) -> str | None:
    """Changes when a file does (by name, size and time); None when a folder or file is gone."""
    stats = []
    for folder in paths:
        if not folder.exists():
            return None
        inside = (file for name in ("", *FOLDERS) for file in (folder / name).glob("*"))
        alone = {folder, folder.with_name("adapter_config.json")}
        alone.add(folder.with_name(encoder_of(folder.name)))
        for file in sorted(inside if folder.is_dir() else alone):
            kept = file in alone or file.suffix in (".json", ".txt", ".safetensors", ".bin")
            if kept and file.is_file():
                stat = file.stat()
                name = file.name if file in alone else file.relative_to(folder).as_posix()
                stats.append([name, stat.st_size, stat.st_mtime_ns])
    return sha256_json(stats) if paths else None


CHANGED = "the checkpoint's files have changed since"


def differences(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """How a bundle's request differs from this one, in words; empty when it is the same."""
    words = []
    for key in asked:
        old, new = _whole(there.get(key)), _whole(asked[key])
        if old == new or (key == "fingerprint" and new is None):
            continue
        if key == "fingerprint":
            words.append(CHANGED)
        else:
            words.append(f"{key}: {_short(old)} there, {_short(new)} asked for")
    return words


def _whole(value: Any) -> Any:
    """A place with all fields: older manifests hold fewer."""
    return asdict(Place.of(value)) if isinstance(value, dict) else value


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return Place.of(value).spec or value["kind"]
    if isinstance(value, list):
        return ", ".join(
            f"{_short(entry['place'])}:{entry.get('weight') or entry.get('token') or ''}"
            for entry in value
        )
    return "the default" if value is None else str(value)


def infer_model(folder: Path) -> Model:
    """The entry of a checkpoint folder that MODELS does not know: of the form of SDXL or of SD.

    Scheduler, size and whether guidance is an input are read from its configs; the tiny autoencoder
    is that of its latents. It may run with any solver and any guidance, which are the user's to
    know.
    """
    folder = folder.expanduser().resolve()
    if (folder / "manifest.json").is_file():
        raise CheckpointError(
            f"{folder} is a bundle, not a checkpoint",
            "it holds a manifest.json",
            "other commands take it as it is; export takes a folder in diffusers format",
        )
    unet = _config(folder, "unet/config.json")
    _config(folder, "scheduler/scheduler_config.json")
    second = (folder / "text_encoder_2").is_dir()
    added = unet.get("addition_embed_type")
    if not (folder / "text_encoder").is_dir() or added != ("text_time" if second else None):
        raise CheckpointError(
            f"{folder} is neither of the SDXL form nor of the SD form",
            "SDXL has two text encoders and a UNet with addition_embed_type text_time; SD has one"
            f" and none. This one has {1 + second} and {added}",
            "pass a checkpoint of one of these forms",
        )
    scale = 2 ** (length(_config(folder, "vae/config.json").get("block_out_channels"), 4) - 1)
    side = unet.get("sample_size")
    side = max(side) if isinstance(side, list) and side else side
    if not isinstance(side, int | None):
        raise CheckpointError(
            f"{folder / 'unet' / 'config.json'}: sample_size is {side!r}",
            "it is a number, or a list of two",
            "correct the file, or download the checkpoint again",
        )
    embedded = unet.get("time_cond_proj_dim") is not None
    return Model(
        name=folder.name,
        architecture=str(folder),
        checkpoint=None,
        licence=_card_licence(folder) or "not known: see the checkpoint's own terms",
        licence_notice="",
        vae=None,
        taesd=MODELS["sdxl-turbo" if second else "sd15"].taesd,
        text_encoders=("penultimate", "penultimate") if second else ("final",),
        pooled=second,
        size=int(side or (128 if second else 64)) * scale,
        scheduler="",
        spacing="",
        steps=1,
        guidance=8.0 if embedded else 0.0,
        guidance_form="embedding" if embedded else "free",
        schedulers=() if embedded else SOLVERS,
        sizes=(8, 4096),
        pixels=4096 * 4096,
    )


def infer_file(file: Path) -> Model:
    """The entry of a single file with a whole model; its keys tell the architecture."""
    from export.source.single_file import tell_architecture

    base = MODELS[tell_architecture(file)]
    return replace(
        base,
        name=file.stem,
        licence="not known: see the checkpoint's own terms",
        licence_notice="",
        vae=None,
        steps=1,
        guidance=0.0,
        guidance_form="free",
        schedulers=SOLVERS,
        prompts=MODELS["sdxl-base"].prompts,
    )


def length(value: Any, default: int) -> int:
    """Return how many entries a list of a config has; what is no list has its class's default."""
    return len(value) if isinstance(value, list) else default


def require_size(model: Model, multiple: int, width: int, height: int) -> None:
    """The model can draw images of this size.

    Args:
        multiple: pixels along one side of a latent, which both sides must be multiples of.
    """
    least, most = model.sizes
    for side in (width, height):
        if side % multiple or not least <= side <= most:
            nearest = min(max(side // multiple * multiple, multiple, least), most)
            why = f"latents are 1/{multiple} of an image: sides are multiples of {multiple}"
            if not side % multiple:
                why = f"it draws images with sides of {least} to {most} pixels"
            raise PreconditionError(
                f"--size {width}x{height} does not fit {model.name}",
                why,
                f"use --size {nearest}",
            )
    if width * height > model.pixels:
        side = math.isqrt(model.pixels)
        raise PreconditionError(
            f"--size {width}x{height} does not fit {model.name}",
            f"it was trained on images of about {side}x{side} pixels, in any aspect",
            f"use --size {side}",
        )


def _card_licence(folder: Path) -> str | None:
    """What the model card says, if the folder has one: README.md with a `license` in its header."""
    if not (folder / "README.md").is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(folder / "README.md").data.to_dict()
    except (ValueError, OSError):
        return None  # a README that is no model card
    licence = data.get("license_name") or data.get("license")
    return f"{licence}, as its model card says" if licence else None


def _config(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint in diffusers format",
            f"{name} is missing",
            f"pass a folder that holds {', '.join(FOLDERS)} (of these, taesd may be missing)",
        )
    try:
        config: dict[str, Any] = read_json(folder / name)
    except AddbenchError as error:
        raise CheckpointError(error.what, error.why, "download the checkpoint again") from error
    return config
