"""Rows: append, read, resume. A run is a folder with a header and `rows.jsonl`.

Columns are those of `bench.rows.fields`; results/README.md is derived from them.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Self

from bench.rows.cell import Cell
from bench.rows.fields import (
    COLUMNS,
    CONTEXT,
    EMULATED,
    FIGURES,
    MODELLED,
    NUMERICS,
    OK,
    OLDER,
    SCHEMA,
    STATUSES,
)
from bench.rows.header import HEADER, Header
from bench.rows.names import label_of, names_in
from bench.rows.types import Types
from core.errors import AddbenchError, PreconditionError, no_text
from core.files import ROOT, build_root, fsync_folder, write_json

ROWS = "rows.jsonl"
LATEST = "latest"
RUNS = ROOT / "results" / "runs"
PUBLISHED = ROOT / "results" / "published"

COLUMN_SET = frozenset(COLUMNS)
TYPES = Types()

Row = dict[str, Any]


def make_row(cell: Cell, round_: int, context: Mapping[str, Any], result: Mapping[str, Any]) -> Row:
    """A whole row. `context` has `run` and CONTEXT, `provenance` where `result` may not say it;
    `result` a status and what FIGURES it knows."""
    row: Row = {
        "schema": SCHEMA,
        "row": secrets.token_hex(6),
        "run": context["run"],
        "round": round_,
        "status": result["status"],
        "provenance": result.get("provenance") or context.get("provenance", "measured"),
        **cell.columns(),
        **FIGURES,
        **{name: context[name] for name in CONTEXT if name != "time_utc"},
        "time_utc": result.get("time_utc") or now_utc(),
    }
    kept = NUMERICS if row["provenance"] == EMULATED else FIGURES
    row |= {name: result[name] for name in kept if name in result}
    if row["error"]:
        row["error"] = {key: portable(text) for key, text in row["error"].items()}
    return {name: row[name] for name in COLUMNS}


def now_utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# A path of two parts at least, not inside a word: `images/s` and `and/or` are none.
ABSOLUTE_PATH = re.compile(r"(?<![\w./~])/(?:[\w.+@-]+/)+([\w.+@-]*)")


def portable(text: str) -> str:
    """`text` without this machine's folders: rows are published, paths are nobody's business.

    What is no text, as of a file's name that a library complains about, is written out.
    """
    text = text.encode(errors="backslashreplace").decode()
    for folder, name in ((build_root(), "build"), (ROOT, "."), (Path.home(), "~")):
        text = re.sub(re.escape(str(folder)) + r"(?![\w-])", name, text)
    return ABSOLUTE_PATH.sub(r".../\1", text)


def reject(path: Path, line: int, why: str) -> NoReturn:
    raise AddbenchError(
        f"{path}:{line} is not a row",
        why,
        "restore the file, or remove that line if it is not from a sweep",
    )


def check_row(row: Any, path: Path, line: int) -> Row:
    """The row, if it is one of this schema; otherwise an AddbenchError that names file and line."""
    if not isinstance(row, dict):
        reject(path, line, "it is JSON, but not an object")
    if "schema" not in row:
        reject(path, line, "it has no `schema`")
    if row["schema"] != SCHEMA or row["schema"] is True:
        reject(path, line, f"its schema is {row['schema']!r} and this version reads {SCHEMA}")
    if not row.keys() >= COLUMN_SET:
        row = OLDER | row
    if not row.keys() >= COLUMN_SET:
        missing = [name for name in COLUMNS if name not in row]
        reject(path, line, f"it lacks {', '.join(missing)}")
    wrong = TYPES.wrong(row)
    if wrong:
        reject(path, line, wrong)
    if row["status"] not in STATUSES:
        reject(path, line, f"its status {row['status']!r} is none of {', '.join(STATUSES)}")
    samples = row["samples_ms"]
    if samples and not (set(map(type, samples)) <= {int, float} and are_times(samples)):
        reject(path, line, "samples_ms must be a list of positive, finite milliseconds")
    if row["provenance"] == EMULATED:
        timed = [name for name in FIGURES if name not in NUMERICS and row[name] != FIGURES[name]]
        if timed:
            reject(path, line, f"it is emulated, which has no speed, and has {', '.join(timed)}")
    elif row["status"] == OK and not (
        (samples or row["provenance"] == MODELLED) and are_times([row["median_ms"] or 0])
    ):
        reject(path, line, "its status is ok and it has no samples or no median")
    return row


def is_timed(row: Row) -> bool:
    """Whether the cell is ok and a time was taken: rows of an emulation have none."""
    return row["status"] == OK and row["median_ms"] is not None


def are_times(values: Sequence[float]) -> bool:
    """Whether all of some numbers are positive and finite; NaN is no JSON and never gets here."""
    return min(values) > 0 and max(values) <= sys.float_info.max


def no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


DECODER = json.JSONDecoder(parse_constant=no_constant)
"""One for all lines: `json.loads` would make one for each."""


def read_rows(path: Path) -> list[Row]:
    """Every row of a `rows.jsonl`, in order. A torn last line (no newline) is left out.

    Raises:
        AddbenchError: a line that is not a row, named.
    """
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            continue
        try:
            row = DECODER.decode(line.decode())
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
            if number == len(lines):
                break  # the writer was killed in the middle of it
            reject(path, number, f"it is not JSON: {error}")
        if b"\\ud" in line.lower() and (why := no_text(json.dumps(row, ensure_ascii=False))):
            reject(path, number, why)
        rows.append(check_row(row, path, number))
    return rows


def is_noisy(row: Row) -> bool:
    """Whether a time was taken that other programs disturbed, or that its samples leave open."""
    return is_timed(row) and not {"disturbed", "unstable"}.isdisjoint(row["flags"])


def last_rows(rows: Iterable[Row]) -> list[Row]:
    """One row per cell and round: of several attempts the calm one, of equals the last.

    A failed attempt is replaced by a later one; a good one only by one that is no noisier.
    """
    latest: dict[tuple[Cell, int], Row] = {}
    for row in rows:
        key = Cell.of(row), row["round"]
        if key not in latest or calmness(row) >= calmness(latest[key]):
            latest[key] = row
    return list(latest.values())


def calmness(row: Row) -> tuple[bool, bool, bool]:
    """What is looked for first in an attempt: that it is good, undisturbed, stable."""
    good, flags = row["status"] == OK, row["flags"]
    return good, good and "disturbed" not in flags, good and "unstable" not in flags


class RowWriter:
    """Appends rows to a run. One writer at a time; a torn last line is cut off first."""

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock, Timeout

        self.path = folder / ROWS
        self._lock = FileLock(folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise PreconditionError(
                f"{folder.name} is being written by another sweep",
                "two writers would measure the same cells twice",
                "wait for it, or start a run of its own (drop --resume)",
            ) from None
        self._file = self.path.open("ab")
        self._repair()

    def _repair(self) -> None:
        content = self.path.read_bytes()
        tail = content.rpartition(b"\n")[2]
        if not tail:
            return
        try:
            json.loads(tail)
        except ValueError:
            self._file.truncate(len(content) - len(tail))
        else:
            self._file.write(b"\n")  # the row is whole, only its end was lost
        self._file.flush()

    def append(self, row: Row) -> None:
        """Write a row and wait until the disk has it.

        Row by row, not at the end: cells take minutes, and whatever ends the sweep - Ctrl-C, the
        OOM killer, a power cut - must not cost what was already measured. The worker is at the next
        cell's cold call meanwhile, and a wait for the disk takes no CPU from it.
        """
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Run:
    """A run folder and its header."""

    path: Path
    header: Header

    @property
    def name(self) -> str:
        return self.header.run

    @property
    def label(self) -> str:
        """What people call it: its name in the index of the published runs, or else its own."""
        return label_of(self.path)

    @property
    def argument(self) -> str:
        """What a command line takes for it: its name, and its folder where that is not RUNS."""
        folder = self.path.parent
        outside = folder.resolve() != RUNS.resolve()
        return self.name + (f" --runs {shlex.quote(str(folder))}" if outside else "")

    @property
    def plan(self) -> list[Cell]:
        return list(self.header.plan)

    @property
    def rounds(self) -> int:
        return self.header.rounds

    def with_header(self, header: Header) -> Run:
        """The run with what is known of it now, written at once."""
        write_json(self.path / HEADER, header.as_json())
        return replace(self, header=header)

    def all_rows(self) -> list[Row]:
        return read_rows(self.path / ROWS) if (self.path / ROWS).exists() else []

    def rows(self) -> list[Row]:
        return last_rows(self.all_rows())

    def missing(self, rows: Sequence[Row] | None = None) -> list[tuple[Cell, int]]:
        """Planned (cell, round) pairs without a row, round by round."""
        have = {(Cell.of(row), row["round"]) for row in (self.rows() if rows is None else rows)}
        return [
            (cell, round_)
            for round_ in range(self.rounds)
            for cell in self.plan
            if (cell, round_) not in have
        ]


def create_run(out: Path, header: Header) -> Run:
    """A new run folder below `out`, named by time, so that the last by name is the latest.

    The folder appears with its header in it, and never takes another's place.
    """
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out, prefix=".new-"))
    os.chmod(scratch, 0o755)
    while True:
        now = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
        name = f"{stamp}-{int(now % 1 * 1000):03d}-{secrets.token_hex(2)}"
        complete = replace(header, run=name, created_utc=now_utc())
        write_json(scratch / HEADER, complete.as_json())
        try:
            os.rename(scratch, out / name)
        except OSError:
            if not (out / name).exists():
                raise
            continue  # the name is taken: draw another
        fsync_folder(out)
        return Run(out / name, complete)


def run_names(out: Path) -> list[str]:
    names = (header.parent.name for header in out.glob(f"*/{HEADER}"))
    return sorted(name for name in names if not name.startswith("."))


def open_run(text: str, out: Path = RUNS) -> Run:
    """`latest`, a run below `out`, a published run, or the path of a run folder.

    A published run is called by its name in the index (`cpu-zen4-peers`) or its folder's.

    Raises:
        PreconditionError: there is no such run, it was written by another schema, or its header is
            not one.
    """
    if text == LATEST:
        names = run_names(out)
        if not names:
            raise PreconditionError(
                "there is no run yet", f"{out} holds none", "make one with `addbench sweep`"
            )
        return open_folder(out / names[-1])
    places = [folder / names_in(folder).get(text, text) for folder in (out, PUBLISHED)]
    for path in (*places, Path(text)):
        if (path / HEADER).exists():
            return open_folder(path)
    own, published = run_names(out), list(names_in(PUBLISHED))
    near = difflib.get_close_matches(text, [*published, *own], 1)
    raise PreconditionError(
        f"{text} is not a run",
        f"there is no {HEADER} in {out / text}"
        + (f"; did you mean {near[0]}?" if near else "")
        + (f"; published runs: {', '.join(published)}" if published else ""),
        "pass a run folder"
        + (" or a published run's name" if published else "")
        + (f", `{LATEST}`, or one of: {', '.join(own[-5:])}" if own else ""),
    )


def open_folder(path: Path) -> Run:
    """The run in a folder that has a header."""
    return Run(path, Header.read(path / HEADER))


def published_runs(folder: Path = PUBLISHED) -> list[Run]:
    """Every run of a folder of published ones, oldest first."""
    return [open_folder(folder / name) for name in run_names(folder)]


def with_siblings(run: Run) -> list[Run]:
    """A run with those of the other machines of its sweep over a fleet; of others, it alone."""
    if run.header.fleet is None:
        return [run]
    folder, siblings = run.path.parent, []
    for name in run_names(folder):
        try:
            other = open_folder(folder / name)
        except AddbenchError:
            continue  # a damaged run beside them is none of theirs
        if (other.header.fleet or {}).get("sweep") == run.header.fleet["sweep"]:
            siblings.append(other)
    return siblings
