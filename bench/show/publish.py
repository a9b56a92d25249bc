"""`addbench publish RUN...`: copy runs into results/published and redraw from there.

What is committed - tables, plots, the blocks of README and docs - is derived from
`results/published` alone; `--check` derives it again and says whether it still matches, and whether
the published rows are as they were published (exit code 4 if not). All is written, or nothing.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows.header import HEADER
from bench.rows.store import (
    ABSOLUTE_PATH,
    OK,
    ROWS,
    RUNS,
    Run,
    last_rows,
    open_run,
    read_rows,
    run_names,
)
from bench.show import sums
from bench.show.sums import PUBLISHED
from core.cli import Parser, run
from core.errors import EXIT_FAILED, EXIT_OK, PreconditionError
from core.files import ROOT, json_bytes, write_atomic, write_together

RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(<!-- (?P<kind>results|stages)(?: (?P<run>[\w-]+))? -->\n).*?(<!-- /(?P=kind) -->)", re.DOTALL
)
"""A block of a page that is derived: `<!-- results -->` shows the newest published sweep,
`<!-- results RUN -->` that run; the head's of `addbench versus` with the ratios.
`<!-- stages RUN -->` shows its stages."""


@dataclass(frozen=True)
class Drawn:
    """What pages show of the published runs, by name; `newest`: for a block that names none."""

    briefs: Mapping[str, str]
    stages: Mapping[str, str]
    newest: str | None


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
            f"addbench sweep --resume {target.name}",
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


def publish(targets: Sequence[Run], results: Path, pages: Sequence[Path]) -> list[str]:
    """Add runs to what is published and draw all of it again; the names of what was drawn.

    It is drawn aside first: what cannot be drawn, or a page that asks for another run, leaves
    everything as it was.

    Raises:
        PreconditionError: a run cannot be published, or a page cannot be filled.
        AddbenchError: another published run is not as it was published.
    """
    contents: dict[Path, bytes] = {}
    for target in targets:
        contents |= copied(target, results)
    names = {target.name for target in targets}
    sums.verify(results, besides=names)
    with tempfile.TemporaryDirectory() as scratch:
        aside = Path(scratch)
        (aside / PUBLISHED).mkdir()
        for name in set(run_names(results / PUBLISHED)) - names:
            (aside / PUBLISHED / name).symlink_to((results / PUBLISHED / name).resolve())
        for file, data in contents.items():
            write_atomic(aside / file.relative_to(results), data)
        drawn = derive(aside, aside)
        derived = sorted(derived_files(aside))
        contents |= {results / name: (aside / name).read_bytes() for name in derived}
        contents[results / sums.SUMS] = sums.text(aside).encode()
    fresh = fresh_pages(pages, results, drawn)
    contents |= {page: text.encode() for page, text in fresh.items()}
    write_together(contents)
    return derived


def derive(results: Path, into: Path) -> Drawn:
    """Tables and plots of every published run into `into`; what pages show of them."""
    from bench.limits import frontier
    from bench.show import latency as plot
    from bench.show import stages, table
    from bench.verdict import speedup

    published = results / PUBLISHED
    briefs, by_stage, runs = {}, {}, []
    for name in run_names(published):
        target = open_run(str(published / name), published)
        rows = last_rows(read_rows(target.path / ROWS))
        text = f"# Run {name}\n\n{table.markdown(target, rows)}"
        write_atomic(into / "tables" / f"{name}.md", text)
        write_atomic(into / "tables" / f"{name}.csv", table.csv(rows))
        plot.draw(target, rows, into / "plots" / name)
        brief = table.markdown(target, rows, brief=True)
        base = (target.header.versus or {}).get("base")
        if base and (published / base / HEADER).exists():
            brief = speedup.markdown(speedup.result(open_run(base, published), target))
            write_atomic(into / "tables" / f"{name}-versus.md", brief)
        briefs[name], by_stage[name] = brief, stages.markdown(target, rows)
        runs.append(target)
    chart = frontier.from_runs(runs)
    if chart is not None:
        frontier.write(chart, into / "tables" / "frontier", into / "plots" / "frontier")
    return Drawn(briefs, by_stage, newest_sweep(runs))


def newest_sweep(runs: Sequence[Run]) -> str | None:
    """What a block without a name shows: a sweep, not one side of a comparison."""
    names = [run.name for run in runs if run.header.versus is None]
    return max(names, default=None)


def block(name: str, table_text: str, results: str) -> str:
    """What a page shows of a run: its conditions, its table, its plot, and where more is."""
    return (
        f"{table_text}\n![Latency and images per second against steps]({results}/plots/{name}.svg)"
        f"\n\nMore columns: [results/tables/{name}.md]({results}/tables/{name}.md); rows:"
        f" [results/published/{name}]({results}/published/{name}).\n"
    )


def fill(text: str, drawn: Drawn, results: str) -> str:
    """A page with every derived block redrawn; `results` is the way there from the page."""

    def fresh(found: re.Match[str]) -> str:
        name = found["run"] or drawn.newest
        if name is None:
            return found[0]  # nothing is published yet
        if name not in drawn.briefs:
            raise PreconditionError(
                f"a page asks for the results of run {name}",
                f"results/published holds: {', '.join(drawn.briefs) or 'nothing'}",
                "publish that run, or change the marker",
            )
        by_stage = found["kind"] == "stages"
        shown = drawn.stages[name] if by_stage else block(name, drawn.briefs[name], results)
        return f"{found[1]}{shown}{found[4]}"

    return BLOCK.sub(fresh, text)


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
    differ = fresh_pages(pages, results, drawn)
    return [*problems, *(f"{page.name}: its results block differs" for page in differ)]


def derived_files(folder: Path) -> set[str]:
    return {
        str(file.relative_to(folder))
        for kind in ("tables", "plots")
        for file in (folder / kind).glob("*")
        if file.is_file() and not file.name.startswith(".")
    }


def parser() -> Parser:
    top = Parser(prog="addbench publish", description=__doc__)
    top.add_argument("runs", nargs="*", metavar="RUN|latest", help="none: only redraw")
    top.add_argument("--check", action="store_true", help="write nothing; 4 if something is stale")
    top.add_argument("--out", type=Path, default=RUNS, help="where runs lie (results/runs)")
    top.add_argument("--results", type=Path, default=RESULTS, help="where results are published")
    top.add_argument(
        "--pages", type=Path, nargs="+", default=PAGES, help="with marked blocks (README and docs)"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.check:
        if args.runs:
            raise PreconditionError(
                "--check takes no run", "it checks what is published", "drop the run"
            )
        problems = stale(args.results, args.pages)
        for problem in problems:
            print(f"stale: {problem}")
        if problems:
            print("redraw with: addbench publish")
        else:
            print("the published rows are as they were published; tables and plots match them")
        return EXIT_FAILED if problems else EXIT_OK
    targets = [open_run(name, args.out) for name in args.runs]
    derived = publish(targets, args.results, args.pages)
    for name in dict.fromkeys(target.name for target in targets):
        print(f"published: {args.results / PUBLISHED / name}")
    print(f"redrawn: {len(derived)} files in {args.results / 'tables'}, {args.results / 'plots'}")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run(main))
