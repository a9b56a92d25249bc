"""What the user asked for, in one form: decides whether a bundle is already there."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import AddbenchError
from core.files import read_json, sha256_json
from export.layout import FOLDERS, CheckpointError
from export.models import MODELS, Model

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Place:
    """Where files come from: a hub repository, a local folder, or nowhere (random numbers)."""

    kind: str
    id: str | None = None
    revision: str | None = None
    path: str | None = None

    @property
    def spec(self) -> str | None:
        """What to write behind a flag to get the same again."""
        if self.kind == "hub":
            return f"{self.id}@{self.revision}" if self.revision else self.id
        return self.path if self.kind == "folder" else None


@dataclass(frozen=True)
class Request:
    """One checkpoint as asked for, before any file of it is looked at.

    Attributes:
        vae, taesd: None for the rule of the model.
        seed: of random weights; None otherwise.
    """

    weights: Place
    vae: Place | None
    taesd: Place | None
    seed: int | None
    allow_pickle: bool

    def as_dict(self) -> dict[str, Any]:
        """For the manifest, with a fingerprint of the local files (names, sizes, times)."""
        fields = asdict(self)
        return fields | {"fingerprint": fingerprint(local_paths(fields))}


def make_request(
    model: Model,
    weights: str,
    vae: str | None = None,
    taesd: str | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
) -> Request:
    """Read `--weights`, `--vae` and `--taesd`. CheckpointError for what they cannot mean."""
    if weights == "random":
        place = Place("random")
    elif weights == "hub":
        if model.checkpoint is None:
            raise CheckpointError(
                f"{model.name} has no checkpoint on the hub",
                model.licence,
                "use --weights random, or pass a checkpoint: --weights PATH",
            )
        place = Place("hub", model.checkpoint)
    else:
        place = find_place(weights, "--weights")
    return Request(
        place,
        find_place(vae, "--vae") if vae else None,
        find_place(taesd, "--taesd") if taesd else None,
        seed if place.kind == "random" else None,
        allow_pickle,
    )


def find_place(text: str, flag: str) -> Place:
    """`org/name[@revision]` or a folder; a folder that exists comes first, as in diffusers."""
    path = Path(text).expanduser()
    if path.is_dir():
        return Place("folder", path=str(path.resolve()))
    match = HUB_ID.fullmatch(text)
    if match is None or text.startswith("."):
        raise CheckpointError(
            f"{flag} {text}: there is no such folder",
            "it is no hub id (org/name) either",
            f"check the path; {flag} takes a folder in diffusers format or a hub id",
        )
    return Place("hub", match["id"], match["revision"])


def local_paths(fields: dict[str, Any]) -> list[Path]:
    """The local folders that a request names."""
    places = (fields[key] for key in ("weights", "vae", "taesd"))
    return [Path(place["path"]) for place in places if place and place["path"]]


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


def fingerprint(folders: list[Path]) -> str | None:
    """Changes when a file of the folders does (by name, size and time); None when one is gone."""
    stats = []
    for folder in folders:
        if not folder.is_dir():
            return None
        for file in sorted(file for name in ("", *FOLDERS) for file in (folder / name).glob("*")):
            if file.suffix in (".json", ".txt", ".safetensors", ".bin") and file.is_file():
                stat = file.stat()
                stats.append([file.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns])
    return sha256_json(stats) if folders else None


def differences(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """How a bundle's request differs from this one, in words; empty when it is the same."""
    words = []
    for key in asked:
        old, new = there.get(key), asked[key]
        if old == new or (key == "fingerprint" and new is None):
            continue
        if key == "fingerprint":
            words.append("the checkpoint's files have changed since")
        else:
            words.append(f"{key}: {_short(old)} there, {_short(new)} asked for")
    return words


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return Place(**value).spec or value["kind"]
    return "the default" if value is None else str(value)


def infer_model(folder: Path) -> Model:
    """The entry of a checkpoint folder that MODELS does not know: an SDXL of some kind.

    Its scheduler and size are read from its configs; the tiny autoencoder of SDXL's latents is the
    one that sdxl-turbo's entry names.
    """
    folder = folder.expanduser().resolve()
    if (folder / "manifest.json").is_file():
        raise CheckpointError(
            f"{folder} is a bundle, not a checkpoint",
            "it holds a manifest.json",
            "other commands take it as it is; export takes a folder in diffusers format",
        )
    unet = _config(folder, "unet/config.json")
    scheduler = _config(folder, "scheduler/scheduler_config.json")
    encoders = [folder / name for name in ("text_encoder", "text_encoder_2")]
    if unet.get("addition_embed_type") != "text_time" or not all(e.is_dir() for e in encoders):
        raise CheckpointError(
            f"{folder} is not a checkpoint of the SDXL form",
            "it has two text encoders and a UNet with addition_embed_type text_time",
            "pass an SDXL-like checkpoint",
        )
    scale = 2 ** (len(_config(folder, "vae/config.json").get("block_out_channels", [0] * 4)) - 1)
    return Model(
        name=folder.name,
        architecture=str(folder),
        checkpoint=None,
        licence=_card_licence(folder) or "not known: see the checkpoint's own terms",
        licence_notice="",
        vae=None,
        taesd=MODELS["sdxl-turbo"].taesd,
        text_encoders=("penultimate", "penultimate"),
        pooled=True,
        size=int(unet.get("sample_size", 128)) * scale,
        scheduler=str(scheduler.get("_class_name", "EulerDiscreteScheduler")),
        spacing=str(scheduler.get("timestep_spacing", "leading")),
        steps=1,
        guidance=0.0,
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
