"""A locked recipe: what `addbench choose --save FILE` took, in a file that other commands take.

It says what to run, and what that was measured on: elsewhere its figures are another machine's, and
that is said. It is no file to edit: what was changed by hand was never measured.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, Self

from core.errors import PreconditionError
from core.files import sha256_json, write_atomic
from core.machine import this_machine

SCHEMA = 1
HEAD = "# What `addbench choose` took. Not to be edited: choose again, or pass the flags.\n"


@dataclass(frozen=True)
class LockedRecipe:
    """What to run, and what it was measured on.

    Attributes:
        model: a model's name, or the folder of a bundle.
        bundle: the hash of the bundle that was measured.
        measured: the machine (`machine` its hash, `place` what people call it), `run`, `rounds`,
            `provenance`.
        figures: quantity -> [middle, low, high].
        wanted: `within` and `best`, as they were asked for.
    """

    model: str
    weights: str
    dtype: str
    size: str
    backend: str
    decoder: str
    steps: int
    batch: int
    scheduler: str
    guidance: float
    guidance_mode: str
    low_memory: bool
    bundle: str
    measured: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    wanted: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
        try:
            write_atomic(Path(path), self.text())
        except OSError as error:
            raise PreconditionError(
                f"{path} cannot be written", str(error), "pass another place with --save"
            ) from error

    def text(self) -> str:
        """The recipe as TOML."""
        said = self.as_json()
        lines = [HEAD, f"schema = {SCHEMA}", f"seal = {quoted(seal(said))}"]
        for table, values in said.items():
            lines += ["", f"[{table}]"]
            lines += [f"{quoted(key)} = {quoted(value)}" for key, value in values.items()]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, dict[str, Any]]:
        """The recipe's tables."""
        said = asdict(self)
        return {"take": {name: said[name] for name in TAKEN}} | {
            name: dict(said[name]) for name in TABLES
        }

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The recipe in a file.

        Raises:
            PreconditionError: there is none, it is of another version, or was edited.
        """
        place = Path(path)
        try:
            said = tomllib.loads(place.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise PreconditionError(
                f"the recipe {place} cannot be read", str(error),
                "make one: addbench choose RUN --save recipe.toml",
            ) from error  # fmt: skip
        except tomllib.TOMLDecodeError as error:
            refuse(place, f"it is no TOML: {error}")
        if said.get("schema") != SCHEMA:
            refuse(place, f"its schema is {said.get('schema')!r}, and this version reads {SCHEMA}")
        tables: dict[str, Any] = {name: said.get(name) for name in ("take", *TABLES)}
        if said.keys() != {"schema", "seal", *tables} or not all(
            isinstance(table, dict) for table in tables.values()
        ):
            refuse(place, f"it has not the tables {', '.join(tables)}")
        if said["seal"] != seal(tables):
            refuse(
                place, "it was edited: its seal is another's, and what it says was never measured"
            )
        take: dict[str, Any] = tables["take"]
        if take.keys() != {*TAKEN}:
            refuse(place, f"[take] has not the keys {', '.join(TAKEN)}")
        return cls(**take, **{name: tables[name] for name in TABLES})

    # ---- what commands take from it

    def axes(self) -> dict[str, Any]:
        """The fields of a `Request` that it says."""
        width, _, height = self.size.partition("x")
        return {
            "model": self.model,
            **({"weights": self.weights, "dtype": self.dtype} if not self.is_folder else {}),
            "size": (int(width), int(height)),
            "backends": (self.backend,),
            "decoders": (self.decoder,),
            "steps": (self.steps,),
            "batches": (self.batch,),
            "schedulers": (self.scheduler,),
            **self.guidance_axes,
            "low_memory": (self.low_memory,),
        }

    def arguments(self) -> dict[str, Any]:
        """The arguments of `load_pipeline` that it says."""
        axes = self.axes()
        mode = axes.get("guidance_modes", (None,))[0]
        return {
            "model": self.model,
            "backend": self.backend,
            "decoder": self.decoder,
            "batch": self.batch,
            "weights": axes.get("weights"),
            "dtype": axes.get("dtype"),
            "size": axes["size"],
            "low_memory": self.low_memory,
            "scheduler": self.scheduler,
            "guidance": axes.get("guidance"),
            "guidance_mode": mode,
        }

    @property
    def is_folder(self) -> bool:
        """Whether `model` is the folder of a bundle."""
        return os.sep in self.model

    @property
    def guidance_axes(self) -> dict[str, Any]:
        """The guidance, where there is some."""
        if self.guidance_mode == "none":
            return {}
        split = {} if self.guidance_mode == "embedding" else {
            "guidance_modes": (self.guidance_mode,)
        }  # fmt: skip
        return {"guidance": self.guidance, **split}

    def elsewhere(self, bundle_hash: str = "") -> str:
        """What a person should know where it was measured on something else; "" where not."""
        place, run = self.measured["place"], self.measured["run"]
        reasons = []
        if self.measured["provenance"] != "measured":
            reasons.append(f"its figures are {self.measured['provenance']}")
        elif self.measured["machine"] != this_machine():
            reasons.append(f"it was measured on {place} (run {run}), and this is another machine")
        if bundle_hash and bundle_hash != self.bundle:
            reasons.append("its bundle was another one")
        if not reasons:
            return ""
        return (
            f"the recipe's figures may not hold here: {'; '.join(reasons)}; addbench choose"
            f" --model {self.model} measures here"
        )


TABLES = ("measured", "figures", "wanted")
TAKEN = tuple(each.name for each in fields(LockedRecipe) if each.name not in TABLES)


def quoted(value: Any) -> str:
    """A value as TOML writes it, which is as JSON does for texts, numbers and lists of them."""
    return json.dumps(value, ensure_ascii=False)


def seal(tables: Mapping[str, Any]) -> str:
    """The seal of a recipe's tables."""
    return sha256_json(tables)[:16]


def refuse(path: Path, why: str) -> NoReturn:
    """Refuse a file."""
    raise PreconditionError(
        f"{path} is no recipe that can be followed", why,
        "choose again: addbench choose RUN --save recipe.toml; or pass its flags by hand",
    )  # fmt: skip


def refuse_beside(given: Iterable[str]) -> None:
    """Refuse arguments that a recipe says too."""
    names = list(given)
    if names:
        raise PreconditionError(
            f"{', '.join(names)} beside a recipe", "the recipe says that, and was measured with it",
            f"drop {names[0]}, or the recipe",
        )  # fmt: skip
