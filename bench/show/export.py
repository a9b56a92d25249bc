"""A run's rows as other programs read them.

parquet: a line per cell and round, every column of results/README.md with its type; the run's
header lies in the file's metadata as `header`. Needs pyarrow.
github: the JSON of github-action-benchmark's `customSmallerIsBetter` tool, a latency per cell.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.rows.fields import FIELDS, LATER
from bench.rows.header import HEADER, Header
from bench.rows.kinds import NUMBER, TEXT, TRUTH, WHOLE, Kind, Leaf, ListOf, MapOf
from bench.rows.store import ROWS, Row, Run
from bench.rows.summary import CellRounds, by_cell
from bench.verdict.compare import gather
from core.errors import AddbenchError, PreconditionError

if TYPE_CHECKING:
    import pyarrow


def schema(header: Header) -> pyarrow.Schema:
    """The type of every column.

    Types are stated, not found: a run in which all p90 are null still has a column of numbers.
    """
    import pyarrow as pa

    plain = {TEXT: pa.string(), WHOLE: pa.int64(), NUMBER: pa.float64(), TRUTH: pa.bool_()}

    def arrow(kind: Kind) -> pa.DataType:
        if isinstance(kind, Leaf):
            return plain[kind]
        if isinstance(kind, ListOf):
            return pa.list_(arrow(kind.of))
        if isinstance(kind, MapOf):
            return pa.map_(pa.string(), arrow(kind.of))
        return pa.struct([(name, arrow(inner)) for name, inner in kind.of.items()])

    columns = [(field.name, arrow(field.kind)) for field in FIELDS]
    return pa.schema(columns, metadata={"header": json.dumps(header.as_json())})


def parquet(target: Run) -> bytes:
    """The rows that count as one parquet table.

    Raises:
        PreconditionError: pyarrow is not installed.
        AddbenchError: a row holds a value of another type than its column has.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise PreconditionError(
            "parquet needs the package pyarrow",
            str(error),
            "python -m pip install pyarrow, or `.[parquet]` of this checkout",
        ) from error
    try:
        table = pa.Table.from_pylist(some_rows(target), schema=schema(target.header))
    except pa.ArrowException as error:
        raise AddbenchError(
            f"a row of run {target.name} does not fit the schema",
            str(error),
            f"mend {ROWS}; results/README.md has the type of every column",
        ) from error
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def some_rows(target: Run) -> list[Row]:
    """The rows that count.

    Raises:
        PreconditionError: there is none.
        AddbenchError: a line is not a row, or a cell was measured twice in one round.
    """
    gather(target.all_rows(), target.name)
    rows = target.rows()
    if not rows:
        raise PreconditionError(
            f"run {target.name} has no rows",
            "no cell was finished",
            f"addbench sweep --resume {target.argument}",
        )
    return rows


def by_provenance(rows: Sequence[Row]) -> dict[str, list[CellRounds]]:
    """A line per cell, figures of different provenance apart: no median mixes two."""
    kinds = dict.fromkeys(row["provenance"] for row in rows)
    return {kind: by_cell([r for r in rows if r["provenance"] == kind]) for kind in kinds}


def smaller_is_better(target: Run) -> bytes:
    """The latency of every cell that is ok, as github-action-benchmark takes them."""
    rows = some_rows(target)
    lines = [line for found in by_provenance(rows).values() for line in found]
    left_out = [line for line in lines if line.median("median_ms") is None]
    if len(left_out) == len(lines):
        raise PreconditionError(
            f"no cell of run {target.name} is ok",
            f"the first: {left_out[0].cell}: {left_out[0].status}, {left_out[0].provenance}",
            f"measure them again: addbench sweep --resume {target.argument} --retry-failed",
        )
    for line in left_out:
        print(f"left out: {line.cell}: {line.status}, {line.provenance}", file=sys.stderr)
    entries = [entry(target, line) for line in lines if line.median("median_ms") is not None]
    return (json.dumps(entries, indent=2, allow_nan=False) + "\n").encode()


def entry(target: Run, line: CellRounds) -> dict[str, Any]:
    """One figure. Its name is the whole cell, so that a series never joins two of them."""
    said = [
        f"{name} {value}"
        for name, value in line.cell.columns().items()
        # What goes without saying is left out: a series keeps its name when a column is added.
        if name != "backend" and value != LATER.get(name, "")
    ]
    name = ", ".join([line.cell.backend, *said])
    extra = [
        f"run {target.name}",
        f"commit {line.good[0]['git_commit']}",
        f"samples {sum(len(row['samples_ms']) for row in line.good)}, rounds {len(line.good)}",
        f"provenance {line.provenance}",
    ]
    if line.flags:
        extra.append(f"flags {line.flags}")
    found = {
        "name": name if line.provenance == "measured" else f"{name} ({line.provenance})",
        "unit": "ms",
        "value": line.median("median_ms"),
        "extra": "\n".join(extra),
    }
    spread = spread_ms(line)
    return found if spread is None else {**found, "range": f"± {spread:.3g}"}


def spread_ms(line: CellRounds) -> float | None:
    """Standard deviation of the rounds' medians, or of the samples where there is one round.

    Optimistic in the second case: samples of one process do not see the spread between processes.
    """
    medians = [row["median_ms"] for row in line.good]
    return statistics.stdev(medians) if len(medians) > 1 else line.median("sd_ms")


def output_file(path: Path, targets: Sequence[Run]) -> Path:
    """`path`, if a derived file may be written there: never over a run's own header and rows."""
    if path.is_dir():
        raise PreconditionError(
            f"{path} is a folder", "one file is written", f"--out {path / 'FILE'}"
        )
    measured = {(run.path / name).resolve() for run in targets for name in (HEADER, ROWS)}
    if path.resolve() in measured:
        raise PreconditionError(
            f"{path} is what was measured", "it would be overwritten", "pass another --out"
        )
    return path
