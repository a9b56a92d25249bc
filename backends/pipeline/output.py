"""What a pipeline call gives: images, and where its time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Timings:
    """Seconds per stage of one call.

    A call that did not wait between its stages has a total only: None, and no entries. `text` holds
    the context of a split UNet, which depends on the prompt alone; `unet` has an entry for each
    timestep, guidance included; `encode` is that of the picture it starts from, None where there is
    none to encode; `load` is what loading and releasing parts took where that is done
    within the call, in low memory, and none of the others hold it.
    """

    text: float | None
    unet: list[float]
    decode: float | None
    rest: float | None
    total: float
    load: float = 0.0
    encode: float | None = None


@dataclass(frozen=True)
class Output:
    """What one call gives.

    Attributes:
        images: uint8 [batch, height, width, 3].
        timings: seconds per stage, of this same call.
        nfe: UNet evaluations of one image, counted as they happened.
        provenance: `measured` when a clock gave the timings; `emulated` when it timed an
            emulation, which says nothing of the device's speed.
        pictures: what was done to each picture that was passed, in words.
        own_clock: whether `timings` are by a clock where the image is drawn, and what the call
            takes beside them is the way to there and back.
    """

    images: NDArray[np.uint8]
    timings: Timings
    nfe: int
    provenance: str = "measured"
    pictures: tuple[tuple[str, ...], ...] = ()
    own_clock: bool = False
