"""One compiled part and what runs it: shapes, artifact, session, and how they fail."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from core.errors import AddbenchError, PreconditionError
from export.bundle import export_again
from export.models import PICTURE_PARTS

if TYPE_CHECKING:
    import torch

    from export.bundle import Bundle, Spec


class BackendError(AddbenchError):
    """A compile, a load or a run failed."""


class OutOfMemoryError(BackendError):
    """Host or device memory ran out; a sweep records it as `oom`."""


class NonFiniteError(BackendError):
    """The output holds NaN or infinity; a sweep records it as `non_finite`."""


class UnsupportedError(PreconditionError):
    """A combination that this backend or card does not do; says the nearest that works."""


@dataclass(frozen=True)
class Shapes:
    """The sizes that one compile is for. A backend with named axes may ignore `batch`."""

    batch: int
    width: int
    height: int


@dataclass(frozen=True)
class Artifact:
    """What a backend compiled for one part: a folder in the cache, or None when nothing is kept."""

    backend: str
    part: str
    key: str
    path: Path | None
    compile_s: float
    cached: bool

    @property
    def folder(self) -> Path:
        """The folder in the cache.

        Raises:
            BackendError: the backend keeps nothing.
        """
        if self.path is None:
            raise BackendError("the artifact has no folder", "it was not compiled", "compile it")
        return self.path


class Session(ABC):
    """A loaded artifact that runs one part: tensors in, tensors out, on `device`."""

    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]
    device: str = "cpu"
    load_s: float = 0.0
    cyclic: ClassVar[bool] = False
    """Whether closing it leaves its memory in reference cycles, which have to be looked for."""

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name, of exactly the inputs that the graph has."""
        if inputs.keys() != self.inputs.keys():
            raise BackendError(
                f"the inputs {sorted(inputs)} do not fit",
                f"this graph takes {sorted(self.inputs)}",
                "pass exactly these",
            )
        return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...

    def holding(self, prompt: torch.Tensor) -> AbstractContextManager[None]:
        """A block in which every run has `prompt` as its `encoder_hidden_states`: a session may
        compute once what depends on it alone. This one does nothing of the kind."""
        return nullcontext()

    def synchronize(self) -> None:
        """Wait for the device. Nothing to wait for on synchronous backends."""

    def close(self) -> None:
        """Release what the session holds. Called once, by the pipeline or the `with` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stage_parts(parts: Sequence[str], decoder: str, encoder: str | None = None) -> tuple[str, ...]:
    """The parts one pipeline needs: every text encoder, the UNet and one decoder; with a picture
    to start from, the `encoder` of pictures too."""
    other = {"vae": "taesd_decoder", "taesd": "vae_decoder"}[decoder]
    unused = {other, *PICTURE_PARTS} - {f"{encoder}_encoder"}
    return tuple(part for part in parts if part not in unused)


def encoders(bundle: Bundle) -> tuple[str, ...]:
    """The encoders of pictures of a bundle, the VAE's first; none in one of before they were."""
    return tuple(part.removesuffix("_encoder") for part in PICTURE_PARTS if part in bundle.parts)


def check_encoder(bundle: Bundle, encoder: str) -> None:
    """Refuse an encoder of pictures that the bundle does not have.

    Raises:
        PreconditionError: the message names the command that exports one.
    """
    names = encoders(bundle)
    if encoder in names:
        return
    if not names:
        raise PreconditionError(
            f"the bundle {bundle.path.name} cannot start from a picture",
            "it was exported before encoders of pictures were, and holds none",
            f"export it again: {export_again(bundle)}",
        )
    raise PreconditionError(
        f"there is no encoder called {encoder!r} in {bundle.name}",
        f"its encoders of pictures: {', '.join(names)}",
        f"use --encoder {names[0]}",
    )


def decoders(bundle: Bundle) -> tuple[str, ...]:
    """The decoders of a bundle, the best first: the VAE that the model was trained with, where it
    has one, before the tiny one that imitates it."""
    names = [part.removesuffix("_decoder") for part in bundle.parts if part.endswith("_decoder")]
    return tuple(sorted(names, key=lambda name: name != "vae"))


def check_decoder(bundle: Bundle, decoder: str) -> None:
    """Refuse a decoder that the bundle does not have."""
    if decoder not in (names := decoders(bundle)):
        raise PreconditionError(
            f"there is no decoder called {decoder!r} in {bundle.name}",
            f"its decoders: {', '.join(names)}",
            f"use --decoder {names[0]}",
        )
