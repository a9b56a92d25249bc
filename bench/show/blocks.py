"""What pages show of published runs: blocks between markers, derived and held to the rows.

    <!-- results -->                     the newest published sweep: conditions, table, plot
    <!-- results NAME -->                that run; the head's of `addbench versus` with the ratios
    <!-- results NAME columns="backend,steps,median,image PSNR" rows="batch=1 steps=1|4" -->
    <!-- stages NAME -->                 its stages
    <!-- ratio NAME base="model=sd15" head="model=sdxl-turbo steps=1" -->9.4<!-- /ratio -->
    <!-- pictures -->                    the cells of every published run that start from a picture
    <!-- pictures NAME -->               those of that run

each ending in `<!-- /results -->`, `<!-- /stages -->` and so on. NAME is a name of
results/published/index.toml or a run.

columns, rows, sort: a table of some columns and lines, with one line below it that says of what.
    A column is called by its header, without the unit if one likes (`median` is `median (ms)`);
    rows asks for `column=text`, several with spaces between them, `|` between texts that will do,
    a column or a part of the cell (`precision=int8`); sort names the column to sort by.
ratio: the latency of `base` over that of `head`, each asking for one cell as rows does. With NAME
    both come from that run (and its other side, of a pair); without it from the newest published
    run that has both. It is drawn with `digits` after the point (1). `publish --check` holds it to
    the newest published rows of either cell on the same hardware too. A comment at the start of a
    line ends a paragraph of Markdown, so it stands within one: `takes <!-- ratio ...`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.rows.store import Row, Run
from bench.rows.summary import CellRounds, by_cell
from bench.show import columns as all_columns
from bench.verdict.ratio import Level, Ratio, level_of_call, level_of_rounds, of_levels
from bench.verdict.rules import RUN_SLOWDOWN
from core.errors import PreconditionError
from core.table import Column, markdown_lines

MARK = re.compile(
    r"(?P<open><!-- (?P<kind>results|stages|ratio|pictures)(?: (?P<run>[\w-]+))?"
    r"(?P<said>(?: \w+=\"[^\"]*\")*) -->\n?)(?P<body>.*?)(?P<close><!-- /(?P=kind) -->)",
    re.DOTALL,
)
SAID = re.compile(r'(\w+)="([^"]*)"')
KNOWN: dict[str, set[str]] = {
    "results": {"columns", "rows", "sort"},
    "stages": set(),
    "pictures": set(),
    "ratio": {"base", "head", "digits"},
}
"""What a marker of each kind may say."""


@dataclass(frozen=True)
class Published:
    """A published run with its rows, what it is called, and what pages show of all of it."""

    run: Run
    label: str
    rows: Sequence[Row]
    brief: str
    stages: str = ""

    @property
    def lines(self) -> list[CellRounds]:
        return by_cell(self.rows)

    @property
    def hardware(self) -> str:
        environment = self.run.header.environment
        return f"{environment['cpu']}, {environment['cores_allowed']} cores"


@dataclass(frozen=True)
class Drawn:
    """The published runs, oldest first."""

    runs: Sequence[Published] = field(default=())

    def find(self, name: str | None) -> Published | None:
        """The run that a marker names; without a name the newest sweep, or None."""
        if name is None:  # a sweep, not one side of a comparison
            sweeps = [each for each in self.runs if each.run.header.versus is None]
            return sweeps[-1] if sweeps else None
        for each in self.runs:
            if name in (each.label, each.run.name):
                return each
        raise PreconditionError(
            f"a page asks for the results of run {name}",
            f"results/published holds: {', '.join(each.label for each in self.runs) or '-'}",
            "publish that run, or change the marker",
        )

    def sides(self, target: Published) -> list[Published]:
        """A run, and of the head of a pair its base."""
        other = (target.run.header.versus or {}).get("base")
        return [target, *(each for each in self.runs if each.run.name == other)]


def fill(text: str, drawn: Drawn, results: str) -> str:
    """A page with every derived block redrawn; `results` is the way there from the page.

    Raises:
        PreconditionError: a marker asks for what is not published, or is not understood.
    """

    def fresh(mark: re.Match[str]) -> str:
        said = dict(SAID.findall(mark["said"]))
        if unknown := sorted(said.keys() - KNOWN[mark["kind"]]):
            raise PreconditionError(
                f"a page's marker says {unknown[0]}: {mark['open'].strip()}",
                f"of {mark['kind']} it may say: {', '.join(sorted(KNOWN[mark['kind']])) or '-'}",
                "change the marker",
            )
        if mark["kind"] == "ratio":
            value = of_cells(*pair_of(drawn, mark["run"], said)).value
            return f"{mark['open']}{value:.{int(said.get('digits', 1))}f}{mark['close']}"
        if mark["kind"] == "pictures":
            return f"{mark['open']}{pictures(drawn, mark['run'], results)}{mark['close']}"
        target = drawn.find(mark["run"])
        if target is None:
            return mark[0]  # nothing is published yet
        if mark["kind"] == "stages":
            return f"{mark['open']}{target.stages}{mark['close']}"
        shown = chosen(target, said, results) if said else whole(target, results)
        return f"{mark['open']}{shown}{mark['close']}"

    return MARK.sub(fresh, text)


def whole(target: Published, results: str) -> str:
    """All that a page shows of a run: its conditions, table and plot, and where more is."""
    name, label = target.run.name, target.label
    return (
        f"{target.brief}\n![{label}: latency and images per second against steps]"
        f"({results}/plots/{label}.svg)"
        f"\n\nMore columns: [results/tables/{label}.md]({results}/tables/{label}.md); rows:"
        f" [results/published/{name}]({results}/published/{name}).\n"
    )


# ---- images from a picture

PICTURED = ("backend", "encoder", "decoder", "batch", "steps", "strength", "median (ms)",
            "encode (ms)", "frames/s", "frame: encode (ms)", "frame: UNet (ms)",
            "frame: decode (ms)", "frame: rest (ms)", "image PSNR", "changes right (%)",
            "kept place (%)", "shift (px)",
            "flags")  # fmt: skip
"""Columns of what starts from a picture, where they say anything."""


def pictures(drawn: Drawn, name: str | None, results: str) -> str:
    """What published runs say of images from a picture: tables, and the trade-off of strength."""
    runs = drawn.runs if name is None else [each for each in [drawn.find(name)] if each]
    pieces = []
    for each in runs:
        lines = [line for line in each.lines if line.cell.encoder and line.good]
        if not lines:
            continue
        columns = [column for column in map(find_column, PICTURED) if column.says(lines)]
        said = [f"{len(lines[0].good)} round{'s' * (len(lines[0].good) != 1)}"]
        judged = {int(line.quality("captions") or 0) for line in lines} - {0}
        said += [f"{max(judged)} changes judged a cell"] if judged else []
        pieces.append("\n".join([
            *markdown_lines(columns, lines),
            "",
            f"[{each.label}]({results}/tables/{each.label}.md): {lines[0].cell.model},"
            f" {lines[0].cell.weights} weights; {', '.join(said)}; {each.hardware}; end to end,"
            " warm, medians.",
            *(["", f"![{each.label}: changes right, shift and latency over strength]"
                   f"({results}/plots/{each.label}-strength.svg)"]
                  if judged and len({line.cell.strength for line in lines}) > 1 else []),
            "",
        ]))  # fmt: skip
    return "\n".join(pieces) or "No run that starts from a picture is published yet.\n"


# ---- some columns and lines


def chosen(target: Published, said: Mapping[str, str], results: str) -> str:
    """A table of the columns and lines that a marker asks for, and what it is of."""
    wanted = [find_column(name) for name in said.get("columns", "").split(",") if name.strip()]
    lines = select(target.lines, said.get("rows", ""))
    if not lines:
        raise PreconditionError(
            f'a page asks for rows="{said.get("rows", "")}" of run {target.label}',
            "no cell of the run is like that",
            f"change the marker; {results}/tables/{target.label}.md lists its cells",
        )
    if by := said.get("sort"):
        column = find_column(by)
        lines.sort(key=lambda line: sort_key(column.value(line)))
    columns = wanted or all_columns.brief_columns(lines)
    shared = ("model", "weights", "size (px)", "provenance")
    alike = [
        f"{column.header.removesuffix(' (px)')} {texts.pop()}"
        for column in map(find_column, shared)
        if column not in columns and len(texts := {column.text(line) for line in lines}) == 1
    ]
    label = target.label
    return "\n".join([
        *markdown_lines(columns, lines),
        "",
        f"[{label}]({results}/tables/{label}.md): {', '.join(alike)}; {target.hardware}; end to"
        " end, warm, medians.",
        "",
    ])  # fmt: skip


def sort_key(value: Any) -> tuple[int, Any]:
    """Numbers first, smallest first; then words; what is not known last."""
    if value is None or value == "":
        return (2, "")
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def short(header: str) -> str:
    """A header without its unit."""
    return re.sub(r" \([^)]*\)$", "", header)


def find_column(name: str) -> Column:
    """The column of a sweep's table that is called so, with or without its unit.

    Raises:
        PreconditionError: there is none.
    """
    for text in (str, short):
        for column in all_columns.COLUMNS:
            if text(column.header) == name.strip():
                return column
    raise PreconditionError(
        f"a page asks for a column {name.strip()!r}",
        f"columns: {', '.join(short(column.header) for column in all_columns.COLUMNS)}",
        "change the marker",
    )


def select(lines: Sequence[CellRounds], wanted: str) -> list[CellRounds]:
    """The lines that have `column=text` for each word of `wanted`."""
    tests: list[tuple[Callable[[CellRounds], str], list[str]]] = []
    for word in wanted.split():
        name, equals, texts = word.partition("=")
        if not equals:
            raise PreconditionError(
                f"a page asks for rows like {word!r}", "it has no =", 'write rows="column=text"'
            )
        tests.append((text_of(name), texts.split("|")))
    return [line for line in lines if all(text(line) in texts for text, texts in tests)]


def text_of(name: str) -> Callable[[CellRounds], str]:
    """What a line says under a column's name, or a part of its cell's."""
    headers = {short(column.header) for column in all_columns.COLUMNS}
    if name in headers:
        return find_column(name).text
    from bench.rows.fields import KEY_COLUMNS

    if name not in KEY_COLUMNS:
        find_column(name)  # which says what there is
    return lambda line: str(getattr(line.cell, name))


# ---- ratios


def pair_of(
    drawn: Drawn, name: str | None, said: Mapping[str, str]
) -> tuple[CellRounds, CellRounds]:
    """The two cells whose ratio a marker asks for: base, head.

    Raises:
        PreconditionError: no run, or more than one cell, is like that.
    """
    for key in ("base", "head"):
        if key not in said:
            raise PreconditionError(
                f"a page's ratio names no {key}", "it is base over head", f'write {key}="..."'
            )
    if name is None:
        places = [drawn.sides(each) for each in reversed(drawn.runs)]
    else:
        target = drawn.find(name)
        places = [drawn.sides(target)] if target else []
    for runs in places:
        lines = [line for each in runs for line in each.lines if line.median("median_ms")]
        base, head = (select(lines, said[key]) for key in ("base", "head"))
        if len(base) == len(head) == 1:
            return base[0], head[0]
        if name is not None or (base and head):
            key, cells = ("base", base) if len(base) != 1 else ("head", head)
            raise PreconditionError(
                f'a page\'s ratio asks for {key}="{said[key]}"',
                f"{len(cells)} measured cells of {runs[0].label} are like that, not one",
                "change the marker",
            )
    raise PreconditionError(
        f'a page asks for the ratio of "{said["base"]}" to "{said["head"]}"',
        "no published run has both",
        "publish a run that has, or change the marker",
    )


def of_cells(base: CellRounds, head: CellRounds) -> Ratio:
    """The ratio of two cells' medians with the interval of what was measured apart."""
    exact = (base.median("median_ms") or 1.0) / (head.median("median_ms") or 1.0)
    ratio = of_levels(level_of(base), level_of(head), "t interval")
    return Ratio(exact, ratio.low, ratio.high, ratio.why)


def level_of(line: CellRounds) -> Level:
    """A cell's level over its rounds; of one call by its steps."""
    medians = [row["median_ms"] for row in line.good]
    row = line.good[0]
    if len(medians) == 1 and len(row["samples_ms"]) == 1:
        steps = ((row["stages_samples_ms"] or {}).get("unet") or [[]])[0]
        return level_of_call(medians[0], steps)
    return level_of_rounds(medians)


def newest(drawn: Drawn, line: CellRounds, hardware: str) -> tuple[str, CellRounds]:
    """The newest published run that measured the same cell on this hardware, and the cell there."""
    for each in reversed(drawn.runs):
        if each.hardware == hardware:
            for other in each.lines:
                if other.cell == line.cell and other.median("median_ms"):
                    return each.label, other
    return "", line


def since_then(drawn: Drawn, target: Published) -> list[str]:
    """Notes on cells of a pair that a newer run found faster or slower than two runs may differ."""
    notes = []
    for side in drawn.sides(target):
        for line in side.lines:
            label, other = newest(drawn, line, side.hardware)
            was, now = line.median("median_ms"), other.median("median_ms")
            if was and now and max(was, now) / min(was, now) > 1 + RUN_SLOWDOWN:
                notes.append(
                    f"- since then: {line.cell.model} {line.cell} took {was:,.0f} ms and takes"
                    f" {now:,.0f} ms in {label}; the ratios are of the code of their day"
                )
    return notes


def disagreements(text: str, drawn: Drawn) -> list[str]:
    """Ratios of a page that the newest published rows of the same cells contradict.

    They contradict a ratio that lies outside of their interval; where they have none (one round),
    one that is off by more than two runs of the same program may be.
    """
    wrong = []
    for mark in MARK.finditer(text):
        if mark["kind"] != "ratio":
            continue
        said = dict(SAID.findall(mark["said"]))
        pair = pair_of(drawn, mark["run"], said)
        (where,) = {
            each.hardware for each in drawn.runs if any(line in each.lines for line in pair)
        }
        ratio = of_cells(*(newest(drawn, line, where)[1] for line in pair))
        low = ratio.low or ratio.value / (1 + RUN_SLOWDOWN)
        high = ratio.high or ratio.value * (1 + RUN_SLOWDOWN)
        rounding = 0.5 * 10.0 ** -int(said.get("digits", 1))
        if not low - rounding <= float(mark["body"]) <= high + rounding:
            wrong.append(
                f"a page says {mark['body']} times for {said['base']} over {said['head']}; the"
                f" newest rows of these cells say {ratio.value:.2f} ({low:.2f} to {high:.2f})"
            )
    return wrong
