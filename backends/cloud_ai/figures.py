"""What the compiler and the runner print, as figures.

The format is that of Qualcomm's profiling notebook (quic/cloud-ai-sdk, tutorials/NLP/
Profiler-Intermediate), of SDK 1.10. Nobody documents it, so every line is looked for by itself and
whatever else is printed is left alone; what is not found is None.
"""

from __future__ import annotations

import re
from typing import Any

ESTIMATE = "compiler-estimate"
MEGABYTES = {"B": 1e-6, "BYTES": 1e-6, "KB": 1e-3, "MB": 1.0, "GB": 1e3}
"""KB of the compiler's tables are taken for 1000 bytes; whether they are 1024 is not said."""
UNREAL = 2**63
"""MAC counts beyond are a negative number that the compiler printed unsigned: seen in the
notebook, under a warning that not all operations are counted."""

_MACS = re.compile(r"^\s*AIC HMX MAC estimate:\s*(\d+)", re.MULTILINE)
_CONSTANTS = re.compile(
    r"^\s*Constants size:\s*([\d.]+)\s*\(?\s*(B|bytes|KB|MB|GB)\b", re.MULTILINE | re.IGNORECASE
)
_TRAFFIC = re.compile(
    r"^\s*(c\d+|total):\s*DDR traffic\s+(read|write):\s*([\d.]+)\s*(B|KB|MB|GB)\b",
    re.MULTILINE | re.IGNORECASE,
)
_RUNNER = re.compile(
    r"InferenceCnt\s+(\d+)\s+TotalDuration\s+(\d+)\s*us\s+BatchSize\s+(\d+)\s+Inf/Sec\s+([\d.]+)"
)


def parse_metrics(text: str) -> dict[str, Any]:
    """The output of `-aic-perf-metrics` as `compiler-estimate` figures.

    Returns:
        macs: multiply-accumulates of one inference on the matrix units, or None.
        constants_mb: weights and other constants, in 10^6 bytes, or None.
        ddr_read_mb, ddr_write_mb: of one inference; by core (`c00`), and `total`; maybe empty.
    """
    macs = [int(found) for found in _MACS.findall(text)]
    constants = [float(size) * MEGABYTES[unit.upper()] for size, unit in _CONSTANTS.findall(text)]
    traffic: dict[str, dict[str, float]] = {"read": {}, "write": {}}
    for where, kind, size, unit in _TRAFFIC.findall(text):
        traffic[kind.lower()][where] = round(float(size) * MEGABYTES[unit.upper()], 6)
    return {
        "provenance": ESTIMATE,
        "macs": macs[-1] if macs and macs[-1] < UNREAL else None,
        "constants_mb": round(constants[-1], 6) if constants else None,
        "ddr_read_mb": traffic["read"],
        "ddr_write_mb": traffic["write"],
    }


def parse_runner(text: str) -> dict[str, float] | None:
    """The line that qaic-runner ends with; times in milliseconds, None without such a line.

    `ms_per_inference` is the time over the count: with several in flight it is no latency.
    """
    found = _RUNNER.search(text)
    if found is None:
        return None
    count, duration_us, batch, rate = found.groups()
    return {
        "inferences": int(count),
        "batch": int(batch),
        "ms_per_inference": int(duration_us) / 1e3 / max(1, int(count)),
        "samples_per_s": float(rate),
    }
