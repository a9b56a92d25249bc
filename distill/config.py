"""The recipe of a run as data: dataclasses, read from a TOML preset, hashed per stage."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from core.errors import PreconditionError
from core.files import sha256_json

PRESETS = Path(__file__).parent / "presets"

Conditioning = Literal["none", "text", "image", "both"]
Weighting = Literal["exp", "sds", "nfsd"]
Loss = Literal["adversarial", "distillation", "both"]


@dataclass(frozen=True)
class Data:
    """Where pictures and captions come from.

    Attributes:
        kind: `shapes` (drawn by code), `folder` (pictures with a caption each) or `tar`
            (webdataset shards).
        path: the folder; unused for shapes.
        size: width and height in pixels.
        pool: pictures drawn for shapes.
        loose, cut: shares of the pool's captions in looser words than the grammar's, and cut off
            anywhere (`distill/captions.py`).
    """

    kind: Literal["shapes", "folder", "tar"] = "shapes"
    path: str = ""
    size: int = 64
    pool: int = 50_000
    loose: float = 0.35
    cut: float = 0.25
    seed: int = 0


@dataclass(frozen=True)
class Networks:
    """The small networks, or the folders that large ones come from.

    Attributes:
        checkpoint: folder in diffusers format that gives every network (""= build small ones).
        teacher: folder of another model that teaches, of another family too ("": the checkpoint).
        student: folder whose UNet the student starts from ("": the checkpoint's UNet).
        vae: folder of another autoencoder than the checkpoint's ("": the checkpoint's).
        features: folder of a DINOv2, DINO or CLIP in transformers format ("": trained here).
    """

    checkpoint: str = ""
    teacher: str = ""
    student: str = ""
    vae: str = ""
    features: str = ""
    vae_channels: tuple[int, ...] = (32, 32, 64, 64)
    tiny_channels: int = 32
    tiny_blocks: int = 2
    unet_channels: tuple[int, ...] = (128, 160)
    unet_layers: int = 1
    attention_levels: int = 1
    text_width: int = 128
    text_layers: tuple[int, int] = (3, 3)
    feature_channels: tuple[int, ...] = (32, 64, 96, 128)
    fid_channels: tuple[int, ...] = (24, 48, 64)


@dataclass(frozen=True)
class StageConfig:
    """What every stage has: how long, how many at once, how fast."""

    iterations: int
    batch: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.01
    ema: float = 0.0
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Autoencoder(StageConfig):
    """Weights of the loss beside L1: `square` of the squared error, `edges` of the L1 between
    neighbouring pixels' differences, `kl` of the KL term per latent element, `objects` (the tiny
    one's) of the L1 where a picture is not background.

    `crop`: for the first `crop_share` of the stage, side of the pieces that it learns on, each the
    most varied of a few random ones: several times cheaper than whole pictures, and not mostly
    background. Whole pictures come after (0: from the start).
    """

    square: float = 4.0
    edges: float = 1.0
    kl: float = 1e-4
    objects: float = 1.0
    crop: int = 0
    crop_share: float = 0.8


@dataclass(frozen=True)
class Teacher(StageConfig):
    """`empty`: share of captions replaced by the empty one, which guidance needs."""

    empty: float = 0.1
    beta_start: float = 0.00085
    beta_end: float = 0.012
    guidance: float = 3.0
    steps: int = 50


@dataclass(frozen=True)
class Student(StageConfig):
    """Adversarial diffusion distillation.

    Attributes:
        timesteps: the student's, the last of the schedule included (zero-based).
        loss: which of the two terms (Table 1's "adv", "distill", both).
        lambda_: weight of the distillation term; presumes the scale of `reduction`, which the
            paper's 2.5 leaves open. The log's `adv_pull` and `distill_pull` compare the terms.
        reduction: d is the `sum` or the `mean` of squared differences over a picture's elements.
        weighting: c(t) of the distillation term.
        space: where d is computed: decoded `pixel`s as in the paper, or `latent`.
        teacher_steps: denoising steps of the teacher from the re-diffused sample.
        guidance: the teacher's classifier-free guidance scale (1: none); NFSD has its own.
        negative: caption of bad pictures, which NFSD wants.
        teacher_range: re-diffusion timesteps are drawn uniformly from this share of the schedule.
        pretrained: start from the teacher's UNet (else from random weights).
        conditioning: what the discriminator's heads are told.
        text: `tokens`: each place of the picture attends to the caption's tokens; `pooled`: one
            vector, projected for each place.
        mismatch: weight of real pictures with another's caption as fakes (0: as in the paper).
        gamma: weight of R1; `r1_every`: iterations between penalties, scaled to match.
        terminal: share of a batch at the last timestep (None: uniform over the four).
        reals: what the discriminator takes for real: pictures as they come, or through the
            autoencoder, whose flaws the student cannot avoid.
        discriminator_rate: learning rate of the heads.
        head_width: channels of a head.
        headstart: iterations in which only the discriminator learns.
        gradient_checkpointing: trade time for memory in the student.
    """

    timesteps: tuple[int, ...] = (249, 499, 749, 999)
    loss: Loss = "both"
    lambda_: float = 2.5
    reduction: Literal["sum", "mean"] = "mean"
    weighting: Weighting = "exp"
    space: Literal["pixel", "latent"] = "pixel"
    teacher_steps: int = 1
    guidance: float = 3.0
    negative: str = ""
    teacher_range: tuple[float, float] = (0.02, 0.98)
    pretrained: bool = True
    conditioning: Conditioning = "both"
    text: Literal["tokens", "pooled"] = "tokens"
    mismatch: float = 0.0
    gamma: float = 1e-5
    r1_every: int = 1
    terminal: float | None = None
    reals: Literal["pictures", "reconstructed"] = "pictures"
    discriminator_rate: float = 1e-3
    head_width: int = 64
    headstart: int = 0
    gradient_checkpointing: bool = False
    scheduler: str = "EulerAncestralDiscreteScheduler"


@dataclass(frozen=True)
class Config:
    """A whole run. `stages` names those that apply, in order."""

    name: str
    stages: tuple[str, ...]
    data: Data = field(default_factory=Data)
    networks: Networks = field(default_factory=Networks)
    autoencoder: Autoencoder = Autoencoder(iterations=1, batch=1, learning_rate=1e-3)
    tiny_autoencoder: Autoencoder = Autoencoder(iterations=1, batch=1, learning_rate=1e-3)
    features: StageConfig = StageConfig(iterations=1, batch=1, learning_rate=1e-3)
    fid: StageConfig = StageConfig(iterations=1, batch=1, learning_rate=1e-3)
    teacher: Teacher = Teacher(iterations=1, batch=1, learning_rate=1e-3)
    student: Student = Student(iterations=1, batch=1, learning_rate=1e-4)
    evaluate_captions: int = 600
    seed: int = 0

    def stage(self, name: str) -> Any:
        return getattr(self, name.replace("-", "_"))

    def stage_hash(self, name: str) -> str:
        """What the stage's weights depend on: data, networks, its own settings, those before."""
        networks = dataclasses.asdict(self.networks)
        # Of the student's concern alone.
        teacher = networks.pop("teacher")
        before = {other: self.stage_hash(other) for other in upstream(name) if other in self.stages}
        return sha256_json(
            {
                "data": dataclasses.asdict(self.data),
                "networks": networks,
                "stage": dataclasses.asdict(self.stage(name)),
                "seed": self.seed,
                "before": before,
            }
            | ({"teacher": teacher} if teacher and name == "student" else {})
        )


STAGES = ("autoencoder", "features", "fid", "teacher", "student", "tiny-autoencoder")
_UPSTREAM = {
    "teacher": ("autoencoder",),
    "student": ("autoencoder", "features", "teacher"),
    "tiny-autoencoder": ("autoencoder", "student"),
}


def upstream(stage: str) -> tuple[str, ...]:
    """The stages whose weights a stage starts from."""
    return _UPSTREAM.get(stage, ())


def load_config(preset: str, changes: list[str] | None = None) -> Config:
    """A preset by name, or a TOML file by path, with `section.key=value` changes (TOML values)."""
    path = Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.toml")))
        raise PreconditionError(
            f"there is no preset {preset!r}",
            f"known presets: {known}",
            "pick one of these, or pass the path of a .toml file",
        )
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PreconditionError(
            f"{path} is not valid TOML", str(error), "correct the file"
        ) from error
    for change in changes or ():
        _apply(table, change)
    table.setdefault("name", path.stem)
    config: Config = _build(Config, table, path.name)
    unknown = [stage for stage in config.stages if stage not in STAGES]
    if unknown:
        raise PreconditionError(
            f"{path.name}: there is no stage {unknown[0]!r}",
            f"known stages: {', '.join(STAGES)}",
            "correct `stages`",
        )
    return config


def _apply(table: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    try:
        value = tomllib.loads(f"value = {text}")["value"] if equals else None
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    if value is None:
        raise PreconditionError(
            f"--set {change!r} has no value", "it wants section.key=value", "add the value"
        )
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
    table[last] = value


def _build(cls: Any, table: dict[str, Any], where: str) -> Any:
    """A dataclass from a table; unknown keys and wrong types name themselves."""
    hints = get_type_hints(cls)
    names = {item.name for item in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = "lambda_" if key == "lambda" else key.replace("-", "_")
        if name not in names:
            raise PreconditionError(
                f"{where} has an unknown key {key!r}",
                f"known: {', '.join(sorted(names))}",
                "correct or remove it",
            )
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            values[name] = _build(hint, value, f"{where}: [{key}]")
            continue
        value = tuple(value) if isinstance(value, list) else value
        choices = get_args(hint)
        literal = choices and all(isinstance(choice, str) for choice in choices)
        if literal and value not in choices:
            raise PreconditionError(
                f"{where}: {key} = {value!r} is not a choice",
                f"it takes: {', '.join(choices)}",
                "use one of these",
            )
        plain: Any = {int: int, float: (int, float), str: str, bool: bool}.get(hint)
        if plain is not None and (
            not isinstance(value, plain) or (hint is not bool) & isinstance(value, bool)
        ):
            raise PreconditionError(
                f"{where}: {key} = {value!r} has the wrong type",
                f"it wants a {hint.__name__}",
                "correct the value",
            )
        values[name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise PreconditionError(
            f"{where} is incomplete", str(error), "add the missing keys"
        ) from error
