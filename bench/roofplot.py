"""The roofline of a run: what each stage achieved, under the ceilings measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.ceilings import Ceilings
from bench.columns import Line, lines_of
from bench.plot import COLOURS, STYLE, save
from bench.roofline import ceilings_of
from bench.stats import median_or_none
from bench.store import Row, Run
from core.errors import PreconditionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"text": "s", "unet_step": "o", "vae": "D", "taesd": "^", "image": "P"}
NAMES = {
    "text": "text encoders",
    "unet_step": "UNet step",
    "vae": "VAE decoder",
    "taesd": "TAESD decoder",
    "image": "whole image",
}


def points(lines: Sequence[Line]) -> dict[tuple[str, int, str], tuple[float, float, float]]:
    """(backend, batch, stage) -> GB/s, TFLOP/s and fraction, medians over the cells that ran it."""
    found: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    for line in lines:
        for row in line.good:
            for stage, figures in (row["roofline"] or {}).items():
                name = line.cell.decoder if stage == "decode" else stage
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
    from matplotlib import style
    from matplotlib.figure import Figure

    surveyed = target.header.get("roofline")
    found = points(lines_of(rows))
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
    with style.context(STYLE):
        drawn = Figure(figsize=(9.6, 5.4))
        axes = drawn.subplots()
        drawn.subplots_adjust(left=0.10, right=0.70, top=0.84, bottom=0.11)
        drawn.text(
            0.012, 0.965, f"Roofline: {rows[0]['model']}, {rows[0]['size'].replace('x', '×')} px",
            va="top", fontsize=13, fontweight="bold",
        )  # fmt: skip
        drawn.text(
            0.012, 0.905,
            f"{target.header['environment']['cpu']}; ceilings {provenance} in this run;"
            " floors of direct algorithms",
            va="top", color="#555555",
        )  # fmt: skip
        intensities = [1e3 * tflops / gb for gb, tflops, _ in found.values()]
        for device in sorted({device for device, _ in drawn_on}):
            precisions = [precision for on, precision in drawn_on if on == device]
            roofs(axes, ceilings[device], precisions, min(intensities), max(intensities))
        memory = [
            f"memory of {device} {rate(ceilings[device].gb_per_s)} GB/s"
            for device in sorted({device for device, _ in drawn_on})
        ]
        drawn.text(0.718, 0.11, "\n".join(memory), fontsize=8.5, color="#444444")
        backends = list(dict.fromkeys(key[0] for key in found))
        for (backend, batch, stage), (gb, tflops, fraction) in found.items():
            label = f"{NAMES[stage]}, {backend}" + (f", batch {batch}" if batch > 1 else "")
            axes.plot(
                [1e3 * tflops / gb],
                [tflops],
                MARKERS[stage],
                color=COLOURS[backends.index(backend) % len(COLOURS)],
                markersize=8,
                markeredgecolor="white",
                linestyle="none",
                zorder=3,
                label=f"{label}: {100 * fraction:.0f}%",
            )
        axes.set_xlabel("FLOPs per byte moved (at least)")
        axes.set_ylabel("TFLOP/s")
        drawn.legend(
            loc="upper left", bbox_to_anchor=(0.71, 0.85), frameon=False, fontsize=9,
            title="fraction of the floor reached", alignment="left",
        )  # fmt: skip
    return drawn


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
        for kind, peak in ceilings.tflops[precision].items():
            ridge = 1e3 * peak / ceilings.gb_per_s
            dash = "-" if kind == "matmul" else "--"
            start = max(left, ridge)
            axes.plot([start, right], [peak, peak], linestyle=dash, linewidth=1.3, **grey)
            below = peak == min(ceilings.tflops[precision].values())
            axes.annotate(
                f"{precision} {kind} {rate(peak)} TFLOP/s",
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


def write(target: Run, rows: Sequence[Row]) -> list[Path]:
    """`roofline.svg` and `roofline.png` into the run folder."""
    return save(figure(target, rows), target.path / "roofline")
