"""The hashes of the published runs' files, kept beside them: what is edited by hand is noticed.

`published.sha256` has a line per file, sorted, as `sha256sum --check` reads it. Only publishing a
run writes its lines anew; a redraw does not.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from core.errors import AddbenchError
from core.files import sha256_file

PUBLISHED = "published"
SUMS = f"{PUBLISHED}.sha256"
LINE = re.compile(rf"([0-9a-f]{{64}})  ({PUBLISHED}/[^/]+/[^/]+)")


def of(results: Path) -> dict[str, str]:
    """File of a published run -> its hash, sorted by name."""
    published = results / PUBLISHED
    folders = [folder for folder in published.glob("*") if folder.is_dir()]
    return {
        f"{PUBLISHED}/{folder.name}/{file.name}": sha256_file(file)
        for folder in sorted(folders)
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".")
    }


def text(results: Path) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in of(results).items())


def read(results: Path) -> dict[str, str]:
    """What SUMS says; nothing if there is none.

    Raises:
        AddbenchError: a line of it is none, or names a file that another one named.
    """
    found: dict[str, str] = {}
    file = results / SUMS
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    for number, line in enumerate(lines, start=1):
        parts = LINE.fullmatch(line)
        if parts is None or parts[2] in found:
            raise AddbenchError(
                f"{file}:{number} is not a line of hashes",
                "it was edited by hand, or merged badly",
                "have each line once, `<sha256>  published/<run>/<file>`, as Git's history has it",
            )
        found[parts[2]] = parts[1]
    return found


def verify(results: Path, besides: Collection[str] = ()) -> None:
    """Hold the published runs, but those named in `besides`, against their hashes.

    A run that is gone as a whole was taken down, which is nobody's mistake.

    Raises:
        AddbenchError: a file was changed, added or removed since its run was published.
    """
    recorded, found = read(results), of(results)
    there = {run_of(name) for name in found} - set(besides)
    wrong = [
        name
        for name in sorted({*recorded, *found})
        if run_of(name) in there and recorded.get(name) != found.get(name)
    ]
    if wrong:
        first, more = wrong[0], f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        how = "removed" if first not in found else "changed" if first in recorded else "added"
        raise AddbenchError(
            f"{results / first} was {how}{more}: what is published is not what was measured",
            f"{SUMS} has the hash of each published file, and only publishing its run writes it",
            f"restore it (git checkout -- {results / PUBLISHED}), or publish the run that was"
            f" measured: addbench publish {run_of(first)}",
        )


def run_of(name: str) -> str:
    return name.split("/")[1]
