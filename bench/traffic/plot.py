"""Latency against offered load, with the knee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_knee(measurements: Sequence[Mapping[str, Any]], limit_s: float, out: Path) -> None:
    """Draw the `server` measurements: median and 99th percentile by rate, the limit, the peak."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = sorted((m for m in measurements if m["scenario"] == "server"), key=lambda m: m["rate"])
    rates = [point["rate"] for point in points]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(rates, [p["planned_p99_ms"] for p in points], "o-", label="p99, from planned arrival")
    axes.plot(rates, [point["p50_ms"] for point in points], "s--", label="median")
    axes.axhline(1e3 * limit_s, color="0.5", linewidth=1)
    axes.annotate(f"limit {1e3 * limit_s:.4g} ms", (rates[0], 1e3 * limit_s), va="bottom")
    if peak := max((p["rate"] for p in points if p["within_limit"]), default=None):
        axes.axvline(peak, color="0.5", linestyle=":", linewidth=1)
        axes.annotate(f"knee {peak:.4g}/s", (peak, 0.97), xycoords=("data", "axes fraction"),
                      rotation=90, va="top", ha="right")  # fmt: skip
    axes.set(xlabel="offered load (requests a second)", ylabel="latency (ms)", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(out)
    pyplot.close(figure)
