"""Schemes that make the weights of a lowered graph small, and its arithmetic integer.

    dynamic-int8    products with a large constant weight: activations quantised as they come, to
                    8 bits with one scale a tensor, weights signed with one scale a column
    weight-int8     the weights alone, in blocks with one scale each; arithmetic stays FP32
    weight-int4     the same in 4 bits

    layers.py       which products a scheme takes, and their weights
    integers.py     numbers to integers and back
    measure.py      each layer's error on recorded activations
    rewrite.py      the graph with the operators of onnxruntime's CPU provider in it

A layer whose error is beyond the scheme's bound stays as it is: by measurement, not by hand. All of
it goes layer by layer: one weight at a time is in memory, in FP32, the others in their file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SchemeName = Literal["dynamic-int8", "weight-int8", "weight-int4"]


@dataclass(frozen=True)
class Scheme:
    """What becomes of the weights, and of the arithmetic with them.

    Attributes:
        name: see the module.
        bits: of the weights. `dynamic-int8` takes 8, or 7 where the CPU's kernels would saturate
            (`weight_bits`).
        bound: largest relative error of a layer's output, on recorded activations, with which it is
            quantised.
        block: weights that share a scale, along the input (`weight-*`).
        convolutions: whether convolutions are quantised too, as products over their windows
            (`dynamic-int8`).
        smallest: weights of fewer elements stay as they are.
    """

    name: SchemeName
    bits: int
    bound: float
    block: int = 0
    convolutions: bool = False
    smallest: int = 256

    @property
    def storage(self) -> str:
        """Dtype of the weights that it takes; 7 bits are in an INT8."""
        return "int4" if self.bits == 4 else "int8"

    @property
    def dynamic(self) -> bool:
        """Whether activations are quantised too, and the arithmetic is INT8."""
        return self.name == "dynamic-int8"


def weight_bits(isa: str) -> int:
    """Bits of signed weights that the CPU's kernels multiply with uint8 activations exactly.

    Without the dot-product instructions x86 kernels add pairs of products in 16 bits (vpmaddubsw):
    2 * 255 * 127 is beyond, and saturates; 2 * 255 * 63 is not.

    Args:
        isa: machine and instruction sets, as `core.isa.isa` writes them.
    """
    machine, *flags = isa.split()
    if machine not in ("x86_64", "AMD64", "i686"):
        return 8
    # In onnxruntime's order of choice: with AVX-512, AVX-VNNI's own kernels are not used.
    exact = {"amx_int8", "amx_tile"} <= set(flags) or "avx512_vnni" in flags
    return 8 if exact or ("avx_vnni" in flags and "avx512f" not in flags) else 7
