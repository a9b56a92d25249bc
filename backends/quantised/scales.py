"""Scales of a calibrated scheme: which a backend is asked for, on what, and the cache that keeps
them. They are made in a process of their own, and compared on the CPU in another: two entries of
the cache, since memory may suffice for the one and not for the other.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.artifacts.cache import ArtifactCache
from backends.artifacts.child import run_child, serve
from backends.artifacts.code import code_hash
from backends.base import BackendError, UnsupportedError
from core.errors import PreconditionError
from core.files import read_json, require_disk, sha256_json
from core.memory import require_memory
from export.quantize.calibration import Calibration, calibration_path, command
from export.quantize.modelopt import modelopt_version
from export.quantize.qdq import QdqScheme, scheme_of

if TYPE_CHECKING:
    from export.bundle import Bundle

SMALL = 2**29
"""Bytes of a calibration beside the weights: torch, which modelopt imports, and onnxruntime."""


@dataclass(frozen=True)
class Quantisation:
    """A scheme on the tensors of a calibration file, for one bundle.

    Attributes:
        modelopt: its version.
    """

    scheme: QdqScheme
    calibration: Calibration
    modelopt: str

    @cached_property
    def key(self) -> dict[str, str]:
        """What scales depend on beside the graph and its weights."""
        return {
            "scheme": self.scheme.name,
            "calibration": self.calibration.hash,
            "modelopt": self.modelopt,
            "scales_code": code_hash(
                "export.quantize.modelopt",
                "export.quantize.calibration",
                "export.quantize.qdq",
                "backends.check.scales_parity",
            ),
        }


def calibration_file(bundle: Bundle, file: str) -> Path:
    """The path that `file` names; `auto` is where `addbench calibrate` puts it."""
    return calibration_path(bundle) if file == "auto" else Path(file)


def quantisation(bundle: Bundle, precision: str, file: str) -> Quantisation:
    """What `precision` (fp8, int8) asks for of `bundle`, checked before any work.

    Args:
        file: see `calibration_file`.

    Raises:
        PreconditionError: modelopt or the calibration file is missing, or the file is damaged or
            of another model.
        UnsupportedError: the bundle is not FP16.
    """
    if bundle.dtype != "fp16":
        raise UnsupportedError(
            f"precision={precision} does not fit {bundle.path.name}",
            f"what is not {precision.upper()} stays as the graph has it, and that is {bundle.dtype}"
            " in this bundle: slower than an FP16 one without",
            f"export it with --dtype fp16: addbench export --model {bundle.name} --dtype fp16",
        )
    path = calibration_file(bundle, file)
    if bundle.weights == "random" and not path.exists():
        raise PreconditionError(
            f"precision={precision} on {bundle.path.name}, whose weights are random",
            "scales follow what a trained model computes; those of random weights are good for"
            f" timing and say nothing of an image. There is no file {path}",
            f"use trained weights, or record it all the same: {command(bundle)}",
        )
    found = Calibration.open(path, command(bundle))
    found.require(bundle)
    return Quantisation(scheme_of(precision), found, modelopt_version())


def scales(bundle: Bundle, asked: Quantisation) -> Path:
    """The folder with the scales of `bundle`'s UNet, cached."""

    key = sha256_json({"graph": bundle.parts["unet"].hash} | asked.key)[:24]
    label = f"{bundle.name} unet {asked.scheme.name} scales"
    path, _ = ArtifactCache().get_or_make(key, label, lambda folder: _make(bundle, asked, folder))
    return path


def comparison(bundle: Bundle, asked: Quantisation, made: Path) -> dict[str, Any]:
    """What the CPU makes of the scales in `made`, cached; where memory does not suffice, a record
    that says so, which is not: whoever asks next has it made."""
    from backends.check.scales_parity import PARITY, report

    name = asked.scheme.name
    doing = f"comparing {bundle.name} unet in {name} with the UNet as it is"
    need = comparison_need(bundle)

    def make(folder: Path) -> None:
        require_memory(need, doing)
        job = {
            "bundle": str(bundle.path),
            "calibration": str(asked.calibration.path.absolute()),
            "scales": str(made),
            "folder": str(folder),
        }
        run_child(
            "backends.check.scales_parity",
            job,
            folder,
            doing=doing,
            need_bytes=need,
            advice="free memory",
        )
        print(report(read_json(folder / PARITY)), file=sys.stderr, flush=True)

    label = f"{bundle.name} unet {name} comparison"
    try:
        path, _ = ArtifactCache().get_or_make(comparison_key(made.name), label, make)
    except (BackendError, PreconditionError) as error:  # the scales are good without it
        skipped = {"scheme": name, "skipped": f"{error.what}: {error.why}"}
        print(report(skipped), file=sys.stderr, flush=True)
        return skipped
    return dict(read_json(path / PARITY))


def comparison_key(scales: str) -> str:
    """The cache's key of the comparison that belongs to the scales under key `scales`."""
    return sha256_json({"comparison of": scales})[:24]


def known_comparison(scales: str) -> dict[str, Any] | None:
    """The comparison of the scales under key `scales`, if it has been made."""
    from backends.check.scales_parity import PARITY

    file = ArtifactCache().root / comparison_key(scales) / PARITY
    return dict(read_json(file)) if file.exists() else None


def _make(bundle: Bundle, asked: Quantisation, folder: Path) -> None:
    info, name = bundle.parts["unet"], asked.scheme.name
    doing = f"calibrating {bundle.name} unet for {name}"
    need = memory_need(info.weight_bytes)
    require_disk(folder, disk_need(info.weight_bytes), doing)
    require_memory(need, doing)
    print(f"{doing} on {asked.calibration.samples} samples", file=sys.stderr, flush=True)
    job = {
        "bundle": str(bundle.path),
        "scheme": name,
        "calibration": str(asked.calibration.path.absolute()),
        "folder": str(folder),
    }
    run_child(
        "backends.quantised.scales",
        job,
        folder,
        doing=doing,
        need_bytes=need,
        advice="the versions that were seen to work are pinned in constraints.txt",
    )


def memory_need(weight_bytes: int) -> int:
    """Peak bytes of a calibration by modelopt 0.47, which holds the FP32 graph several times.

    Fitted to graphs with 42 and 294 MB of FP16 weights (1.2 and 5.4 GB); SDXL's UNet: 88 GB.
    """
    return 17 * weight_bytes + SMALL


def comparison_need(bundle: Bundle) -> int:
    """Peak bytes of a comparison, estimated: the FP16 UNet in FP32, twice while it is lowered and
    loaded, and the other parts in FP32 beside it."""
    weights = {name: info.weight_bytes for name, info in bundle.parts.items()}
    return 4 * weights.pop("unet") + 2 * sum(weights.values()) + SMALL


def disk_need(weight_bytes: int) -> int:
    """Bytes that it writes meanwhile, fitted to the same graphs (0.5 and 2.8 GB)."""
    return 10 * weight_bytes + SMALL


def _calibrate(job: dict[str, Any]) -> None:
    """Child process."""
    from export.bundle import Bundle
    from export.quantize.modelopt import make_scales

    bundle = Bundle.open(Path(job["bundle"]))
    graph = bundle.parts["unet"].graph
    make_scales(graph, job["scheme"], Path(job["calibration"]), Path(job["folder"]))


if __name__ == "__main__":
    serve(_calibrate)
