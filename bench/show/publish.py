"""Copy runs into results/published and redraw from there; hold what is committed to it.

What is committed - tables, plots, the blocks of README and docs - is derived from
`results/published` alone; the picture of `addbench claims --coverage` is derived from the published
figures and the models. All is written, or nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.limits import frontier
from bench.rows.fields import OK
from bench.rows.header import HEADER
from bench.rows.names import INDEX, NAME, index_text, names_in
from bench.rows.store import (
    ABSOLUTE_PATH,
    ROWS,
    Run,
    last_rows,
    open_run,
    published_runs,
    run_names,
)
from bench.show import canvas, latency, quality, schema, stages, strength, sums, table
from bench.show import frontier as frontier_plot
from bench.show.blocks import Drawn, Published, disagreements, fill, since_then
from bench.show.coverage import fresh_pictures
from bench.show.sums import PUBLISHED
from bench.verdict import speedup
from core.errors import PreconditionError
from core.files import ROOT, json_bytes, write_atomic, write_together

RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def private(value: Any) -> Iterator[str]:
    """Strings in a JSON value that hold a path of somebody's machine."""
    if isinstance(value, str):
        if ABSOLUTE_PATH.search(value):
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from private(item)
    elif isinstance(value, list):
        for item in value:
            yield from private(item)


def copied(target: Run, results: Path) -> dict[Path, bytes]:
    """The files that publish a whole run; the later of two rows for one cell and round stays.

    Raises:
        PreconditionError: cells are missing or failed to be measured, or a path would get out.
    """
    rows = last_rows(target.all_rows())
    missing = target.missing(rows)
    if missing:
        raise PreconditionError(
            f"run {target.name} is not complete: {len(missing)} cells are missing",
            f"the first is {missing[0][0]}",
            f"addbench sweep --resume {target.argument}",
        )
    if not any(row["status"] == OK for row in rows):
        raise PreconditionError(
            f"run {target.name} has no row that is ok", "there is nothing to show", "sweep again"
        )
    for text in (*private(target.header.as_json()), *private(rows)):
        raise PreconditionError(
            f"run {target.name} holds a path of this machine: {text[:200]!r}",
            "published rows go to everyone",
            f"edit it out of {HEADER} or {ROWS}",
        )
    folder = results / PUBLISHED / target.name
    if target.path.resolve() == folder.resolve():  # published again as it lies there
        return {folder / name: (folder / name).read_bytes() for name in (ROWS, HEADER)}
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return {folder / ROWS: lines.encode(), folder / HEADER: json_bytes(target.header.as_json())}


def publish(
    targets: Sequence[Run],
    results: Path,
    pages: Sequence[Path],
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """Add runs to what is published and draw all of it again; the names of what was drawn.

    `names`: what to call them from now on, name -> run.

    It is drawn aside first: what cannot be drawn, or a page that asks for another run, leaves
    everything as it was.

    Raises:
        PreconditionError: a run cannot be published, or a page cannot be filled.
        AddbenchError: another published run is not as it was published.
    """
    contents: dict[Path, bytes] = {}
    for target in targets:
        contents |= copied(target, results)
    runs = {target.name for target in targets}
    sums.verify(results, besides=runs)
    index = results / PUBLISHED / INDEX
    if names:
        old = index.read_text() if index.exists() else ""
        contents[index] = index_text(old, names).encode()
    with tempfile.TemporaryDirectory() as scratch:
        aside = Path(scratch)
        (aside / PUBLISHED).mkdir()
        if index.exists():
            (aside / PUBLISHED / INDEX).write_bytes(index.read_bytes())
        for name in set(run_names(results / PUBLISHED)) - runs:
            (aside / PUBLISHED / name).symlink_to((results / PUBLISHED / name).resolve())
        for file, data in contents.items():
            write_atomic(aside / file.relative_to(results), data)
        drawn = derive(aside, aside)
        derived = sorted(derived_files(aside))
        contents |= {results / name: (aside / name).read_bytes() for name in derived}
        contents[results / sums.SUMS] = sums.text(aside).encode()
    if (described := stale_schema(results)) is not None:
        contents[results / "README.md"] = described.encode()
    fresh = fresh_pages(pages, results, drawn)
    contents |= {page: text.encode() for page, text in fresh.items()}
    contents |= fresh_pictures(pages)
    write_together(contents)
    return derived


def derive(results: Path, into: Path) -> Drawn:
    """Tables and plots of every published run into `into`; what pages show of them."""
    published = results / PUBLISHED
    drawn: list[Published] = []
    pairs = []
    for target in published_runs(published):
        rows, label = target.rows(), target.label
        write_atomic(into / "tables" / f"{label}.md", table.page(target, rows))
        write_atomic(into / "tables" / f"{label}.csv", table.csv(rows))
        latency.draw([(target, rows)], into / "plots" / label)
        if strength.has_curve(rows):
            drawn_from = strength.figure(rows, quality.machine_of([target]))
            canvas.save(drawn_from, into / "plots" / f"{label}-strength")
        brief = table.markdown(target, rows, brief=True)
        base = (target.header.versus or {}).get("base")
        if base and (published / base / HEADER).exists():
            brief = speedup.markdown(speedup.result(open_run(base, published), target))
            pairs.append(len(drawn))
        drawn.append(Published(target, label, rows, brief, stages.markdown(target, rows)))
    for place in pairs:  # what came after them is known now
        pair = drawn[place]
        notes = "".join(f"{note}\n" for note in since_then(Drawn(drawn), pair))
        drawn[place] = replace(pair, brief=pair.brief + notes)
        write_atomic(into / "tables" / f"{pair.label}-versus.md", drawn[place].brief)
    chart = frontier.from_runs([each.run for each in drawn])
    if chart is not None:
        frontier_plot.write(chart, into / "tables" / "frontier", into / "plots" / "frontier")
    return Drawn(drawn)


def names_for(targets: Sequence[Run], names: Sequence[str]) -> dict[str, str]:
    """Name -> run for runs and their names in the same order; none for no names.

    Raises:
        PreconditionError: there is not a name for each, or one is none.
    """
    if names and len(names) != len(targets):
        raise PreconditionError(
            f"{len(names)} names for {len(targets)} runs",
            "each run has one, in the order of the runs",
            "give --name once for each run, or for none",
        )
    for name in names:
        if not NAME.fullmatch(name):
            raise PreconditionError(
                f"{name!r} is not a run's name", "it is lower-case words with hyphens",
                "one like cpu-zen4-peers",
            )  # fmt: skip
    return {name: target.name for name, target in zip(names, targets, strict=bool(names))}


def stale_schema(results: Path) -> str | None:
    """The page of the results' columns as it should be; None where it is, or there is none."""
    page = results / "README.md"
    text = page.read_text() if page.exists() else ""
    return None if schema.filled(text) == text else schema.filled(text)


def fresh_pages(pages: Sequence[Path], results: Path, drawn: Drawn) -> dict[Path, str]:
    """The text of each page whose blocks are not as they should be."""
    changed = {}
    for page in pages:
        if not page.is_file():
            raise PreconditionError(
                f"there is no page {page}", "--pages names it", "check the path, or make the file"
            )
        try:
            text = page.read_text()
        except UnicodeDecodeError as error:
            raise PreconditionError(
                f"{page} is no page", str(error), "pass Markdown in UTF-8 with --pages"
            ) from error
        way = Path(os.path.relpath(results, page.parent)).as_posix()
        if (wanted := fill(text, drawn, way)) != text:
            changed[page] = wanted
    return changed


def stale(results: Path, pages: Sequence[Path]) -> list[str]:
    """What differs from a fresh derivation, relative to `results`.

    A PNG only has to exist: its pixels depend on the libraries that rasterise it.

    Raises:
        AddbenchError: a published run is not as it was published.
    """
    sums.verify(results)
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        drawn = derive(results, fresh)
        wanted = derived_files(fresh)
        found = derived_files(results)
        problems = [f"{name}: missing" for name in sorted(wanted - found)]
        problems += [f"{name}: of no published run, remove it" for name in sorted(found - wanted)]
        problems += [
            f"{name}: differs"
            for name in sorted(wanted & found)
            if not name.endswith(".png")
            and (fresh / name).read_bytes() != (results / name).read_bytes()
        ]
    if sums.read(results) != sums.of(results):
        problems.append(f"{sums.SUMS}: lists runs that are gone")
    published = results / PUBLISHED
    gone = set(names_in(published).values()) - set(run_names(published))
    problems += [f"{PUBLISHED}/{INDEX}: names run {run}, which is gone" for run in sorted(gone)]
    if stale_schema(results) is not None:
        problems.append("README.md: its tables of columns differ")
    differ = fresh_pages(pages, results, drawn)
    problems += [f"{page.name}: its results block differs" for page in differ]
    problems += [f"{file.name}: differs" for file in fresh_pictures(pages)]
    contradicted = (disagreements(page.read_text(), drawn) for page in pages)
    return [*problems, *(problem for found in contradicted for problem in found)]


def derived_files(folder: Path) -> set[str]:
    return {
        str(file.relative_to(folder))
        for kind in ("tables", "plots")
        for file in (folder / kind).glob("*")
        if file.is_file() and not file.name.startswith(".")
    }
