"""The roofline of a run: what each stage achieved, under the ceilings measured in the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import style
from matplotlib.figure import Figure

from bench.limits.floors import beaten, ceilings_of, share_of_floor, under
from bench.machine.ceilings import Ceilings
from bench.rows.cell import Cell
from bench.rows.stats import median_or_none
from bench.rows.store import Row, Run
from bench.rows.summary import CellRounds, by_cell
from bench.show.canvas import STYLE, Look, look_of, plain_log
from core.errors import PreconditionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = {"text": "s", "unet_step": "o", "vae": "D", "taesd": "^", "image": "P",
           "vae encoder": "d", "taesd encoder": "v"}  # fmt: skip
NAMES = {
    "text": "text encoders",
    "unet_step": "UNet step",
    "vae": "VAE decoder",
    "taesd": "TAESD decoder",
    "vae encoder": "VAE encoder",
    "taesd encoder": "TAESD encoder",
    "image": "whole image",
}


def points(lines: Sequence[CellRounds]) -> dict[tuple[str, int, str], tuple[float, float, float]]:
    """(backend, batch, stage) -> GB/s, TFLOP/s and fraction, medians over the cells that ran it."""
    found: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for line in lines:
        for row in line.good:
            for stage, figures in (row["roofline"] or {}).items():
                of = {"decode": line.cell.decoder, "encode": f"{line.cell.encoder} encoder"}
                name = of.get(stage, stage)
                key = (line.cell.backend_text, line.cell.batch, name)
                found.setdefault(key, []).append(figures)
    return {
        key: tuple(  # type: ignore[misc]
            median_or_none([each[name] for each in many])
            for name in ("gb_per_s", "tflops", "fraction")
        )
        for key, many in found.items()
    }


def figure(target: Run, rows: Sequence[Row]) -> Figure:
    surveyed = target.header.roofline
    rows = under(rows, surveyed)
    found = points(by_cell(rows))
    if not surveyed or not found:
        raise PreconditionError(
            f"run {target.name} has no roofline",
            "its rows were measured without the machine's ceilings (--quick, --no-roofline)",
            "measure it again without these flags",
        )
    # Of each device that has rows, the dtypes that these compute in.
    drawn_on = sorted({(row["device"], row["precision"]) for row in rows if row["roofline"]})
    ceilings = ceilings_of(surveyed)
    provenance = ", ".join(sorted({ceilings[device].provenance for device, _ in drawn_on}))
    looks: dict[str, Look] = {}
    for name in dict.fromkeys(key[0] for key in found):
        backend, _, options = name.partition(":")
        looks[name] = look_of(backend, options, looks.values())
    low = beaten(rows, surveyed)
    doubted = {
        Cell.of(row).backend_text for row in rows if f"{row['device']} {row['precision']}" in low
    }
    labels = {
        (backend, batch, stage): f"{NAMES[stage]}, {backend}"
        + (f", batch {batch}" if batch > 1 else "")
        + f": {share_text(fraction, backend in doubted)}"
        for (backend, batch, stage), (_, _, fraction) in found.items()
    }
    with style.context(STYLE):
        # Beside the axes the legend has all the room that it wants.
        width = 7.3 + max(2.3, 0.076 * max(map(len, labels.values())))
        height = max(5.4, 1.3 + 0.19 * len(labels))
        drawn = Figure(figsize=(width, height))
        axes = drawn.subplots()
        drawn.subplots_adjust(
            left=0.8 / width, right=6.7 / width, top=1 - 0.86 / height, bottom=0.6 / height
        )
        drawn.text(
            0.12 / width, 1 - 0.19 / height,
            f"Roofline: {rows[0]['model']}, {rows[0]['size'].replace('x', '×')} px",
            va="top", fontsize=13, fontweight="bold",
        )  # fmt: skip
        drawn.text(
            0.12 / width, 1 - 0.51 / height,
            f"{target.header.environment['cpu']}; ceilings {provenance} in this run;"
            " floors of direct algorithms",
            va="top", color="#555555",
        )  # fmt: skip
        for (backend, batch, stage), (gb, tflops, _) in found.items():
            axes.plot(
                [1e3 * tflops / gb],
                [tflops],
                MARKERS[stage],
                color=looks[backend].colour,
                markersize=8,
                markerfacecolor="white" if looks[backend].hollow else looks[backend].colour,
                markeredgecolor=looks[backend].colour if looks[backend].hollow else "white",
                linestyle="none",
                zorder=3,
                label=labels[backend, batch, stage],
            )
        intensities = [1e3 * tflops / gb for gb, tflops, _ in found.values()]
        for device in sorted({device for device, _ in drawn_on}):
            precisions = [precision for on, precision in drawn_on if on == device]
            roofs(axes, ceilings[device], precisions, min(intensities), max(intensities))
        for device in sorted({device for device, _ in drawn_on}):
            precisions = [precision for on, precision in drawn_on if on == device]
            memory(axes, ceilings[device], precisions, device)
        axes.set_xlabel("FLOPs per byte moved (at least)")
        axes.set_ylabel("TFLOP/s")
        drawn.legend(
            loc="upper left", bbox_to_anchor=(6.8 / width, 1 - 0.81 / height), frameon=False,
            borderaxespad=0, fontsize=9,
            title="fraction of the floor reached", alignment="left",
        )  # fmt: skip
    return drawn


def share_text(fraction: float, doubted: bool) -> str:
    """The share of its floor that a stage reached, where there is one."""
    if doubted:
        return "its ceiling is doubted"
    share = share_of_floor(fraction)
    return "faster than direct" if share is None else f"{100 * share:.0f}%"


def rate(value: float) -> str:
    """Three digits at most, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def roofs(
    axes: Axes, ceilings: Ceilings, precisions: Sequence[str], least: float, most: float
) -> None:
    """The memory slope and a flat roof for matrix products and for convolutions."""
    left, right = least / 3, most * 3
    grey: dict[str, Any] = {"color": "#666666", "zorder": 2}
    for precision in precisions:
        peaks: dict[float, list[str]] = {}
        for kind, peak in ceilings.tflops[precision].items():
            peaks.setdefault(peak, []).append(kind)
        for peak, kinds in peaks.items():
            ridge = 1e3 * peak / ceilings.gb_per_s
            dash = "-" if "matmul" in kinds else "--"
            start = max(left, ridge)
            axes.plot([start, right], [peak, peak], linestyle=dash, linewidth=1.3, **grey)
            below = peak == min(peaks)
            axes.annotate(
                f"{precision} {' and '.join(kinds)} {rate(peak)} TFLOP/s",
                (right, peak),
                xytext=(-2, -4 if below else 4),
                textcoords="offset points",
                ha="right",
                va="top" if below else "bottom",
                fontsize=8.5,
                color="#444444",
            )
            if left < ridge:
                slope = [left * ceilings.gb_per_s / 1e3, peak]
                axes.plot([left, ridge], slope, linewidth=1.3, **grey)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)


def memory(axes: Axes, ceilings: Ceilings, precisions: Sequence[str], device: str) -> None:
    """The bandwidth, written along the slope: above it, where no point can be."""
    left, _ = axes.get_xlim()
    peak = max(max(ceilings.tflops[precision].values()) for precision in precisions)
    ridge = 1e3 * peak / ceilings.gb_per_s
    if ridge <= left:
        return  # all of it lies left of what is drawn
    foot, head = axes.transData.transform([(left, left * ceilings.gb_per_s / 1e3), (ridge, peak)])
    angle = math.atan2(head[1] - foot[1], head[0] - foot[0])
    along, across = 14, 2.5  # points
    axes.annotate(
        f"memory of {device} {rate(ceilings.gb_per_s)} GB/s",
        (left, left * ceilings.gb_per_s / 1e3),
        xytext=(
            along * math.cos(angle) - across * math.sin(angle),
            along * math.sin(angle) + across * math.cos(angle),
        ),
        textcoords="offset points",
        rotation=math.degrees(angle),
        rotation_mode="anchor",
        ha="left",
        va="bottom",
        fontsize=8.5,
        color="#444444",
    )
