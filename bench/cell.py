"""A cell: the frozen key of a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, fields, replace
from typing import Any, Self


@dataclass(frozen=True, order=True)
class Cell:
    """One point of a sweep. Rows of different runs are about the same thing if their cells match.

    Attributes:
        model, weights: the bundle's name, and `hub`, `folder` or `random`.
        backend, options: the registry's name; `key=value,...` sorted by key, "" for none.
        device: what the sessions run on, as torch names it.
        precision, storage: dtype of the arithmetic, dtype of the stored weights.
        size: `<width>x<height>` in pixels.
        batch, steps: images per call, denoising steps per image.
        scheduler, decoder: diffusers class name; `vae` or `taesd`.
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

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The cell of a row; KeyError if a key column is missing."""
        return cls(**{name: row[name] for name in KEY_COLUMNS})

    def columns(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def group(self) -> Self:
        """What all cells of one worker share: everything but the steps."""
        return replace(self, steps=0)

    @property
    def backend_text(self) -> str:
        """As `--backend` takes it."""
        return f"{self.backend}:{self.options}" if self.options else self.backend

    @property
    def numerics(self) -> str:
        return f"storage {self.storage}, precision {self.precision}"

    def __str__(self) -> str:
        return f"{self.backend_text} {self.decoder} batch {self.batch} steps {self.steps}"

    def differences(self, other: Cell) -> list[str]:
        """Names of the key columns in which two cells differ."""
        pairs = zip(KEY_COLUMNS, astuple(self), astuple(other), strict=True)
        return [name for name, mine, theirs in pairs if mine != theirs]


KEY_COLUMNS = tuple(field.name for field in fields(Cell))
