"""lower(graph, profile): the canonical graph of a part -> the form that one compiler wants.

A profile says what; each pass below does one of its fields and knows nothing of the others:

    shapes.py     batch="N": the named axis becomes a number
    dtypes.py     dtype="float32": arithmetic in FP32, weights stored as they were
    norms.py      norms="decomposed": GroupNormalization and LayerNormalization in elementary ops
    attention.py  attention="matmul": Attention as MatMul, Softmax, MatMul
    opset.py      opset=17..22: the operators as that older opset has them
    storage.py    reads, writes and checks the model files; the weights stay on disk

Weights are never read: the lowered graph refers to a hard link (or a copy, across disks) of the
same data file, so that lowering a 5 GB UNet takes seconds and little memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CANONICAL_OPSET = 23
OLDEST_OPSET = 17


@dataclass(frozen=True)
class Profile:
    """What one compiler wants of a graph. The defaults ask for nothing: the canonical form.

    Attributes:
        name: names the profile in messages and cache keys.
        opset: ONNX opset, 17 to 23.
        attention: `op` keeps the Attention operator (opset 23); `matmul` spells it out.
        norms: `op` keeps GroupNormalization (opset 21) and LayerNormalization (opset 17);
            `decomposed` spells both out in elementary operators.
        dtype: `as-is`, or `float32`: FP32 arithmetic over the weights as they are stored.
        batch: a number for the named axis `batch`, or None to keep it named.
        norm_statistics: dtype of mean and variance in decomposed norms. `float32` is what the
            operators mean (their `stash_type`), with a cast before and after in an FP16 graph;
            `as-is` casts nothing, for compilers that want pure FP16: there the variance
            overflows where a value is more than 256 away from its group's mean.
    """

    name: str
    opset: int = CANONICAL_OPSET
    attention: Literal["op", "matmul"] = "op"
    norms: Literal["op", "decomposed"] = "op"
    dtype: Literal["as-is", "float32"] = "as-is"
    batch: int | None = None
    norm_statistics: Literal["float32", "as-is"] = "float32"


CANONICAL = Profile("canonical")
CPU = Profile("cpu-fp32", dtype="float32")
LEGACY = Profile("legacy", opset=OLDEST_OPSET, attention="matmul", norms="decomposed")


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
    from export.lower import attention, dtypes, norms, opset, shapes, storage

    model = storage.load(graph, profile)
    # The order matters: norms and attention read the dtypes and shapes that come before them, and
    # build opset-23 nodes that the opset conversion, the last, takes down with all others.
    if profile.batch is not None:
        shapes.bind(model, {"batch": profile.batch})
    if profile.dtype == "float32":
        dtypes.to_float32(model)
    if profile.norms == "decomposed":
        norms.decompose(model, profile.norm_statistics)
    if profile.attention == "matmul":
        attention.decompose(model)
    if profile.opset < CANONICAL_OPSET:
        opset.convert(model, profile.opset)
    storage.save(model, out)
