"""MODELS: what the toolkit knows of each model, as data. No heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.errors import PreconditionError

TextEncoderForm = Literal["penultimate", "final"]
"""`penultimate`: before the last layer, no final norm (SDXL); `final`: after both (SD)."""

Decoder = Literal["vae", "taesd"]
DECODERS: tuple[Decoder, ...] = ("vae", "taesd")
PARTS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "taesd_decoder")
"""Every part, in the order in which a pipeline runs them."""


@dataclass(frozen=True)
class Model:
    """A model: its checkpoint and licence, and how its pipeline is put together.

    Attributes:
        architecture: folder below `export/architectures/` with diffusers-format configs; what
            `--weights random` instantiates.
        checkpoint: hub id, or None when only random weights exist.
        vae: hub id of the FP16-safe autoencoder used instead of the checkpoint's own, or None.
        taesd: hub id of the tiny autoencoder, or None.
        text_encoders: form of the hidden state taken from each text encoder, in order.
        pooled: whether the last text encoder also gives `text_embeds`, and the UNet takes
            `text_embeds` and `time_ids`.
        size: default width and height in pixels.
        scheduler: diffusers class name; `spacing` is its timestep spacing.
        steps, guidance: the defaults of the published recipe (guidance 0: none).
    """

    name: str
    architecture: str
    checkpoint: str | None
    licence: str
    licence_notice: str
    vae: str | None
    taesd: str | None
    text_encoders: tuple[TextEncoderForm, ...]
    pooled: bool
    size: int
    scheduler: str
    spacing: str
    steps: int
    guidance: float

    @property
    def parts(self) -> tuple[str, ...]:
        encoders = ("text_encoder", "text_encoder_2")[: len(self.text_encoders)]
        return (*encoders, "unet", "vae_decoder", "taesd_decoder")


MODELS = {
    model.name: model
    for model in (
        Model(
            name="sdxl-turbo",
            architecture="sdxl-turbo",
            checkpoint="stabilityai/sdxl-turbo",
            licence="stabilityai-ai-community (non-commercial)",
            licence_notice=(
                "SDXL-Turbo's weights are under the Stability AI non-commercial research community "
                "licence: commercial use needs an agreement with Stability AI"
            ),
            vae="madebyollin/sdxl-vae-fp16-fix",
            taesd="madebyollin/taesdxl",
            text_encoders=("penultimate", "penultimate"),
            pooled=True,
            size=512,
            scheduler="EulerAncestralDiscreteScheduler",
            spacing="trailing",
            steps=1,
            guidance=0.0,
        ),
        Model(
            name="tiny-sdxl",
            architecture="tiny-sdxl",
            checkpoint=None,
            licence="none needed: the weights are random numbers",
            licence_notice="",
            vae=None,
            taesd=None,
            text_encoders=("penultimate", "penultimate"),
            pooled=True,
            size=64,
            scheduler="EulerAncestralDiscreteScheduler",
            spacing="trailing",
            steps=1,
            guidance=0.0,
        ),
    )
}

DEFAULT_MODEL = "tiny-sdxl"


def find_model(name: str) -> Model:
    if name not in MODELS:
        raise PreconditionError(
            f"there is no model called {name!r}",
            f"known models: {', '.join(MODELS)}",
            "pick one of these, or pass the folder of a checkpoint in diffusers format",
        )
    return MODELS[name]
