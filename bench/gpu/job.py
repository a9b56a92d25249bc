"""What the child process of `addbench gpu-check` is asked, and what it answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class GpuJob:
    """What the child is to do.

    Attributes:
        bundle: folder of the bundle.
        device: `cuda` or `cpu`.
        decoders, steps, batch: what parity and profile look at; batch of the profile.
        quick: probes of a tenth of a second.
        out: the JSON file of results by stage. Stages that it holds are not run again.
    """

    bundle: str
    device: str
    decoders: list[str]
    steps: list[int]
    batch: int
    quick: bool
    out: str

    def backend(self, mode: str, **options: str) -> str:
        """The torch backend on this device, as the command line writes it."""
        chosen = {"device": self.device, "mode": mode, **options}
        return "torch:" + ",".join(f"{key}={value}" for key, value in sorted(chosen.items()))

    def columns(self) -> dict[str, Any]:
        return asdict(self)
