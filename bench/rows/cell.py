"""A cell: the frozen key of a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any, Self

from backends.pipeline.start import kept_steps
from bench.rows.fields import KEY_COLUMNS, LATER
from export.models import MODELS, scheduler_name


@dataclass(frozen=True, order=True)
class Cell:
    """One point of a sweep. Rows of different runs are about the same thing if their cells match.

    Its fields are the key columns of `bench.rows.fields`, in their order.

    Attributes:
        model, weights: the bundle's name, and `hub`, `folder` or `random`.
        backend, options: the registry's name; `key=value,...` sorted by key, "" for none.
        device: what the sessions run on, as torch names it.
        precision, storage: dtype of the arithmetic, dtype of the stored weights.
        size: `<width>x<height>` in pixels.
        batch, steps: images per call, denoising steps per image.
        scheduler, decoder: diffusers class name; `vae` or `taesd`.
        guidance: its scale, 0 for none.
        guidance_mode: `none`; `batch` or `calls` (two UNet evaluations a step, as one batch or one
            after the other); `embedding` (the scale is an input of the UNet).
        low_memory: each part is loaded when a call needs it and released after, within the call.
        encoder, strength: of the picture that the images start from; "" and 1 without one.
        scenario: of `addbench load`; "" for one call after the other.
        negative: the prompt that guidance leads away from; "" where none is given.
    """

    model: str
    weights: str
    backend: str
    options: str
    device: str
    precision: str
    storage: str
    size: str
    batch: int
    decoder: str
    steps: int
    scheduler: str
    guidance: float = 0.0
    guidance_mode: str = "none"
    low_memory: bool = False
    encoder: str = ""
    strength: float = 1.0
    scenario: str = ""
    negative: str = ""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The cell of a row; KeyError if a key column is missing that has always been there."""
        return cls(**{name: row[name] if name in row else LATER[name] for name in KEY_COLUMNS})

    def columns(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def group(self) -> Self:
        """What all cells of one worker share: everything but the steps."""
        return replace(self, steps=0)

    @property
    def kept(self) -> int:
        """How many of the steps run."""
        return kept_steps(self.steps, self.strength)

    @property
    def backend_text(self) -> str:
        """The backend with its options as `--backend` takes it."""
        return f"{self.backend}:{self.options}" if self.options else self.backend

    @property
    def numerics(self) -> str:
        return f"storage {self.storage}, precision {self.precision}"

    @property
    def recipe_text(self) -> str:
        """What does not go without saying of recipe, memory, picture, negative prompt; else ""."""
        known = MODELS.get(self.model.partition("+")[0])  # behind it: fused LoRA weights
        words = []
        if known is None or known.scheduler != self.scheduler:
            words.append(scheduler_name(self.scheduler))
        if self.guidance:
            words.append(f"guidance {self.guidance:g}")
        if self.guidance_mode == "calls":
            words.append("in two calls")
        if self.low_memory:
            words.append("low memory")
        if self.encoder:
            words.append(f"from a picture ({self.encoder}) strength {self.strength:g}")
        if self.scenario:
            words.append(self.scenario)
        if self.negative:
            words.append(f"negative {self.negative!r}")
        return " ".join(words)

    def __str__(self) -> str:
        text = f"{self.backend_text} {self.decoder} batch {self.batch} steps {self.steps}"
        return f"{text} {self.recipe_text}".rstrip()

    def differences(self, other: Cell) -> list[str]:
        """Names of the key columns in which two cells differ."""
        pairs = zip(KEY_COLUMNS, astuple(self), astuple(other), strict=True)
        return [name for name, mine, theirs in pairs if mine != theirs]
