"""What the page says, section by section, as values for the template."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.check.parity import IMAGE_COLUMNS, PART_COLUMNS
from bench.limits import claims
from bench.limits.ledger import measured, read_claims
from bench.rows.fields import FLAGS, MODELLED, OK
from bench.rows.store import Row, Run, portable
from bench.rows.summary import CellRounds
from bench.show import columns, table
from bench.show.canvas import digits, hue
from bench.show.export import by_provenance, some_rows
from bench.show.latency import legend_text
from bench.show.notes import notes
from bench.show.page import figures
from bench.show.series import series_of
from bench.verdict import outcome
from bench.verdict.compare import compare
from bench.verdict.outcome import Outcome
from core.errors import AddbenchError
from core.files import read_json
from core.table import EMPTY, Column

if TYPE_CHECKING:
    from markupsafe import Markup

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plot:
    """A figure of the page: its markup, and a caption that says what it is made of."""

    title: str
    svg: str
    caption: str
    wide: bool = True


@dataclass(frozen=True)
class Headline:
    """A headline number with all that it must not be quoted without: `lines` are its cells."""

    title: str
    value: str
    unit: str
    lines: Sequence[CellRounds]
    detail: str

    @property
    def flags(self) -> list[str]:
        found = {flag for line in self.lines for row in line.good for flag in row["flags"]}
        return [flag for flag in FLAGS if flag in found]


@dataclass(frozen=True)
class Failure:
    """Rows of one cell that are not ok, for the same reason."""

    line: CellRounds
    status: str
    rounds: Sequence[int]
    error: Mapping[str, str]


def render(target: Run, base: Run | None = None) -> str:
    """The page of a run; the same run gives the same bytes.

    Raises:
        PreconditionError: the run has no rows, or `base` is no base.
        AddbenchError: a line of its rows is not a row.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    rows = some_rows(target)
    groups = by_provenance(rows)
    lines = [line for found in groups.values() for line in found]
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,  # prompts, options and errors are not ours
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = code
    environment.filters["hue"] = hue
    script = (HERE / "page.js").read_text()
    return environment.get_template("page.html").render(
        run=target,
        style=Markup((HERE / "page.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        where=where(target, lines),
        conditions=[text for text in table.conditions(target, lines) if text],
        cards={kind: headlines(found) for kind, found in groups.items()},
        counts=counts(target, rows, lines),
        notes=notes(lines),
        flags={name: FLAGS[name] for name in FLAGS if any(name in r["flags"] for r in rows)},
        brief=brief(lines),
        full=ordered(column for column in columns.COLUMNS if column.says(lines)),
        lines=lines,
        failures=failures(lines),
        missing=target.missing(rows),
        performance=performance(target, rows),
        breakdown=breakdown(groups),
        roofline=roofline(target, rows),
        traces=[(line, figures.trace(line)) for line in lines if columns.samples(line)],
        parity=parity(target),
        claims=claimed(target),
        verdict=None if base is None else verdict(base, target),
        environment=surroundings(target, rows),
    )


def code(text: str) -> Markup:
    """Text for people, with what stands between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


# ---- summary


def where(target: Run, lines: Sequence[CellRounds]) -> str:
    """What the figures are of: this machine, or the cards that were modelled."""
    if any(line.provenance != MODELLED for line in lines):
        return str(target.header.environment["cpu"])
    return f"{', '.join(dict.fromkeys(line.cell.device for line in lines))}, modelled"


def with_interval(line: CellRounds) -> str:
    """The cell, and between what its modelled latency lies."""
    low, high = line.median("low_ms"), line.median("high_ms")
    if low is None or high is None:
        return str(line.cell)
    ends = " to ".join(" ".join(figures.duration(end)) for end in (low, high))
    return f"{line.cell}; a call takes {ends}"


def headlines(lines: Sequence[CellRounds]) -> list[Headline]:
    """The best of the cells that are ok: shortest call, most images, cheapest step."""
    good = [line for line in lines if line.median("median_ms") is not None]
    if not good:
        return []
    fastest = min(good, key=lambda line: line.median("median_ms") or 0.0)
    most = max(good, key=lambda line: line.median("images_per_s") or 0.0)
    shortest = figures.duration(fastest.median("median_ms") or 0.0)
    rate = digits(most.median("images_per_s") or 0.0), "images/s"
    cards = [
        Headline("Shortest call", *shortest, [fastest], with_interval(fastest)),
        Headline("Most images", *rate, [most], with_interval(most)),
    ]
    fits = [
        (series.fit.per_step_ms, batch, series)
        for batch, found in series_of({"": good}).items()
        for series in found
        if series.fit
    ]
    if fits:
        per_step_ms, batch, series = min(fits, key=lambda each: each[0])
        detail = f"{legend_text(series)}, batch {batch}"
        cards.append(
            Headline("Cheapest step", *figures.duration(per_step_ms), series.lines, detail)
        )
    return cards


def counts(target: Run, rows: Sequence[Row], lines: Sequence[CellRounds]) -> str:
    """How much of the plan there is, in a sentence."""
    statuses = Counter(row["status"] for row in rows)
    missing = len(target.missing(rows))
    planned = len(rows) + missing
    bad = [f"{number} {status}" for status, number in sorted(statuses.items()) if status != OK]
    bad += [f"{missing} missing"] if missing else []
    rest = f", {', '.join(bad)}" if bad else ""
    cells, rounds = len({line.cell for line in lines}), target.rounds
    what = "measurements" if {row["provenance"] for row in rows} != {MODELLED} else "modelled cells"
    return (
        f"{cells} cell{'s' * (cells != 1)} in {rounds} round{'s' * (rounds != 1)}:"
        f" {statuses[OK]} of {planned} {what} are ok{rest}."
    )


# ---- the table


FIRST = ("backend", "options", "decoder", "batch", "steps", "status", "flags", "base (ms)",
         "head (ms)", "median (ms)", "low (ms)", "high (ms)", "high, switching (ms)", "period (ms)",
         "images/s", "images/J", "images/J at TDP", "change", "verdict", "reason", "numerics",
         "weights")  # fmt: skip
"""What a phone shows before one scrolls sideways."""


def ordered(columns: Iterable[Column]) -> list[Column]:
    found = {column.header: column for column in columns}
    return [found[name] for name in dict.fromkeys((*FIRST, *found)) if name in found]


def brief(lines: Sequence[CellRounds]) -> list[Column]:
    """The short table's columns, with what the lines differ in."""
    shown = {column.header for column in columns.brief_columns(lines)}
    shown |= set(columns.CONDITIONS) - {column.header for column in columns.columns_for(lines)[1]}
    return ordered(
        column for column in columns.COLUMNS if column.header in shown and column.says(lines)
    )


def failures(lines: Sequence[CellRounds]) -> list[Failure]:
    """What went wrong; rounds that failed alike together."""
    found = []
    for line in lines:
        alike: dict[tuple[Any, ...], list[Row]] = {}
        for row in line.rows:
            if row["status"] != OK:
                error = row["error"] or {}
                alike.setdefault((row["status"], *sorted(error.items())), []).append(row)
        found += [
            Failure(line, rows[0]["status"], [r["round"] + 1 for r in rows], rows[0]["error"] or {})
            for rows in alike.values()
        ]
    return found


# ---- plots


def performance(target: Run, rows: Sequence[Row]) -> list[Plot]:
    """Latency and images/s against steps, a figure for each provenance."""
    from bench.show import latency as plot

    plots: list[Plot] = []
    for kind in dict.fromkeys(row["provenance"] for row in rows):
        drawn = plot.figure([(target, [row for row in rows if row["provenance"] == kind])])
        if drawn is not None:
            words = f"Latency and images per second against steps, {kind}"
            svg = figures.inline(drawn, f"performance-{len(plots)}", words)
            plots.append(Plot("Against steps", svg, f"Provenance: {kind}."))
    return plots


def breakdown(groups: Mapping[str, Sequence[CellRounds]]) -> list[Plot]:
    """Stages, and cold against warm, for each provenance."""
    plots: list[Plot] = []
    for kind, lines in groups.items():
        staged = [line for line in lines if any(row["stages_ms"] for row in line.good)]
        begun = [line for line in lines if line.median("cold_ms") is not None]
        if staged:
            ways = {row["stages_from"] for line in staged for row in line.good}
            apart = " Some stages were timed in calls of their own." if "separate" in ways else ""
            words = f"Time of each stage of a call by cell, {kind}; the table has the numbers"
            svg = figures.inline(figures.stages(staged), f"stages-{len(plots)}", words)
            caption = f"Medians of each stage. Provenance: {kind}.{apart}"
            plots.append(Plot("Where the time goes", svg, caption, wide=False))
        if begun:
            words = f"First call and median of each cell, {kind}; the table has the numbers"
            svg = figures.inline(figures.cold(begun), f"cold-{len(plots)}", words)
            caption = f"Load and compile come before the first call. Provenance: {kind}."
            plots.append(Plot("Cold against warm", svg, caption, wide=False))
    return plots


def roofline(target: Run, rows: Sequence[Row]) -> Plot | AddbenchError:
    from bench.limits.floors import beaten, beaten_text, under
    from bench.show import roofline as roofplot

    own = [row for row in rows if row["roofline"]]
    if not own and all(row["provenance"] == MODELLED for row in rows):
        return AddbenchError(
            "there is no roofline of a modelled card", "each row has the floor of its own card"
        )
    try:
        drawn = roofplot.figure(target, own)
    except AddbenchError as error:
        return error
    kinds = ", ".join(sorted({row["provenance"] for row in own}))
    words = "What each stage reached under the machine's ceilings"
    surveyed = target.header.roofline
    doubts = beaten_text(beaten(under(own, surveyed), surveyed)) if surveyed else ""
    caption = (
        f"Rates: {kinds}. Where an algorithm does less than the direct one, its floor is lower and"
        f" no share is given. {doubts}".rstrip()
    )
    return Plot("Roofline", figures.inline(drawn, "roofline", words), caption)


# ---- parity, claims, verdict


RECORD = {"bundle_hash", "backend", "storage", "precision", "weights", "gate", "parts", "images",
          "fp16_limit"}  # fmt: skip
"""What the page takes from a record of parity."""


@dataclass(frozen=True)
class Parity:
    """The bundle's record of parity, with the verdict on it; or why there is none to show."""

    record: Mapping[str, Any] | None
    failure: AddbenchError | None = None
    parts: Sequence[Column] = PART_COLUMNS
    images: Sequence[Column] = IMAGE_COLUMNS


def parity(target: Run) -> Parity:
    """What the bundle of the run says of itself, if it is still here and still the same."""
    from backends.check.parity import verdict as judged
    from export.bundle import PARITY, find_bundle

    wanted = target.header.bundle
    try:
        bundle = find_bundle(wanted["name"], wanted["weights"], wanted["dtype"])
        if bundle.hash != wanted["hash"]:
            raise AddbenchError(
                "the bundle here is not the one that was measured",
                f"its content is {bundle.hash[:12]}, the run's {wanted['hash'][:12]}",
            )
        if not (bundle.path / PARITY).exists():
            raise AddbenchError(
                "parity has not been run on this bundle",
                f"it holds no {PARITY}",
                f"addbench parity --model {wanted['name']} --weights {wanted['weights']}"
                f" --dtype {wanted['dtype']}",
            )
        record = read_json(bundle.path / PARITY)
        if not isinstance(record, dict) or record.get("schema") != 1 or RECORD - set(record):
            raise AddbenchError(
                f"{PARITY} is of another schema", "this version reads 1", "run parity again"
            )
        if record["bundle_hash"] != bundle.hash:
            raise AddbenchError("the record of parity is of an earlier export of this bundle")
    except AddbenchError as error:  # it may name a folder, and the page is passed on
        return Parity(None, AddbenchError(*map(portable, (error.what, error.why, error.next))))
    return Parity(record, judged(record))


@dataclass(frozen=True)
class Claims:
    """Published figures beside this run."""

    headlines: Sequence[Sequence[str]]
    found: Sequence[claims.Finding]
    explained: Sequence[str]
    columns: Sequence[Column] = claims.COLUMNS


def claimed(target: Run) -> Claims:
    """The claims of this run's models on its hardware, judged with this run alone."""
    ours = measured([target])
    found = claims.concerning(claims.findings(read_claims(), ours), ours)
    first = [claims.headline(each) for each in found if each.claim.id in claims.HEADLINES]
    return Claims(first, found, claims.explained())


@dataclass(frozen=True)
class ComparisonTable:
    """A comparison: its columns, and what all its lines share."""

    outcome: Outcome
    columns: Sequence[Column]
    above: str


def verdict(base: Run, head: Run) -> ComparisonTable:
    from bench.verdict.rules import RUN_SLOWDOWN

    found = compare(base, head, RUN_SLOWDOWN, allow_other_machine=True)
    columns, above = outcome.printed(found.lines)
    return ComparisonTable(found, ordered(columns), above)


# ---- environment


DIRTY = " with uncommitted changes"


def surroundings(target: Run, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Everything the header says of the machine and of how it was measured, by name."""
    said = target.header
    commits = dict.fromkeys((row["git_commit"], row["git_dirty"]) for row in rows)
    return [
        ("run", target.name),
        ("created", words(said.created_utc)),
        ("command", " ".join(map(str, said.command))),
        ("commit", "; ".join(f"{commit}{DIRTY if dirty else ''}" for commit, dirty in commits)),
        *((f"bundle {name}", words(value)) for name, value in said.bundle.items()),
        *((name.replace("_", " "), words(value)) for name, value in said.environment.items()),
        *((f"setting {name}", words(value)) for name, value in said.settings.items()),
        *((f"backend {name}", words(value)) for name, value in said.backends.items()),
    ]  # fmt: skip


def words(value: Any) -> str:
    """A JSON value for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {words(item)}" for name, item in value.items()) or EMPTY
    if isinstance(value, list):
        return ", ".join(words(item) for item in value) or EMPTY
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
