"""How far an image may be from its reference and still count as the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

QUANTISED = ("fp8", "int8", "int4")
"""Dtypes of stored weights that are quantised."""
RANDOM_WORDS = (
    "8 or 4 bits in place of random weights: that the image is the reference's shows that the"
    " kernels compute what they should. It says little of the precision: random numbers have none"
    " of the outliers of trained weights, and the prompt hardly changes their image"
)


@dataclass(frozen=True)
class Gate:
    """What counts as the same: relative L2 error of a part, PSNR and SSIM of the uint8 image."""

    relative_error: float
    psnr_db: float
    ssim: float


GATES = {
    # The same weights, arithmetic in FP32: only the order of sums differs.
    "fp32": Gate(relative_error=1e-3, psnr_db=50.0, ssim=0.999),
    # FP16 weights, arithmetic in FP32: the weights' rounding error (2**-11), amplified by depth.
    "fp16": Gate(relative_error=2e-2, psnr_db=30.0, ssim=0.95),
    # Quantised weights, the worst of shapes-teacher's parts and images: FP8 and INT8 0.03 and
    # 38 dB, 4 bits 0.1 and 37 dB. The image of another seed has 27.5 dB there, and is to be told
    # from a rounded one. No larger trained model has been held to it.
    "fp8": Gate(relative_error=0.1, psnr_db=30.0, ssim=0.95),
    "int8": Gate(relative_error=0.1, psnr_db=30.0, ssim=0.95),
    "int4": Gate(relative_error=0.3, psnr_db=30.0, ssim=0.95),
}
"""Gate by the coarser of what is stored and what is computed in, see `gate_for`."""


def gate_for(storage: str, precision: str, weights: str) -> Gate:
    """The gate of a cell. Random weights are FP16 numbers in the reference too: nothing is lost
    by storing them in FP16, and a looser gate would let other images pass."""
    if storage in QUANTISED:
        return GATES[storage]
    rounded = storage == "fp16" and weights != "random"
    return GATES["fp16" if rounded or precision in ("fp16", "bf16") else "fp32"]


@dataclass(frozen=True)
class ImageDistance:
    """PSNR in dB (infinite for equal images, given as 100) and SSIM of two uint8 images."""

    psnr_db: float
    ssim: float

    def passes(self, gate: Gate) -> bool:
        return self.psnr_db >= gate.psnr_db and self.ssim >= gate.ssim


def image_distance(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> ImageDistance:
    """Distance of two uint8 [height, width, 3] images."""
    import numpy as np
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    if np.array_equal(image, reference):
        return ImageDistance(100.0, 1.0)
    return ImageDistance(
        min(100.0, float(peak_signal_noise_ratio(reference, image, data_range=255))),
        float(structural_similarity(reference, image, channel_axis=2, data_range=255)),
    )
