"""lower(graph, profile): the canonical graph of a part -> the form that one compiler wants.

A profile (profile.py) says what; each pass below does one of its fields and knows nothing of the
others:

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
from pathlib import Path

from export.lower.profile import (
    CANONICAL,
    CANONICAL_OPSET,
    CPU,
    LEGACY,
    Attention,
    Convolutions,
    Norms,
    Products,
    Profile,
)

__all__ = [
    "CANONICAL",
    "CANONICAL_OPSET",
    "CPU",
    "LEGACY",
    "Attention",
    "Convolutions",
    "Norms",
    "Products",
    "Profile",
    "lower",
]


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
