"""A choice for people: one sentence, the commands, what it was held against, the frontier drawn."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from backends.check.gate import QUANTISED, RANDOM_WORDS
from bench.rows.cell import Cell
from bench.show.canvas import NEUTRAL, SHAPES, STYLE, Look, look_of, plain_log, save
from bench.verdict.choosing.choice import Decision, Standing, change_text, span_text
from bench.verdict.choosing.contenders import SIMPLER, Contender
from bench.verdict.choosing.wants import QUANTITIES, Quantity
from core.amounts import count_text
from core.files import write_atomic
from core.table import Column, csv_text, draw, markdown_lines
from export.models import MODELS, scheduler_name

# ---- in words


def cell_text(contender: Contender) -> str:
    """`ort:precision=int8, taesd, 1 step, batch 1`."""
    cell = contender.cell
    steps = count_text(cell.steps, "step")
    recipe = f", {cell.recipe_text}" if cell.recipe_text else ""
    return f"{cell.backend_text}, {cell.decoder}, {steps}, batch {cell.batch}{recipe}"


def figures_text(contender: Contender, wanted: Sequence[str]) -> str:
    """The figures that were asked for, with their intervals."""
    return ", ".join(
        f"{'' if name in ('latency', 'images/s', 'memory') else name + ' '}"
        f"{span_text(contender.spans[name], QUANTITIES[name])}"
        for name in wanted
        if name in contender.spans
    )


def asked_for(choice: Decision) -> list[str]:
    """The quantities that a choice is about, the best of which it is first."""
    names = [choice.objective.name, *(limit.name for limit in choice.wants.limits), "latency"]
    return list(dict.fromkeys(names))


def within_text(choice: Decision) -> str:
    """`within latency<=4000ms memory<=8000MB`, or that there are no limits."""
    limits = " ".join(f"{limit.name}{limit.quantity.sign}{limit.quantity.text(limit.value)}"
                      .replace(" ", "") for limit in choice.wants.limits)  # fmt: skip
    return f"within {limits}" if limits else "without limits"


def sentence(choice: Decision) -> str:
    """The choice in one sentence, or why there is none."""
    goal = f"the best {choice.objective.name} {within_text(choice)}"
    if choice.taken is not None:
        contender = choice.taken.contender
        modelled = "" if contender.provenance == "measured" else f", {contender.provenance}"
        return (
            f"Take {cell_text(contender)}: {figures_text(contender, asked_for(choice))}"
            f"{modelled}; {goal}, on {contender.place}."
        )
    if choice.nearest is not None:
        near = next(each for each in choice.standings if each.contender is choice.nearest)
        return (
            f"Nothing meets the limits ({within_text(choice)}); the nearest is"
            f" {cell_text(choice.nearest)}, which misses {near.why}."
        )
    return f"Nothing can be said of {goal}: {why_not(choice)}."


def why_not(choice: Decision) -> str:
    """Why nothing can be said."""
    unknown, open_ = choice.having("unknown"), choice.having("open")
    if open_:
        near = open_[0]
        which = cell_text(near.contender)
        return f"{len(open_)} may meet the limits or miss them, {which}: {near.why}"
    if unknown:
        return unknown[0].why
    failed = choice.having("failed")
    return f"no cell is good, {cell_text(failed[0].contender)}: {failed[0].why}" if failed else (
        "there is no row to choose from")  # fmt: skip


def confidence_text(choice: Decision) -> str:
    """How sure a choice is."""
    if choice.taken is None:
        return ""
    if not choice.having("tied", "behind", "open"):
        return "Nothing else meets the limits, and nothing else may."
    if choice.loss <= 0:
        return "Everything else is surely worse (95%)."
    most = choice.objective.change_text(choice.loss)
    if choice.settled:
        return f"Nothing that it was held against is more than {most} (95%)."
    return (
        f"Not settled: another may be up to {most} (95%), by"
        f" {count_text(choice.taken.contender.rounds, 'round')}; more of them tell."
    )


def second_text(choice: Decision) -> str:
    """The runner-up and what it costs beside the choice."""
    if choice.taken is None or choice.second is None or choice.second.advantage is None:
        return ""
    mine, theirs = choice.taken.contender, choice.second.contender
    costs = [change_text(choice.second.advantage, choice.objective)]
    for name in QUANTITIES:
        if name == choice.objective.name or name in ("usd/1000",):
            continue
        if name in mine.spans and name in theirs.spans:
            quantity = QUANTITIES[name]
            if quantity.timed and mine.cell.batch == theirs.cell.batch and choice.objective.timed:
                continue
            costs.append(f"{quantity.text(theirs.spans[name].mid)}"
                         f" {'' if name == 'memory' else name + ' '}for"
                         f" {quantity.text(mine.spans[name].mid)}")  # fmt: skip
    tie = "; they tie, and the choice is simpler" if choice.second.state == "tied" else ""
    return f"Runner-up: {cell_text(theirs)}: {', '.join(costs)}{tie}."


def caveat(choice: Decision) -> str:
    """What the figures do not say of the pictures; "" where there is nothing to say."""
    said = [pictures_text(choice)]
    taken = choice.taken and choice.taken.contender.cell
    if taken and choice.wants.asks("psnr") and taken.storage in QUANTISED:
        said += [f"{RANDOM_WORDS}."] * (taken.weights == "random")
    return " ".join(text for text in said if text)


def pictures_text(choice: Decision) -> str:
    """What nothing says where contenders draw different pictures; "" where captions judge them."""
    cells = [each.contender.cell for each in choice.standings if not each.contender.fault]
    differ = [
        name
        for name, values in (
            ("steps", {cell.steps for cell in cells}),
            ("decoders", {cell.decoder for cell in cells}),
        )
        if len(values) > 1
    ]
    if not differ or choice.wants.asks("captions"):
        return ""
    return (
        f"Other {' and '.join(differ)} draw other pictures, and nothing here says which are good:"
        " psnr is against FP32 of the same. Hold them with --steps and --decoder, or limit"
        " captions where they can be judged."
    )


# ---- as commands


def axes_words(cell: Cell, model: str, dtype: str) -> list[str]:
    """The flags of a cell that `addbench image` and `addbench sweep` share."""
    words = ["--model", model]
    known = MODELS.get(cell.model)
    if model == cell.model and cell.weights != "none":
        words += ["--weights", cell.weights, "--dtype", dtype]
    words += ["--backend", cell.backend_text, "--decoder", cell.decoder]
    words += ["--steps", str(cell.steps)]
    if known is not None and known.scheduler != cell.scheduler:
        words += ["--scheduler", scheduler_name(cell.scheduler)]
    if known is not None and known.guidance != cell.guidance and cell.guidance:
        words += ["--guidance", f"{cell.guidance:g}"]
    if cell.guidance_mode == "calls":
        words += ["--guidance-mode", "calls"]
    side = known and known.size
    if side is not None and cell.size != f"{side}x{side}":
        words += ["--size", cell.size]
    return words


def commands(contender: Contender, model: str = "") -> dict[str, str]:
    """What draws with a contender, and what measures it again.

    Args:
        model: what was typed for --model; "" for the model's name.
    """
    cell = contender.cell
    dtype = contender.header.bundle["dtype"] if contender.header else "fp16"
    words = axes_words(cell, model or cell.model, dtype)
    low = ["--low-memory"] if cell.low_memory else []
    prompts = " ".join(["PROMPT"] * cell.batch)
    return {
        "run": f"addbench image {prompts} {shlex.join([*words, *low])}",
        "reproduce": f"addbench sweep {shlex.join([*words, *low, '--batch', str(cell.batch)])}"
        " --rounds 5",
    }


# ---- as a table


def columns_of(choice: Decision) -> list[Column]:
    """The columns that say anything about some contender."""
    lines = choice.standings
    number = {id(each): str(place) for place, each in enumerate(lines, start=1)}

    def span(name: str) -> Column:
        quantity = QUANTITIES[name]
        return Column(
            name,
            lambda line: span_text(line.contender.spans[name], quantity)
            if name in line.contender.spans else None,
            whole=True,
        )  # fmt: skip

    columns = [
        Column("#", lambda line: number[id(line)]),
        Column("", lambda line: line.state, whole=True),
        Column("backend", lambda line: line.contender.cell.backend_text, whole=True),
        Column("decoder", lambda line: line.contender.cell.decoder),
        Column("steps", lambda line: line.contender.cell.steps, 0),
        Column("batch", lambda line: line.contender.cell.batch, 0),
        Column("recipe", lambda line: line.contender.cell.recipe_text),
        Column("machine", lambda line: line.contender.place),
        Column("provenance", lambda line: line.contender.provenance),
        Column("rounds", lambda line: line.contender.rounds, 0),
        *(span(name) for name in QUANTITIES),
        Column("frontier", lambda line: "yes" if line.frontier else ""),
        Column("why", lambda line: line.why),
    ]
    alike = ("recipe", "machine", "provenance")
    timed = [name for name in ("images/s", "joule/image", "usd/1000")
             if name not in asked_for(choice)]  # fmt: skip
    return [
        column
        for column in columns
        if column.says(lines)
        and not (column.header in alike and len({column.text(each) for each in lines}) == 1)
        and column.header not in timed
    ]


LINES = 16
"""Contenders that a terminal shows; the page has them all."""
NEXT = {
    "captions": "judge the pictures: addbench sweep --quality, or choose --model",
    "psnr": "it takes a bundle with reference images: addbench export makes them",
    "joule/image": "this machine lets nobody read its energy",
}
"""What to do about a quantity that no row has."""


def advice(choice: Decision) -> str:
    """What to do where nothing can be said."""
    if choice.taken is not None or choice.nearest is not None:
        return ""
    open_, unknown = choice.having("open"), choice.having("unknown")
    if open_:
        return (
            "next: more rounds narrow the intervals (addbench sweep --rounds 10, or choose --model)"
        )
    for name, text in NEXT.items() if unknown else ():
        if name in unknown[0].why:
            return f"next: {text}; or drop the limit"
    return "next: measure a run (addbench sweep), or name another"


def show(choice: Decision, left_out: Sequence[str], model: str = "") -> None:
    """Print the table, then the answer, where a reader of a terminal looks first."""
    lines = choice.standings[:LINES]
    if lines:
        draw(columns_of(choice), lines, "", None, ("psnr", "rounds", "why"))
    if len(choice.standings) > len(lines):
        print(f"and {len(choice.standings) - len(lines)} more")
    for text in left_out:
        print(f"not tried: {text}")
    texts = [sentence(choice), advice(choice), confidence_text(choice), second_text(choice),
             caveat(choice)]  # fmt: skip
    print("\n" + "\n".join(text for text in texts if text))
    if choice.taken is not None:
        for name, command in commands(choice.taken.contender, model).items():
            print(f"{name}: {command}")


def markdown(choice: Decision, left_out: Sequence[str], model: str = "") -> str:
    """The whole answer as a page."""
    texts = [f"# Choice\n\n**{sentence(choice)}** {confidence_text(choice)}".rstrip()]
    if choice.taken is not None:
        texts += [f"- {name}: `{command}`"
                  for name, command in commands(choice.taken.contender, model).items()]  # fmt: skip
    texts += [text for text in (advice(choice), second_text(choice), caveat(choice)) if text]
    if choice.standings:
        texts.append("\n".join(markdown_lines(columns_of(choice), choice.standings)))
    texts.append(f"Of two that tie the simpler is taken: {', then '.join(SIMPLER)}.")
    if left_out:
        texts.append("Not tried:\n\n" + "\n".join(f"- {text}" for text in left_out))
    return "\n\n".join(texts) + "\n"


def write(choice: Decision, left_out: Sequence[str], stem: Path, model: str = "") -> list[Path]:
    """Write `STEM.md` and `STEM.csv`, and `STEM.svg` and `.png` where there is a frontier."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{form}") for form in ("md", "csv")]
    write_atomic(files[0], markdown(choice, left_out, model))
    write_atomic(files[1], csv_text(columns_of(choice), choice.standings))
    drawn = figure(choice)
    return files if drawn is None else [*files, *save(drawn, stem)]


# ---- as a picture


def figure(choice: Decision) -> Figure | None:
    """The frontier: the best against the other quantity, each with its interval; None where no
    contender has both."""
    axes_of = (choice.objective, choice.across)
    if axes_of[1] is None:
        return None
    x, y = axes_of[0], axes_of[1]
    shown = [each for each in choice.standings if not each.contender.fault
             and {x.name, y.name} <= each.contender.spans.keys()]  # fmt: skip
    if not shown:
        return None
    number = {id(each): place for place, each in enumerate(choice.standings, start=1)}
    with style.context(STYLE):
        drawn = Figure(figsize=(9.6, 6.0))
        axes = drawn.subplots()
        drawn.subplots_adjust(left=0.085, right=0.74, top=0.84, bottom=0.1)
        drawn.text(0.012, 0.975, f"{x.name} against {y.name}", va="top", fontsize=13,
                   fontweight="bold")  # fmt: skip
        drawn.text(0.012, 0.93, caption(choice, shown), va="top", color="#555555")
        looks: dict[str, Look] = {}
        for each in shown:
            cell = each.contender.cell
            if cell.backend_text not in looks:
                looks[cell.backend_text] = look_of(cell.backend, cell.options, looks.values())
        scale = {axis.name: scale_in(axis, shown) for axis in (x, y)}
        for each in shown:
            mark(axes, each, (x, y), scale, looks[each.contender.cell.backend_text], number)
        outline(axes, [each for each in shown if each.frontier], (x, y), scale)
        for axis, lines in ((x, axes.axvline), (y, axes.axhline)):
            for limit in choice.wants.limits:
                if limit.name == axis.name:
                    lines(limit.value / scale[axis.name][0], color="#B00020", linewidth=1.2,
                          linestyle=(0, (6, 3)), zorder=1)  # fmt: skip
        for axis, setter, drawn_axis in ((x, axes.set_xscale, axes.xaxis),
                                         (y, axes.set_yscale, axes.yaxis)):  # fmt: skip
            if axis.unit not in ("%", "dB"):
                setter("log")
                plain_log(drawn_axis)
        for axis, label in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
            good = "less" if axis.less else "more"
            unit = scale[axis.name][1] or axis.unit
            label(f"{axis.name} ({f'{unit}; ' * (unit != axis.name)}{good} is better)")
        handles = [
            Line2D([], [], marker="o", linestyle="none", color=look.colour, label=text,
                   markerfacecolor="white" if look.hollow else look.colour)
            for text, look in looks.items()
        ]  # fmt: skip
        handles += [
            Line2D([], [], marker=SHAPES[decoder][0], linestyle="none", color=NEUTRAL,
                   label=decoder)
            for decoder in sorted({each.contender.cell.decoder for each in shown} & {*SHAPES})
        ]  # fmt: skip
        handles.append(Line2D([], [], color="#999999", label="frontier"))
        if {limit.name for limit in choice.wants.limits} & {x.name, y.name}:
            handles.append(Line2D([], [], color="#B00020", linestyle=(0, (6, 3)), label="limit"))
        drawn.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.75, 0.84),
                     frameon=False, borderaxespad=0)  # fmt: skip
    return drawn


def caption(choice: Decision, shown: Sequence[Standing]) -> str:
    """What is under the title: the choice, and what bars and numbers are."""
    first = choice.taken or shown[0]
    lead = f"Taken (ringed): {cell_text(first.contender)}" if choice.taken else "Nothing is taken"
    return f"{lead}; {within_text(choice)}.\nBars: intervals. Numbers: lines of the table."


def scale_in(axis: Quantity, shown: Sequence[Standing]) -> tuple[float, str]:
    """(values in a drawn unit, its name)."""
    most = max(each.contender.spans[axis.name].mid for each in shown)
    if axis.name == "latency":
        return (1e3, "s") if most >= 2e3 else (1.0, "ms")
    if axis.name == "memory":
        return (1e3, "GB") if most >= 2e3 else (1.0, "MB")
    return 1.0, ""


def mark(
    axes: Axes,
    standing: Standing,
    pair: tuple[Quantity, Quantity],
    scale: dict[str, tuple[float, str]],
    look: Look,
    number: dict[int, int],
) -> None:
    """Draw one contender with its intervals and its number."""
    spans = [standing.contender.spans[axis.name] for axis in pair]
    units = [scale[axis.name][0] for axis in pair]
    x, y = (span.mid / unit for span, unit in zip(spans, units, strict=True))
    bars = [[[(span.mid - span.low) / unit], [(span.high - span.mid) / unit]]
            for span, unit in zip(spans, units, strict=True)]  # fmt: skip
    alpha = 0.45 if standing.state in ("misses", "unknown") else 1.0
    axes.errorbar(
        [x], [y], xerr=bars[0], yerr=bars[1], color=look.colour, elinewidth=1.0, alpha=0.5, zorder=2
    )
    shape = SHAPES.get(standing.contender.cell.decoder, ("o", "-"))[0]
    axes.plot([x], [y], shape, color=look.colour, markersize=7, zorder=3, alpha=alpha,
              markerfacecolor="white" if look.hollow else look.colour)  # fmt: skip
    if standing.state == "taken":
        axes.plot([x], [y], "o", markersize=15, markerfacecolor="none", markeredgecolor="#000000",
                  markeredgewidth=1.6, zorder=4)  # fmt: skip
    axes.annotate(str(number[id(standing)]), (x, y), xytext=(7, 6), textcoords="offset points",
                  fontsize=8.5, color="#333333", zorder=5,
                  fontweight="bold" if standing.state == "taken" else "normal")  # fmt: skip


def outline(
    axes: Axes,
    frontier: Sequence[Standing],
    pair: tuple[Quantity, Quantity],
    scale: dict[str, tuple[float, str]],
) -> None:
    """Draw the line through the frontier's middles, those that a better one hides left out."""
    x, y = pair
    points = sorted(
        ((each.contender.spans[x.name].mid / scale[x.name][0],
          each.contender.spans[y.name].mid / scale[y.name][0]) for each in frontier),
        reverse=not x.less,
    )  # fmt: skip
    kept: list[tuple[float, float]] = []
    for point in points:
        if not kept or (point[1] < kept[-1][1] if y.less else point[1] > kept[-1][1]):
            kept.append(point)
    if len(kept) > 1:
        axes.plot(*zip(*kept, strict=True), color="#999999", linewidth=1.2, zorder=1)
