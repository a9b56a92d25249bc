"""The figures of a measurement under load, and whether LoadGen's own agree."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.traffic.generator import SAMPLES
from core.errors import AddbenchError

DETAIL = "mlperf_log_detail.txt"
AGREE = 0.01
"""How far LoadGen's figures and ours may be apart."""
JITTER_NS = 50_000
"""The least that two clocks in one process differ by: what Python takes between them."""
COMPLIANT_S, COMPLIANT_OFFLINE = 600.0, 5000
"""What MLPerf's rules ask of SDXL: seconds of a run, samples of an offline one."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value at the rank that LoadGen takes: index floor(share x n)."""
    return ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))]


def read_samples(folder: Path) -> list[dict[str, int]]:
    """Every sample of a measurement, in the order of its end."""
    lines = (folder / SAMPLES).read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda sample: sample["done_ns"])


def read_loadgen(folder: Path) -> dict[str, Any]:
    """LoadGen's results by key.

    Raises:
        AddbenchError: its log has none.
    """
    results: dict[str, Any] = {}
    for line in (folder / DETAIL).read_text().splitlines():
        head, _, text = line.partition(" ")
        if head == ":::MLLOG":
            entry = json.loads(text)
            results[entry["key"]] = entry["value"]
    if "result_validity" not in results:
        raise AddbenchError(
            "LoadGen gave no result", f"its log in {folder} ends before one", "run it again"
        )
    return results


def figures_of(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Figures of ours, LoadGen's beside them, and what keeps the run from being MLPerf's."""
    samples, loadgen = read_samples(folder), read_loadgen(folder)
    taken = sorted((sample["done_ns"] - sample["issued_ns"]) / 1e6 for sample in samples)
    first, last = min(s["issued_ns"] for s in samples), max(s["done_ns"] for s in samples)
    seconds = (last - first) / 1e9
    good = [sample for sample in samples if sample["code"] == 200]
    figures: dict[str, Any] = {
        "scenario": job["scenario"],
        "samples": len(samples),
        "failed": len(samples) - len(good),
        "seconds": round(seconds, 3),
        "per_second": round(len(good) / seconds, 4),
        "p50_ms": round(percentile(taken, 0.5), 4),
        "p90_ms": round(percentile(taken, 0.9), 4) if len(taken) >= 64 else None,
        "p99_ms": round(percentile(taken, 0.99), 4) if len(taken) >= 662 else None,
        "loadgen_valid": loadgen["result_validity"] == "VALID",
    }
    if job["scenario"] == "server":
        # LoadGen counts from the arrival that was planned, so what makes it late counts too.
        late_ms = float(loadgen["result_99.00_percentile_latency_ns"]) / 1e6
        figures |= {
            "rate": job["rate"],
            "planned_p99_ms": round(late_ms, 4),
            "planned_mean_ms": round(float(loadgen["result_mean_latency_ns"]) / 1e6, 4),
            "service_ms": round(median(s["done_ns"] - s["started_ns"] for s in samples) / 1e6, 4),
        }
        figures["within_limit"] = late_ms <= 1e3 * job["limit_s"] and not figures["failed"]
    figures["apart"] = apart(job["scenario"], figures, taken, loadgen)
    figures["mlperf"] = shortfalls(job, figures)
    return figures


def times_of(scenario: str, samples: Sequence[Mapping[str, int]]) -> list[float]:
    """Milliseconds of each request that was answered with a picture, in the order of its end."""
    since = "started_ns" if scenario == "offline" else "issued_ns"
    return [(s["done_ns"] - s[since]) / 1e6 for s in samples if s["code"] == 200]


def apart(
    scenario: str, figures: Mapping[str, Any], taken: Sequence[float], loadgen: Mapping[str, Any]
) -> dict[str, float]:
    """How far LoadGen's figures are from ours, as a share of ours, by figure."""
    pairs: dict[str, tuple[float, float]] = {}
    if scenario == "offline":
        rate = len(taken) / figures["seconds"]
        pairs["per_second"] = (rate, float(loadgen["result_samples_per_second"]))
    else:
        for name, share in (("50.00", 0.5), ("90.00", 0.9)):
            theirs = float(loadgen[f"result_{name}_percentile_latency_ns"]) / 1e6
            pairs[f"p{name[:2]}"] = (percentile(taken, share), theirs)
    jitter_ms = JITTER_NS / 1e6
    return {
        name: round(max(0.0, abs(ours - theirs) - jitter_ms * (scenario != "offline")) / ours, 5)
        for name, (ours, theirs) in pairs.items()
    }


def mean_of_md1(rate: float, service_ms: float) -> float:
    """The mean latency that queueing theory has for Poisson arrivals at one server that takes
    always the same (M/D/1): a check of the harness itself."""
    load = rate * service_ms / 1e3
    return service_ms * (1 + load / (2 * (1 - load)))


def agrees(figures: Mapping[str, Any]) -> bool:
    """Whether LoadGen's figures and ours are within 1%."""
    return all(share <= AGREE for share in figures["apart"].values())


def shortfalls(job: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    """Why this is not an MLPerf result; the benchmark itself is another one in any case."""
    short = ["another model, data set and quality target than MLPerf's"]
    if job["scenario"] == "offline" and figures["samples"] < COMPLIANT_OFFLINE:
        short.append(f"{figures['samples']} samples, {COMPLIANT_OFFLINE} are asked for")
    if figures["seconds"] < COMPLIANT_S:
        short.append(f"{figures['seconds']:g} s, {COMPLIANT_S:g} s are asked for")
    if not figures["loadgen_valid"]:
        short.append("LoadGen calls it invalid")
    return short
