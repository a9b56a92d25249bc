"""A pipeline whose images this CPU computes, FP16 between the parts, and whose times are modelled.

Inside a part the CPU computes in FP32, so an overflow there does not show; what a part takes and
gives is rounded to FP16, as it is handed over on the card. An image depends neither on the card nor
on its split nor on the batch: it is made once, alone, and kept in the artifact cache.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from backends.artifacts.cache import ArtifactCache
from backends.base import Shapes
from backends.modelled.card import estimate
from backends.modelled.costs import bundle_costs
from backends.onnxrt import operators
from backends.ort import OrtBackend
from backends.pipeline.output import Output, Timings
from backends.pipeline.pipeline import Pipeline
from backends.pipeline.prompts import ImageCall
from backends.pipeline.recipe import Recipe
from core.files import ROOT, read_json, sha256_file, sha256_json, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from backends.modelled.backend import ModelledBackend
    from export.bundle import Bundle

IMAGE, FACTS = "image.npy", "facts.json"
CODE = (
    "backends/modelled/pipeline.py",
    "backends/pipeline/pipeline.py",
    "backends/ort.py",
    *(str(source.relative_to(ROOT)) for source in operators.SOURCES),
)
"""Our own code that decides what an image looks like."""


class RoundedPipeline(Pipeline):
    """ONNX Runtime on the CPU, with everything that a part takes or gives rounded to FP16."""

    def run(self, part: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        given = {name: to_half(tensor) for name, tensor in inputs.items()}
        return {name: to_half(tensor) for name, tensor in super().run(part, **given).items()}


def to_half(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to FP16, in the dtype it had: beyond 65504 it is infinite, as on the card."""
    return tensor.half().to(tensor.dtype) if tensor.is_floating_point() else tensor


class ModelledPipeline(Pipeline):
    """Images from a RoundedPipeline or the cache, timings from the model of the card."""

    backend: ModelledBackend
    can_stage = False  # by a clock

    def prepare(self) -> Self:
        """Nothing to compile: what an image needs is loaded when one has to be made."""
        self.painter = Painter(self.bundle, self.decoder, self.recipe)
        return self

    def close(self) -> None:
        self.painter.close()

    def _draw(self, call: ImageCall) -> Output:
        made = [
            self.painter.image(prompt, one, call.steps, call.negative and call.negative[at])
            for at, (prompt, one) in enumerate(zip(call.prompts, call.seeds, strict=True))
        ]
        facts = made[0][1]
        asked = self.backend.call(self.decoder, len(made), facts["timesteps"], self.recipe)
        found = estimate(self.backend.card, bundle_costs(self.bundle), asked)
        unet = [found.stages["unet_step"].mid] * asked.steps
        text, decode, rest = (found.stages[name].mid for name in ("text", "decode", "rest"))
        timings = Timings(text, unet, decode, rest, text + sum(unet) + decode + rest)
        images = np.stack([image for image, _ in made])
        return Output(images, timings, facts["nfe"], self.backend.provenance)


class Painter:
    """Makes images one at a time, or takes them from the cache. Loads nothing before it must."""

    def __init__(self, bundle: Bundle, decoder: str, recipe: Recipe) -> None:
        self.bundle, self.decoder, self.recipe = bundle, decoder, recipe
        self._pipeline: RoundedPipeline | None = None

    def pipeline(self) -> RoundedPipeline:
        """Raises UnavailableError where the CPU's runtime is missing."""
        if self._pipeline is None:
            backend = OrtBackend()
            backend.probe().require(backend.name)
            shapes = Shapes(1, *self.bundle.size)
            made = RoundedPipeline(backend, self.bundle, self.decoder, shapes, recipe=self.recipe)
            self._pipeline = made.prepare()
        return self._pipeline

    def image(
        self, prompt: str, seed: int, steps: int, negative: str | list[str] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """uint8 [height, width, 3], and what was counted: `nfe`, `timesteps`."""
        key = {
            "what": "an image with FP16 between the parts",
            "bundle": self.bundle.hash,
            "decoder": self.decoder,
            "recipe": asdict(self.recipe),
            "prompt": prompt,
            "seed": seed,
            "steps": steps,
            "runtime": OrtBackend().fingerprint(),
            **({} if negative is None else {"negative": negative}),
            "code": [sha256_file(ROOT / file) for file in CODE],
        }

        def make(folder: Path) -> None:
            output = self.pipeline()([prompt], steps=steps, seed=[seed], negative=negative)
            np.save(folder / IMAGE, output.images[0])
            facts = {"nfe": output.nfe, "timesteps": len(output.timings.unet)}
            write_json(folder / FACTS, facts)

        label = f"{self.bundle.name} image, {self.decoder}, {steps} steps"
        folder, _ = ArtifactCache().get_or_make(sha256_json(key)[:24], label, make)
        return np.load(folder / IMAGE), read_json(folder / FACTS)

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
