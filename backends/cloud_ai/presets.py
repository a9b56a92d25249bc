"""Compiler settings for each card, part and batch, and where they come from.

Public is Qualcomm's SDXL-Turbo recipe (16 cores, 512 px, batch 1, with the VAE decoder) and, for
the UNet at batch 2, the same repository's SDXL base. Everything else is derived from those two and
has not been tried on a card: it is a place to start from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from backends.base import UnsupportedError
from export.models import PICTURE_PARTS

BATCHES = (1, 2, 4)
CORES = {"ultra": 16, "pro": 16, "standard": 14}
"""AI cores of one SoC, by card."""
SKUS = {"pcie ultra": "ultra", "pcie pro": "pro", "pcie": "standard"}
"""What `Sku Type` says, in lower case -> card. The open runtime prints `PCIe Ultra`, an SDK of 2025
was seen to print `Pcie Ultra`; which card each one means is our reading of them."""
SPLITS = ("pipelines", "batch", "parts")
"""How a call is spread over several devices, see lanes.py."""
RECIPE_OF = ("sdxl-turbo", (512, 512))
"""Model and size (width, height) of the public recipe."""
VAE_DIVISOR = 128
"""The recipe's, for a VAE that does not fit FP16."""
DEVIATIONS = (
    "as published but for: one symbol, since only the batch is a named axis of our graphs; FP16"
    " buffers (-custom-IO-list-file; buffers=fp32 leaves it out); text encoders that give only the"
    " hidden state that is used"
)


@dataclass(frozen=True)
class Preset:
    """Settings of one compile.

    Attributes:
        cores, mos, ols, depth_first_mem: see CompileSpec.
        block: queries of self-attention at a time, a field of the graph's profile; 0: all.
        follows: `public recipe`, or `derived`.
        note: in what way.
    """

    cores: int
    mos: int | None
    ols: int | None
    depth_first_mem: int | None
    block: int
    follows: Literal["public recipe", "derived"]
    note: str


def preset(card: str, part: str, batch: int) -> Preset:
    """The preset of `part` for `batch` images on one SoC of `card`.

    Raises:
        UnsupportedError: there is none for this batch.
    """
    if batch not in BATCHES:
        raise UnsupportedError(
            f"qaic has no preset for a batch of {batch}",
            f"one SoC is compiled for {', '.join(map(str, BATCHES))} images at a time",
            f"use --batch {max([b for b in BATCHES if b < batch], default=1)}, or several devices",
        )
    mos = ols = memory = None
    block, public, note = 0, batch == 1, "the text encoders are compiled without -mos and -ols"
    if part == "unet":
        mos, ols = (2, 1) if batch == 1 else (1, 2)
        block = 256 // batch
        public = batch <= 2
        note = {
            1: "self-attention in blocks of 256 queries",
            2: "settings of SDXL base at batch 2 and 1024 px, with blocks of 128 queries",
            4: "as batch 2, with the block halved again so that as much is in memory",
        }[batch]
    elif part in PICTURE_PARTS:
        mos, ols, memory, public = 2, 1, 32, False
        note = "an encoder of pictures: the recipe has none; settings of its VAE decoder"
    elif part.endswith("_decoder"):
        mos, ols, memory = 2, 1, 32
        note = "depth-first scheduling"
        if part == "taesd_decoder":
            public, note = False, "the recipe's TAESDXL switch does nothing: settings of its VAE"
    if batch > 1 and part != "unet":
        note = f"{note}; the recipe knows batch 1 only"
    if card == "standard":
        public, note = False, f"{note}; 14 cores where the recipe has 16"
    return Preset(
        CORES[card], mos, ols, memory, block, "public recipe" if public else "derived", note
    )


def preset_for(found: Preset, model: str, size: tuple[int, int]) -> Preset:
    """`found`, which no longer follows the recipe for another model or size than the recipe's."""
    if (model, size) == RECIPE_OF:
        return found
    note = f"{found.note}; the recipe is for SDXL-Turbo at 512 px"
    return replace(found, follows="derived", note=note)
