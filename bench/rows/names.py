"""Names of published runs: what people write in place of a time and a random end."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from core.errors import AddbenchError

INDEX = "index.toml"
"""Beside the run folders: `name = "run"`, one line each."""
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def names_in(folder: Path) -> dict[str, str]:
    """Name -> run, as the index of a folder of runs has them; nothing without one.

    Raises:
        AddbenchError: the index cannot be read, or gives a run two names.
    """
    file = folder / INDEX
    if not file.is_file():
        return {}
    try:
        names = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AddbenchError(
            f"{file} cannot be read", str(error), 'have lines of `name = "run"` in it'
        ) from error
    runs = list(names.values())
    for name, run in names.items():
        if not isinstance(run, str) or not NAME.fullmatch(name):
            raise AddbenchError(
                f"{file} says {name} = {run!r}",
                "a name is lower-case words with hyphens, a run is the text of its folder's name",
                'have lines of `name = "run"` in it',
            )
        if runs.count(run) > 1:
            raise AddbenchError(
                f"{file} gives run {run} two names", "a run has one", "remove one of the lines"
            )
    return names


def label_of(path: Path) -> str:
    """The name of a run's folder in the index beside it, or else the folder's own."""
    by_run = {run: name for name, run in names_in(path.parent).items()}
    return by_run.get(path.name, path.name)


def index_text(old: str, names: Mapping[str, str]) -> str:
    """The index with `names` added or changed; the rest of its lines stay as they are."""
    kept = [
        line
        for line in old.splitlines()
        if line.partition("=")[0].strip() not in names
        and line.partition("=")[2].strip().strip('"') not in names.values()
    ]
    return "\n".join([*kept, *(f'{name} = "{run}"' for name, run in names.items())]) + "\n"
