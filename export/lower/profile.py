"""Profile: what one compiler wants of a graph, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["op", "matmul", "multihead", "operator"]
Convolutions = Literal["op", "winograd", "tiles"]
Products = Literal["op", "linear"]
Norms = Literal["op", "layer", "operator", "decomposed", "instance"]
CANONICAL_OPSET = 23
OLDEST_OPSET = 16


@dataclass(frozen=True)
class Profile:
    """What one compiler wants of a graph. The defaults ask for nothing: the canonical form.

    Attributes:
        name: names the profile in messages and cache keys.
        opset: ONNX opset, 16 to 23.
        attention: `op` keeps the Attention operator (opset 23); `matmul` spells it out;
            `multihead` makes it onnxruntime's own MultiHeadAttention, at any opset; `operator`
            the project's own, where that takes the heads.
        attention_block: queries that self-attention handles at a time where it is spelled out, so
            that a block of scores fits a small memory; 0 for all at once. Cross-attention, whose
            keys are few, is never cut.
        norms: `op` keeps GroupNormalization (opset 21) and LayerNormalization (opset 17); `layer`
            spells the first out with the second, whose statistics are then the compiler's;
            `operator` makes the first, with the SiLU that alone reads it, the project's own
            operator for onnxruntime (backends/onnxrt), which a session must be given;
            `decomposed` spells both out in elementary operators; `instance` writes them as torch's
            exporter did below opset 17, for compilers that look for those patterns:
            GroupNormalization around InstanceNormalization, LayerNormalization with Pow and Div.
        dtype: `as-is`, or `float32`: FP32 arithmetic over the weights as they are stored.
        batch: a number for the named axis `batch`, or None to keep it named.
        norm_statistics: dtype of mean and variance in decomposed norms. `float32` is what the
            operators mean (their `stash_type`), with a cast before and after in an FP16 graph;
            `as-is` casts nothing, for compilers that want pure FP16: there the variance
            overflows where a value is more than 256 away from its group's mean. `instance` leaves
            the dtype alone.
        constants: `fp16-range` brings every constant of wider float types within FP16's range, for
            a compiler that converts to FP16 by itself: it reads FP32 weights to find out.
        vae_divisor: what the activations of the VAE decoder's last block are divided by (1: as they
            are); see vae.py. A part without such a block is refused.
        context: `inline` leaves cross-attention's keys and values, and whatever else the UNet makes
            of the prompt alone, in its graph; `input` takes them as inputs `context`, `context_2`,
            ...; `output` is the graph that gives them.
        gates: `halves` makes two products of one whose result is split in two, as GEGLU's is.
        convolutions: `winograd` makes 3x3 convolutions such an operator; `tiles` makes those of 3x3
            and 1x1 with FP16 weights another one, for CPUs with AMX, and the former of what is
            enlarged.
        products: `linear` makes products with FP16 weights another such operator, which reads them
            as they are stored.
        arithmetic: `bf16` lets the project's own operators round both sides of what they multiply;
            their sums are FP32.
        argmax: `float32` casts what ArgMax compares, where it compares integers, for compilers that
            have it for floats only. FP32 holds every token id exactly; FP16 does not.
    """

    name: str
    opset: int = CANONICAL_OPSET
    attention: Attention = "op"
    attention_block: int = 0
    norms: Norms = "op"
    dtype: Literal["as-is", "float32"] = "as-is"
    batch: int | None = None
    norm_statistics: Literal["float32", "as-is"] = "float32"
    constants: Literal["as-is", "fp16-range"] = "as-is"
    vae_divisor: int = 1
    context: Literal["inline", "input", "output"] = "inline"
    gates: Literal["as-is", "halves"] = "as-is"
    convolutions: Convolutions = "op"
    products: Products = "op"
    arithmetic: Literal["fp32", "bf16"] = "fp32"
    argmax: Literal["as-is", "float32"] = "as-is"


CANONICAL = Profile("canonical")
CPU = Profile("cpu-fp32", dtype="float32")
LEGACY = Profile("legacy", opset=17, attention="matmul", norms="decomposed")
