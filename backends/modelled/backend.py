"""The backend `qaic` for a card that is given by name: everything but the images is modelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from backends.base import (
    Artifact,
    Backend,
    BackendError,
    Capability,
    Option,
    Session,
    Shapes,
    UnsupportedError,
)
from core.devices import Device, devices
from export.lower import CANONICAL, Profile

if TYPE_CHECKING:
    from backends.modelled.card import Call
    from backends.pipeline.pipeline import Pipeline
    from backends.pipeline.recipe import Recipe
    from export.bundle import Bundle

VENDOR = "Qualcomm"
SPLITS = ("auto", "pipelines", "batch", "parts", "guidance")


class ModelledBackend(Backend):
    name = "qaic"
    summary = "a Cloud AI 100 by name: images from this CPU, times and energy from a model of it"
    provenance = "modelled"
    keeps_artifacts = False
    no_pictures = "the model of its card was fitted to text to image, and prices no encoder"
    resident = "its card is modelled with all parts loaded"
    option_types: ClassVar[Mapping[str, Option]] = {
        "device": Option("ai100-ultra", "the card whose model it is"),
        "split": Option(
            "auto",
            "batch-1 pipelines side by side on the SoCs, a batch on one, an SoC for each part, or"
            " two for a pipeline with guidance",
            choices=SPLITS,
        ),
    }

    def __init__(self, options: Mapping[str, str] | None = None) -> None:
        super().__init__(options)
        self.card: Device = devices()[self.options["device"]]
        self.device = self.card.name
        if self.card.vendor != VENDOR:
            known = [card.name for card in devices().values() if card.vendor == VENDOR]
            raise UnsupportedError(
                f"{self.card.name} is no {VENDOR} card",
                f"{self.name} drives, or models, {', '.join(known)}",
                f"use --device {known[-1]}, or the id of a card that is here",
            )

    @property
    def split(self) -> str:
        from backends.modelled.card import default_split

        chosen: str = self.options["split"]
        return default_split(self.card) if chosen == "auto" else chosen

    def call(self, decoder: str, batch: int, steps: int, recipe: Recipe) -> Call:
        """What the model of the card is asked about."""
        from backends.modelled.card import Call

        return Call(
            decoder,
            steps,
            batch,
            self.split,
            unet_inputs=2 if recipe.guidance_mode == "batch" else 1,
            unet_calls=2 if recipe.guidance_mode == "calls" else 1,
        )

    def effective_options(self) -> dict[str, str]:
        return super().effective_options() | {"split": self.split}

    def probe(self) -> Capability:
        return Capability(True, self.summary, version="modelled", devices=(self.device,))

    def profile(self, part: str) -> Profile:
        return CANONICAL

    def precision(self, bundle: Bundle) -> str:
        return "fp16"

    def storage(self, bundle: Bundle) -> str:
        return "fp16"

    def fingerprint(self) -> dict[str, str]:
        from backends.modelled import VERSION

        return {"model of the card": str(VERSION)}

    def pipeline(self, bundle: Bundle, decoder: str, shapes: Shapes, **rest: Any) -> Pipeline:
        from backends.modelled.pipeline import ModelledPipeline

        return ModelledPipeline(self, bundle, decoder, shapes, **rest)

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        raise BackendError(
            f"{self.device} is modelled: there is nothing to load {artifact.part} on",
            "a modelled card has no sessions of its own, its images come from the CPU",
            "call the pipeline, or name a card that is here by its id",
        )
