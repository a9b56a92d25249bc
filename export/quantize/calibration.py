"""The calibration file: inputs of a trained model's UNet, recorded while it drew images.

A calibrated scheme (qdq.py) reads from them how large the values between the layers grow.
One safetensors file: each input of the UNet with a row for each recorded sample, in the graph's
own dtype, and in its metadata what made it. `addbench calibrate` records one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import PreconditionError
from core.files import build_root, sha256_file, sha256_json, write_atomic

if TYPE_CHECKING:
    import numpy as np
    import torch

    from export.bundle import Bundle

SCHEMA = 1
META = "addbench-calibration"
"""Key of the record in the file's metadata."""


@dataclass(frozen=True)
class CalibrationOrigin:
    """What made a calibration file.

    Attributes:
        model, weights, dtype: of the bundle; `unet`: hash of its UNet, graph and weights.
        prompts, seeds: one of each for every image.
        steps, scheduler, guidance: how the images were denoised; no guidance is 0.
        kept: timesteps recorded of each image, spread evenly over its steps.
        backend: what drew them, as `--backend` takes it.
        versions: of the packages that had a part in it.
    """

    model: str
    weights: str
    dtype: str
    unet: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    scheduler: str
    guidance: float
    kept: int
    backend: str
    versions: dict[str, str]

    @property
    def hash(self) -> str:
        return sha256_json(asdict(self))

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> CalibrationOrigin:
        lists = {"prompts": tuple(record["prompts"]), "seeds": tuple(record["seeds"])}
        return cls(**{**record, **lists})


class Calibration:
    """A calibration file that was opened and is whole."""

    def __init__(self, path: Path, origin: CalibrationOrigin, samples: int) -> None:
        self.path, self.origin, self.samples = path, origin, samples

    @classmethod
    def open(cls, path: Path, again: str = "") -> Calibration:
        """Open `path`; PreconditionError when it is missing, damaged or something else.

        Args:
            again: the command that records it, for the message.
        """
        from safetensors import SafetensorError, safe_open

        again = again or command()
        if not path.is_file():
            raise PreconditionError(
                f"there is no calibration file at {path}",
                "FP8 and calibrated INT8 take their scales from recorded tensors of the model",
                f"record one: {again}",
            )
        try:
            with safe_open(path, "np") as file:
                record = json.loads((file.metadata() or {})[META])
                sizes = {file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise PreconditionError(
                f"the calibration file {path} cannot be read",
                f"{error}: it is damaged or cut short",
                f"record it again: {again} --force",
            ) from error
        except (KeyError, ValueError) as error:
            raise _foreign(path, again) from error
        if record.get("schema") != SCHEMA or len(sizes) != 1:
            raise _foreign(path, again)
        return cls(path, CalibrationOrigin.of(record["origin"]), sizes.pop())

    @cached_property
    def hash(self) -> str:
        """The hash of the file's content."""
        return sha256_file(self.path)

    def require(self, bundle: Bundle) -> None:
        """Refuse a file that was recorded with another UNet than the bundle's."""
        if self.origin.unet != bundle.parts["unet"].hash:
            theirs = f"{self.origin.model}-{self.origin.weights}-{self.origin.dtype}"
            raise PreconditionError(
                f"the calibration file {self.path} is not of {bundle.path.name}",
                f"it was recorded with another UNet, that of {theirs}: graph or weights differ",
                f"record one with this model: {command(bundle)} --force",
            )

    def feeds(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """The samples one by one, as a UNet of batch 1 takes them: input -> array."""
        from safetensors import safe_open

        with safe_open(self.path, "np") as file:
            names = list(file.keys())
            for row in range(self.samples):
                yield {name: file.get_slice(name)[row : row + 1] for name in names}


def calibration_path(bundle: Bundle) -> Path:
    """Where the calibration file of `bundle` lies unless told otherwise."""
    return build_root() / "calibration" / f"{bundle.path.name}.safetensors"


def command(bundle: Bundle | None = None) -> str:
    """The command that records the file of `bundle`."""
    if bundle is None:
        return "addbench calibrate --model NAME"
    drawn = " --random-weights" if bundle.weights == "random" else ""
    return f"addbench calibrate --model {bundle.path}{drawn}"


def save(path: Path, origin: CalibrationOrigin, samples: Mapping[str, torch.Tensor]) -> None:
    """Write a calibration file, or a part of one, atomically.

    Args:
        samples: input of the UNet -> [samples, ...].
    """
    from safetensors.torch import save as to_bytes

    record = json.dumps({"schema": SCHEMA, "origin": asdict(origin)})
    content = {name: tensor.contiguous() for name, tensor in samples.items()}
    write_atomic(path, to_bytes(content, metadata={META: record}))


def join(path: Path, origin: CalibrationOrigin, parts: Sequence[Path]) -> None:
    """One file out of `parts`, which have the same tensors each."""
    import torch
    from safetensors.torch import load_file

    loaded = [load_file(part) for part in parts]
    names = sorted(loaded[0])
    save(path, origin, {name: torch.cat([part[name] for part in loaded]) for name in names})


def _foreign(path: Path, again: str) -> PreconditionError:
    return PreconditionError(
        f"{path} is not a calibration file that this version reads",
        f"its metadata has no record {META} of schema {SCHEMA}",
        f"record one: {again} --force",
    )
