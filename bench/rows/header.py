"""The header of a run: what holds for all its rows. Made once, written with the run.

What is known later (a ceiling that was measured again) is said by a new header, which takes its
place: `Run.with_header(dataclasses.replace(header, ...))`. That of a published run never changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from bench.rows.cell import Cell
from bench.rows.fields import BY_NAME, KEY_COLUMNS, LATER, SCHEMA, UNSAID
from bench.rows.types import WORDS
from core.errors import PreconditionError, no_text
from core.files import read_json

HEADER = "header.json"
NEEDED: dict[str, tuple[type, tuple[str, ...]]] = {
    "run": (str, ()),
    "command": (list, ()),
    "settings": (dict, ("rounds", "min_samples", "min_time", "max_time")),
    "bundle": (dict, ("name", "weights", "dtype", "hash")),
    "backends": (dict, ()),
    "environment": (dict, ("machine", "cpu", "cores_allowed", "cores_physical", "memory_gb", "os",
                           "python", "versions")),
    "plan": (list, ()),
}  # fmt: skip
"""What every reader of a run takes from its header: field -> (type, names in it)."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What holds for all rows of a run, as results/README.md describes it.

    Attributes:
        command: as it was typed, paths shortened.
        settings: how each cell was measured: rounds, samples, times.
        plan: the cells, in the order of measurement.
        bundle: name, weights, dtype, licence and hash of what was measured.
        backends: what the probe of each said, and the options that counted.
        environment: the machine and its packages.
        images: False where a modelled run made none.
        git_commit, git_dirty: the checkout that began the run; None outside of git.
        roofline: ceilings of the machine and costs of the parts; None where they were not measured.
        versus, ab: which side of a pair this run is; None for a sweep.
        fleet: which machine of which sweep over a fleet this run is of; None for others.
        run, created_utc: its name and when it began; "" until `create_run` gives them.
        unsaid: fields that the file does not hold, as of runs from before they existed.
        extra: what a later version said that this one does not know.
    """

    command: Sequence[str]
    settings: Mapping[str, Any]
    plan: tuple[Cell, ...]
    bundle: Mapping[str, Any]
    backends: Mapping[str, Any]
    environment: Mapping[str, Any]
    images: bool = True
    git_commit: str | None = None
    git_dirty: bool | None = None
    roofline: Mapping[str, Any] | None = None
    versus: Mapping[str, Any] | None = None
    ab: Mapping[str, Any] | None = None
    fleet: Mapping[str, Any] | None = None
    run: str = ""
    created_utc: str = ""
    schema: int = SCHEMA
    unsaid: frozenset[str] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return int(self.settings["rounds"])

    @property
    def machine(self) -> str:
        """A hash that tells machines apart without naming one."""
        return str(self.environment["machine"])

    def as_json(self) -> dict[str, Any]:
        """The header as its file holds it."""
        left_out = {*ABOUT, *self.unsaid} | {name for name in PAIRED if not getattr(self, name)}
        values = {name: getattr(self, name) for name in FIELDS if name not in left_out}
        plan = [
            {
                name: value
                for name, value in cell.columns().items()
                if name not in UNSAID or value != UNSAID[name]
            }
            for cell in self.plan
        ]
        return {**values, "plan": plan, **self.extra}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """The header that a file's JSON says; `fault_of` must have found nothing wrong with it."""
        known = {name: said[name] for name in FIELDS if name in said and name not in ABOUT}
        return cls(
            **known | {"plan": tuple(Cell.of(columns) for columns in said["plan"])},
            unsaid=frozenset(OPTIONAL - said.keys()),
            extra={name: value for name, value in said.items() if name not in FIELDS},
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """The header in a file.

        Raises:
            PreconditionError: it was written by another schema, or is no header.
        """
        said = read_json(path)
        schema = said.get("schema") if isinstance(said, dict) else None
        if schema != SCHEMA:
            raise PreconditionError(
                f"{path} has schema {schema!r}",
                f"this version reads and writes schema {SCHEMA}",
                "use the version that wrote it, or sweep again",
            )
        name = path.parent.name
        if why := no_text(json.dumps(said, ensure_ascii=False)):
            raise PreconditionError(
                f"the header of run {name} is not valid text",
                why,
                "restore the file, or take runs that addbench sweep, ab or versus made",
            )
        if fault := fault_of(said):
            raise PreconditionError(
                f"the header of run {name} has no {fault}",
                "it was not written by addbench sweep, or was edited",
                "take runs that addbench sweep, ab or versus made",
            )
        return cls.of(said)


ABOUT = ("unsaid", "extra")
"""Fields that are about the file and not in it."""
PAIRED = ("versus", "ab", "fleet")
"""Fields of runs that belong with others: no other header says them, not even as null."""
FIELDS = tuple(each.name for each in fields(Header))
OPTIONAL = {*FIELDS} - {*ABOUT, *PAIRED, *NEEDED}


def fault_of(said: Mapping[str, Any]) -> str | None:
    """What a header's JSON lacks, or has as something else; None for nothing."""
    for name, (kind, inside) in NEEDED.items():
        if not isinstance(said.get(name), kind):
            return f"{name} ({WORDS[kind]})"
        for key in inside:
            if key not in said[name]:
                return f"{name}.{key}"
    if type(said["settings"]["rounds"]) is not int:
        return f"settings.rounds ({WORDS[int]})"
    right = set()
    for place, cell in enumerate(said["plan"]):
        if not isinstance(cell, dict):
            return f"plan[{place}] ({WORDS[dict]})"
        kinds = (*cell, *map(type, cell.values()))
        if kinds in right:
            continue
        for column in KEY_COLUMNS:
            if column not in LATER and column not in cell:
                return f"plan[{place}].{column}"
            if column in cell and type(cell[column]) not in BY_NAME[column].types:
                return f"plan[{place}].{column} ({WORDS[BY_NAME[column].types[-1]]})"
        right.add(kinds)
    return None
