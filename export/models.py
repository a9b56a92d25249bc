"""MODELS: what the toolkit knows of each model, as data. No heavy imports."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from core.errors import PreconditionError
from export import prompts

TextEncoderForm = Literal["penultimate", "final"]
"""`penultimate`: before the last layer, no final norm (SDXL); `final`: after both (SD)."""

GuidanceForm = Literal["none", "free", "embedding"]
"""`none`: distilled without guidance; `free`: classifier-free, two UNet evaluations a step;
`embedding`: the scale is an input of the UNet (LCM), one evaluation a step."""

SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "lcm": "LCMScheduler",
}
"""What `--scheduler` takes -> diffusers class."""
SOLVERS = ("euler", "euler-a", "dpm++2m", "unipc", "ddim", "pndm")
"""Schedulers for any diffusion model that was not distilled: they solve the same equation."""

Decoder = Literal["vae", "taesd"]
DECODERS: tuple[Decoder, ...] = ("vae", "taesd")
PICTURE_PARTS = ("vae_encoder", "taesd_encoder")
"""What an image that starts from a picture takes besides: of the same autoencoder as a decoder."""
PARTS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "taesd_decoder", *PICTURE_PARTS)
"""Every part, in the order in which a pipeline runs them; those for a picture, which most images do
without, last."""
CONTEXT_PART = "unet_context"
"""Not of a bundle: what a compile may split off the UNet, see export/lower/context.py. A pipeline
runs it behind the text encoders."""


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
        scheduler: diffusers class name; `spacing` is its timestep spacing. "" for either: as the
            checkpoint's scheduler_config.json says.
        steps, guidance: the defaults of the published recipe (guidance 0: none).
        guidance_form: how guidance enters, and so whether it can be asked for.
        schedulers: names of SCHEDULERS that it may run with beside its own.
        step_counts: the only step counts that its weights were made for; empty: any.
        grid: a step count, at whose timesteps its weights were trained and at no others; 0: any.
        prediction: what the UNet predicts, where that is not what the scheduler's config says.
        unet: hub id of a UNet that replaces the checkpoint's, or `org/name/file.safetensors`.
        folder: a checkpoint that ships with the checkout, relative to it, or None.
        like: architecture folders that give what `architecture` lacks, the first that has it.
        sizes: least and greatest side of an image in pixels.
        pixels: that an image may have: the models of this family were trained at about so many, in
            buckets of many aspects.
        judge: what reads back from pixels whether a picture shows its caption (`distill/judge.py`).
        prompts: what it is asked to draw when it is timed and compared.
        clip_skip: layers left out before the hidden state that is taken, as diffusers counts them.
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
    guidance_form: GuidanceForm = "none"
    schedulers: tuple[str, ...] = ()
    step_counts: tuple[int, ...] = ()
    grid: int = 0
    prediction: str = ""
    unet: str | None = None
    folder: str | None = None
    like: tuple[str, ...] = ()
    sizes: tuple[int, int] = (256, 2048)
    pixels: int = 1024 * 1024
    judge: Literal["shapes"] | None = None
    prompts: tuple[str, ...] = prompts.GENERAL
    clip_skip: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """What draws from text alone. A checkpoint with an autoencoder has its encoder too."""
        encoders = ("text_encoder", "text_encoder_2")[: len(self.text_encoders)]
        return (*encoders, "unet", "vae_decoder", "taesd_decoder")


NON_COMMERCIAL = "stabilityai-ai-community (non-commercial)"
RAIL = "openrail++ (CreativeML Open RAIL++-M)"
RANDOM = "none needed: the weights are random numbers"

SDXL_TURBO = Model(
    name="sdxl-turbo",
    architecture="sdxl-turbo",
    checkpoint="stabilityai/sdxl-turbo",
    licence=NON_COMMERCIAL,
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
    grid=4,
)
SDXL_BASE = replace(
    SDXL_TURBO,
    name="sdxl-base",
    architecture="sdxl-base",
    like=("sdxl-turbo",),
    checkpoint="stabilityai/stable-diffusion-xl-base-1.0",
    licence=RAIL,
    licence_notice="",
    size=1024,
    scheduler="EulerDiscreteScheduler",
    spacing="leading",
    steps=50,
    guidance=5.0,
    guidance_form="free",
    schedulers=SOLVERS,
    grid=0,
)
LCM_SDXL = replace(
    SDXL_BASE,
    name="lcm-sdxl",
    architecture="lcm-sdxl",
    unet="latent-consistency/lcm-sdxl",
    scheduler="LCMScheduler",
    steps=4,
    guidance=8.0,
    guidance_form="embedding",
    schedulers=(),
)
SD15 = Model(
    name="sd15",
    architecture="sd15",
    like=("sdxl-turbo",),  # the text encoder is SDXL's first one, the tiny autoencoder the same
    checkpoint="stable-diffusion-v1-5/stable-diffusion-v1-5",
    licence="creativeml-openrail-m",
    licence_notice="",
    vae=None,
    taesd="madebyollin/taesd",
    text_encoders=("final",),
    pooled=False,
    size=512,
    scheduler="PNDMScheduler",
    spacing="",
    steps=20,
    guidance=7.5,
    guidance_form="free",
    schedulers=SOLVERS,
)
SD_TURBO = replace(
    SD15,
    name="sd-turbo",
    architecture="sd-turbo",
    like=("sd15", "sdxl-turbo"),
    checkpoint="stabilityai/sd-turbo",
    licence=NON_COMMERCIAL,
    licence_notice=SDXL_TURBO.licence_notice.replace("SDXL-Turbo", "SD-Turbo"),
    scheduler="EulerDiscreteScheduler",
    spacing="trailing",
    steps=1,
    guidance=0.0,
    guidance_form="none",
    schedulers=(),
    grid=4,
)
SHAPES_TURBO = replace(
    SDXL_TURBO,
    name="shapes-turbo",
    architecture="../../models/shapes-turbo",
    checkpoint=None,
    folder="models/shapes-turbo",
    licence="Apache-2.0, the project's own: trained here, from nothing",
    licence_notice="",
    vae=None,
    taesd=None,
    size=64,
    sizes=(64, 64),
    judge="shapes",
    prompts=prompts.SHAPES,
)
SHAPES_TEACHER = replace(
    SHAPES_TURBO,
    name="shapes-teacher",
    architecture="../../models/shapes-teacher",
    folder="models/shapes-teacher",
    scheduler="EulerDiscreteScheduler",
    steps=50,
    guidance=3.0,
    guidance_form="free",
    schedulers=SOLVERS,
    grid=0,
)
TINY_SDXL = replace(
    SDXL_TURBO,
    name="tiny-sdxl",
    architecture="tiny-sdxl",
    checkpoint=None,
    licence=RANDOM,
    licence_notice="",
    vae=None,
    taesd=None,
    size=64,
    sizes=(32, 256),
    grid=0,  # random numbers were trained nowhere
)
TINY_SD = replace(
    SD15,
    name="tiny-sd",
    architecture="tiny-sd",
    like=("tiny-sdxl",),
    checkpoint=None,
    licence=RANDOM,
    taesd=None,
    size=64,
    sizes=(32, 256),
)
TINY_LCM = replace(
    TINY_SD,
    name="tiny-lcm",
    architecture="tiny-lcm",
    scheduler="LCMScheduler",
    steps=4,
    guidance=8.0,
    guidance_form="embedding",
    schedulers=(),
)


def lightning(steps: int) -> Model:
    """SDXL-Lightning: UNet weights for one step count over SDXL base."""
    kind = "1step_unet_x0" if steps == 1 else f"{steps}step_unet"
    return replace(
        SDXL_BASE,
        name="sdxl-lightning" if steps == 4 else f"sdxl-lightning-{steps}step",
        unet=f"ByteDance/SDXL-Lightning/sdxl_lightning_{kind}.safetensors",
        spacing="trailing",
        prediction="sample" if steps == 1 else "epsilon",
        steps=steps,
        step_counts=(steps,),
        grid=steps,
        guidance=0.0,
        guidance_form="none",
        schedulers=(),
    )


MODELS = {
    model.name: model
    for model in (
        SHAPES_TURBO,
        SHAPES_TEACHER,
        SDXL_TURBO,
        SD_TURBO,
        SD15,
        SDXL_BASE,
        *map(lightning, (1, 2, 4, 8)),
        LCM_SDXL,
        TINY_SDXL,
        TINY_SD,
        TINY_LCM,
    )
}

DEFAULT_MODEL = "shapes-turbo"


def scheduler_name(cls: str) -> str:
    """The short name of a diffusers scheduler class, as `--scheduler` takes it."""
    return next((name for name, known in SCHEDULERS.items() if known == cls), cls)


def default_weights(model: Model) -> str:
    """What `--weights` means when it is left out: what ships, else the hub, else random."""
    if model.folder is not None:
        return "folder"
    return "random" if model.checkpoint is None else "hub"


def nearest_model(name: str) -> str:
    """The question whether a model of a like name was meant; "" where none is alike."""
    return "".join(f"did you mean {near}?" for near in difflib.get_close_matches(name, MODELS, 1))


def find_model(name: str) -> Model:
    if name not in MODELS:
        raise PreconditionError(
            f"there is no model called {name!r}",
            f"{nearest_model(name)} known models: {', '.join(MODELS)}".lstrip(),
            "pick one of these, or pass the folder of a checkpoint in diffusers format",
        )
    return MODELS[name]
