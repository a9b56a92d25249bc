"""Known accelerators: peak, bandwidth, memory and power, each with its source (devices.csv)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from core.errors import PreconditionError

TABLE = Path(__file__).with_name("devices.csv")
REPORTED = {
    # what drivers and runtimes call a card ends in these words
    "A100-SXM4-80GB": "a100-sxm-80gb",
    "A10G": "a10g",
    "L4": "l4",
    "RTX 4090": "rtx-4090",
    "H100 80GB HBM3": "h100-sxm",
    "H200": "h200-sxm",
    "L40S": "l40s",
    "H100 PCIe": "h100-pcie",
    "H100 NVL": "h100-nvl",
    "RTX 2080 Ti": "rtx-2080-ti",
    "RTX 3090": "rtx-3090",
    "Tesla T4": "t4",
}


@dataclass(frozen=True)
class Device:
    """One accelerator card.

    Attributes:
        socs: chips on the card, each with its own share of peak, bandwidth and memory.
        fp16_tflops_dense, int8_tops_dense: of the whole card, without sparsity; of FP16 the fastest
            way, which on GeForce cards adds up in FP16.
        fp16_tflops_fp32_accumulate: where adding up in FP32 is slower; None where it is not.
        memory_gb, memory_gb_per_s: of the whole card.
        tdp_w: the power that the card is limited to.
        kind_of_figure: `datasheet`, or `measured` for what one card was seen to reach.
        source, url: the document that the figures come from, and where it, or a copy of its table,
            was read.
        not_checked: which of the figures could not be read there; "" for none.
    """

    name: str
    vendor: str
    socs: int
    fp16_tflops_dense: float
    fp16_tflops_fp32_accumulate: float | None
    int8_tops_dense: float | None
    memory_gb: float
    memory_gb_per_s: float
    tdp_w: float
    kind_of_figure: str
    source: str
    url: str
    not_checked: str

    @property
    def source_text(self) -> str:
        """Where the figures are from, and which of them could not be read there."""
        place = f" ({self.url})" if self.url else ""
        unread = f"; not checked: {self.not_checked}" if self.not_checked else ""
        return f"{self.source}{place}{unread}"

    @property
    def slower_fp16_tflops(self) -> float:
        """The FP16 rate of programs that add up in FP32."""
        return self.fp16_tflops_fp32_accumulate or self.fp16_tflops_dense


@cache
def devices() -> dict[str, Device]:
    """Every known device by name."""
    with TABLE.open(newline="") as file:
        return {
            row["device"]: Device(
                name=row["device"],
                vendor=row["vendor"],
                socs=int(row["socs"]),
                fp16_tflops_dense=float(row["fp16_tflops_dense"]),
                fp16_tflops_fp32_accumulate=float(row["fp16_tflops_fp32_accumulate"])
                if row["fp16_tflops_fp32_accumulate"]
                else None,
                int8_tops_dense=float(row["int8_tops_dense"]) if row["int8_tops_dense"] else None,
                memory_gb=float(row["memory_gb"]),
                memory_gb_per_s=float(row["memory_gb_per_s"]),
                tdp_w=float(row["tdp_w"]),
                kind_of_figure=row["kind_of_figure"],
                source=row["source"],
                url=row["url"],
                not_checked=row["not_checked"],
            )
            for row in csv.DictReader(file)
        }


def find_device(name: str) -> Device:
    """The device called `name` in the table, or as its driver calls it."""
    found = devices().get(name) or identify(name)
    if found is None:
        raise PreconditionError(
            f"there is no figure for a device called {name!r}",
            f"known devices: {', '.join(devices())}",
            "pick one of these, or add a line with its source to core/devices.csv",
        )
    return found


def identify(reported: str) -> Device | None:
    """The device whose driver calls itself `reported`; None if it is none of the table.

    Nothing may follow: `RTX 4090 Laptop GPU`, `H200 NVL` or a MIG slice are other devices.
    """
    words = reported.replace("-", " ").split()
    for part, name in REPORTED.items():
        wanted = part.replace("-", " ").split()
        if words[-len(wanted) :] == wanted:
            return devices()[name]
    return None
