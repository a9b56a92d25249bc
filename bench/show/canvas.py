"""What every picture of the project is drawn with: style, colours, units, files."""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import style
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from core.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

STYLE = {
    "svg.hashsalt": "addbench",  # the same ids, and so the same bytes, every time
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlesize": 10.5,
}
# Okabe and Ito's palette: tells apart for all common forms of colour blindness. Yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SHAPES = {"vae": ("o", "-"), "taesd": ("^", (0, (5, 2)))}
"""Marker and dash of a decoder."""
RUN_MARKERS: tuple[dict[str, str], ...] = (
    {},
    {"o": "s", "^": "v"},
    {"o": "D", "^": "<"},
    {"o": "P", "^": ">"},
)
"""What a second, third, ... run of a plot has in place of a decoder's marker."""
HUES = {
    "ort": "#0072B2",
    "openvino": "#D55E00",
    "torch": "#009E73",
    "optimum": "#CC79A7",
    "trt": "#56B4E9",
    "cuda": "#E69F00",
    "qaic": "#882255",
    "qnn": "#999933",
    "web": "#44AA99",
    "null": "#444444",
}
"""One colour a backend, in every plot of the project."""
NEUTRAL = "#555555"
"""The colour of a mark that stands for no backend."""
DARK, PLAIN, LIGHT = -0.45, 0.0, 0.5
SHADES = {
    "": PLAIN,
    "precision=bf16": DARK,
    "precision=int8": LIGHT,
    "precision=fp8": LIGHT,
    "mode=compile": DARK,
}
"""Options of a backend that have a shade of its colour of their own."""


@dataclass(frozen=True)
class Look:
    """How a backend with its options is drawn: a shade of its colour, filled or hollow."""

    colour: str
    hollow: bool


def look_of(backend: str, options: str, taken: Collection[Look] = ()) -> Look:
    """The look of a backend, or the next shade of its colour that is not `taken` in a plot."""
    known = options in SHADES
    wanted = Look(shade(hue(backend), SHADES.get(options, PLAIN)), not known)
    others = (
        Look(shade(hue(backend), amount), hollow)
        for hollow in (not known, known)
        for amount in (PLAIN, DARK, LIGHT, 1.6 * DARK, 1.5 * LIGHT)
    )
    return next((look for look in (wanted, *others) if look not in taken), wanted)


def hue(backend: str) -> str:
    """The colour of a backend; one that is in no table is neutral."""
    return HUES.get(backend, NEUTRAL)


def shade(colour: str, amount: float) -> str:
    """The colour mixed with white, or with black where `amount` is negative."""
    towards = 1.0 if amount > 0 else 0.0
    red, green, blue = (c + (towards - c) * abs(amount) for c in to_rgb(colour))
    return to_hex((red, green, blue))


def scale_of(largest_ms: float) -> tuple[float, str]:
    """(milliseconds in a unit, unit) for an axis up to `largest_ms`."""
    return (1e3, "s") if largest_ms >= 2000 else (1.0, "ms")


def digits(value: float) -> str:
    """Three digits, and no exponent for thousands."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def plain_log(axis: Axis) -> None:
    """1, 2, 5 in plain numbers: a reader compares seconds, not powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


FORMATS: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None, "Creator": None}},
    "png": {"dpi": 160, "metadata": {"Software": None}},
}


def image_bytes(drawn: Figure, form: str) -> bytes:
    """The figure as `svg` or `png`. The SVG is the same every time."""
    buffer = io.BytesIO()
    with style.context(STYLE):
        drawn.savefig(buffer, format=form, facecolor="white", **FORMATS[form])
    return buffer.getvalue()


def save(drawn: Figure, stem: Path) -> list[Path]:
    """Write `stem.svg` and `stem.png`, or the one file that `stem` names."""
    files = []
    named = stem.suffix.removeprefix(".")
    for form in [named] if named in FORMATS else FORMATS:
        file = stem if named in FORMATS else stem.with_name(f"{stem.name}.{form}")
        write_atomic(file, image_bytes(drawn, form))
        files.append(file)
    return files
