"""lower(graph, profile): the canonical graph of a part -> the form that one compiler wants.

A profile says what; each pass below does one of its fields and knows nothing of the others:

    shapes.py     batch="N": the named axis becomes a number
    dtypes.py     dtype="float32": arithmetic in FP32, weights stored as they were
    gates.py      gates="halves": a product that is split in two as two products
    context.py    context="input": the UNet without what depends on the prompt alone, which
                  context="output" is
    vae.py        vae_divisor=128: the VAE decoder's last block within FP16's range
    norms.py      norms="decomposed": GroupNormalization and LayerNormalization in elementary ops,
                  norms="instance": as torch wrote them at opset 16; norms="layer": the first by
                  the second; norms="operator": the first, and SiLU, as an operator of the
                  project's own
    attention.py  attention="matmul": Attention as MatMul, Softmax, MatMul; attention_block
    multihead.py  attention="multihead": Attention as onnxruntime's MultiHeadAttention;
                  "operator": as one of the project's own
    convolutions.py  convolutions="winograd" or "tiles": those of 3x3 and 1x1 as operators of the
                  project's own
    linear.py     products="linear": products with FP16 weights as another
    constants.py  constants="fp16-range": no constant beyond FP16's range
    argmax.py     argmax="float32": ArgMax of integers over their FP32 values
    opset.py      opset=16..22: the operators as that older opset has them
    storage.py    reads, writes and checks the model files; the weights stay on disk

Weights are not read, unless `constants`, `vae_divisor`, `convolutions` or `products` ask for them:
the lowered graph refers to a hard link (or a copy, across disks) of the same data file, so that
lowering a 5 GB UNet takes seconds and little memory.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
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


def lower(graph: Path, profile: Profile, out: Path) -> None:
    """Write the graph at `graph` to `out` in the form that `profile` asks for.

    Args:
        graph: a canonical `model.onnx` (opset 23); its weights may be in external data beside it.
        profile: the form to give it.
        out: the `model.onnx` to write; external data is linked beside it as `<out>.data`.

    Raises:
        PreconditionError: `graph` is not canonical, or holds something that the profile's form
            cannot express; the message names operator and node.
        AddbenchError: the result fails the ONNX checker or strict shape inference.
    """
    from export.lower import (
        argmax,
        attention,
        constants,
        context,
        convolutions,
        dtypes,
        gates,
        linear,
        multihead,
        norms,
        opset,
        shapes,
        storage,
        vae,
    )

    model = storage.load(graph, profile)
    bf16 = profile.arithmetic == "bf16"
    # The order matters: norms and attention read the dtypes and shapes that come before them, and
    # build opset-23 nodes that the opset conversion, the last, takes down with all others. The VAE
    # pass knows norms by their operator; the masks of attention are constants to look at. Both
    # halves of a UNet are cut before it, at the shapes that the export has written.
    if profile.batch is not None:
        shapes.bind(model, {"batch": profile.batch})
    if profile.dtype == "float32":
        dtypes.to_float32(model)
    if profile.gates == "halves":
        gates.halve(model)
    if profile.context != "inline":
        context.split(model, profile.context)
    if profile.vae_divisor != 1:
        vae.divide(model, profile.vae_divisor)
    if profile.norms == "decomposed":
        norms.decompose(model, profile.norm_statistics)
    elif profile.norms == "layer":
        norms.by_layer(model)
    elif profile.norms == "operator":
        norms.by_operator(model)
    elif profile.norms == "instance":
        norms.instance(model)
    if profile.attention == "matmul":
        attention.decompose(model, profile.attention_block)
    elif profile.attention != "op":
        multihead.fuse(model, own=profile.attention == "operator", bf16=bf16)
    if profile.constants == "fp16-range":
        constants.clip(model)
    if profile.argmax == "float32":
        argmax.to_float32(model)
    if profile.opset < CANONICAL_OPSET:
        opset.convert(model, profile.opset)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".weights-") as scratch:
        if profile.convolutions != "op":
            convolutions.convolve(model, Path(scratch), profile.convolutions, bf16=bf16)
        if profile.products == "linear":
            linear.replace(model, Path(scratch), bf16=bf16)
        storage.save(model, out)
