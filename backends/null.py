"""A scripted device: a test double of a whole backend, so that all above it is tested without one.

It sleeps as long as it is told and gives the bundle's reference image where there is one. It can
be told to fail: `null:fail=crash,at=2` kills its process in the third pipeline call.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from backends.base import (
    Artifact,
    Backend,
    BackendError,
    Capability,
    Option,
    OutOfMemoryError,
    Session,
    Shapes,
)
from backends.pipeline.conditioning import Conditioning, Denoised, Start
from backends.pipeline.output import Output
from backends.pipeline.pipeline import DTYPES, Pipeline
from backends.pipeline.prompts import ImageCall
from export.lower import CANONICAL, Profile
from export.models import PICTURE_PARTS

if TYPE_CHECKING:
    from export.bundle import Bundle, Spec

FAILURES = ("none", "error", "crash", "hang", "oom", "nan", "wrong")


class NullSession(Session):
    """Sleeps, then returns zeros of the right shapes (a test double)."""

    def __init__(
        self, inputs: Mapping[str, Spec], outputs: Mapping[str, Spec], seconds: float
    ) -> None:
        self.inputs, self.outputs, self.seconds = inputs, outputs, seconds

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        time.sleep(self.seconds)
        batch = next(t.shape[0] for name, t in inputs.items() if name != "timestep")
        return {
            name: torch.zeros(
                [size if isinstance(size, int) else batch for size in spec.shape],
                dtype=DTYPES[spec.dtype],
            )
            for name, spec in self.outputs.items()
        }


class NullPipeline(Pipeline):
    """Decodes to the reference image of the step count, or fails as scripted (a test double)."""

    calls = 0
    steps = 0
    kept = 0
    """How many of the steps run on a picture; 0 where the call starts from noise."""

    def _draw(self, call: ImageCall) -> Output:
        self.steps, self.kept = call.steps, call.steps - call.first if call.starts else 0
        try:
            return super()._draw(call)
        finally:
            self.calls += 1

    def denoise(
        self,
        conditioning: Conditioning,
        steps: int,
        seeds: Sequence[int],
        start: Start | None = None,
    ) -> Denoised:
        options = self.backend.options
        if options["only_steps"] in (0, steps) and self.calls == options["at"]:
            fail(options["fail"])
        return super().denoise(conditioning, steps, seeds, start)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        sample = super().decode(latents)
        references = self.bundle.references()
        known = None
        if references is not None:
            redraw = (self.decoder, self.steps, self.encoder or "", self.kept)
            known = (
                references.redrawn.get(redraw)
                if self.kept
                else references.images.get((self.decoder, self.steps))
            )
        if known is not None:
            image = torch.from_numpy(known.copy())
            sample = (image.permute(2, 0, 1).float() / 127.5 - 1).expand_as(sample).clone()
        failing = self.backend.options["only_steps"] in (0, self.steps)
        if failing and self.backend.options["fail"] == "nan":
            sample[..., 0] = float("nan")
        if failing and self.backend.options["fail"] == "wrong":
            sample = -sample
        return sample


def fail(how: str) -> None:
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        time.sleep(1e6)
    if how == "oom":
        raise OutOfMemoryError("the scripted device ran out of memory", "fail=oom", "drop fail=oom")
    if how == "error":
        raise BackendError("the scripted device failed", "fail=error", "drop fail=error")


class NullBackend(Backend):
    name = "null"
    summary = "a scripted device for tests: sleeps, returns reference images, fails on demand"
    keeps_artifacts = False
    option_types: ClassVar[Mapping[str, Option]] = {
        "text_ms": Option(1.0, "what each text encoder takes", float),
        "unet_ms": Option(2.0, "what a UNet step takes", float),
        "decode_ms": Option(1.0, "what the decoder takes", float),
        "encode_ms": Option(1.0, "what the encoder of pictures takes", float),
        "load_ms": Option(0.0, "what loading a part takes", float),
        "fail": Option("none", "what goes wrong (nan and wrong: in every call)", choices=FAILURES),
        "at": Option(0, "the pipeline call, from 0, in which it goes wrong", int),
        "only_steps": Option(0, "fail only in calls of this many steps (0: any)", int),
        "usable": Option(True, "0: the probe says no"),
    }

    def probe(self) -> Capability:
        if not self.options["usable"]:
            return Capability(False, "it was told so", "null:usable=0", "drop usable=0")
        return Capability(True, self.summary, version="1", devices=("cpu",))

    def profile(self, part: str) -> Profile:
        return CANONICAL

    def precision(self, bundle: Bundle) -> str:
        return "fp32"

    def fingerprint(self) -> dict[str, str]:
        return {"null": "1"}

    def pipeline(self, bundle: Bundle, decoder: str, shapes: Shapes, **rest: Any) -> Pipeline:
        return NullPipeline(self, bundle, decoder, shapes, **rest)

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        time.sleep(self.options["load_ms"] / 1e3)
        stage = artifact.part.removesuffix("_2").removesuffix("_encoder")
        stage = "decode" if stage.endswith("_decoder") else stage
        stage = "encode" if artifact.part in PICTURE_PARTS else stage
        info = bundle.parts[artifact.part]
        return NullSession(
            {spec.name: spec for spec in info.inputs},
            {spec.name: spec for spec in info.outputs},
            self.options[f"{stage}_ms"] / 1e3,
        )
