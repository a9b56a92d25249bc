"""The last block of the SDXL VAE decoder within FP16's range.

The original SDXL VAE reaches beyond 65504 there, and FP16 images come out black or NaN. Dividing
the weights and biases of the four convolutions that write into the block's residual stream
(Qualcomm's public recipe does it by 128) divides the whole stream, and the norms that read it take
the factor out again. Two details make that exact in real numbers, for any weights: the bias of the
stream's shortcut is divided as well, and the epsilon of those norms by the factor's square.

Not for a checkpoint whose VAE fits FP16 already: there nothing is gained, and small values come
nearer to FP16's lower end.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from core.errors import PreconditionError
from export.lower.edit import attribute
from export.lower.storage import mapped

_STREAM = re.compile(
    r"decoder\.up_blocks\.("
    r"2\.upsamplers\.0\.conv\.(weight|bias)"
    r"|3\.resnets\.\d+\.conv2\.(weight|bias)"
    r"|3\.resnets\.\d+\.conv_shortcut\.bias)"
)
"""Parameters whose outputs are added up in the stream, by module path. The shortcut's weight reads
the stream, which is divided already."""
_CONVOLUTION = re.compile(r".*(upsamplers\.0\.conv|conv2)\.weight")
_READERS = re.compile(r"decoder\.(up_blocks\.3\.resnets\.\d+\.norm1|conv_norm_out)\.weight")
"""The scale of each norm that reads the stream."""


def divide(model: ir.Model, divisor: int) -> None:
    """Divide the activations of the decoder's last block by `divisor`.

    The few tensors that this touches move into the graph; all others stay on disk.

    Raises:
        PreconditionError: the graph has no such block, or `divisor` is below 1.
    """
    if divisor < 1:
        raise PreconditionError(
            f"vae_divisor={divisor} divides nothing", "it is a whole number", "use 128"
        )
    parameters = model.graph.initializers
    stream = [each for name, each in parameters.items() if _STREAM.fullmatch(name)]
    norms = [
        node
        for node in model.graph.all_nodes()
        if node.op_type == "GroupNormalization"
        and len(node.inputs) > 1
        and _READERS.fullmatch(_parameter(node.inputs[1]))
    ]
    if not norms or len([v for v in stream if _CONVOLUTION.fullmatch(v.name or "")]) < 2:
        raise PreconditionError(
            f"vae_divisor={divisor} does not fit {model.graph.name}",
            "it has no up_blocks.2.upsamplers.0.conv and up_blocks.3.resnets.*.conv2 by name",
            "use it for the vae_decoder of an SDXL model, exported by this version",
        )
    for value in stream:
        _divide(model, value, divisor)
    for node in norms:
        epsilon = attribute(node, "epsilon", 1e-5) / divisor**2
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)


def _divide(model: ir.Model, value: ir.Value, divisor: int) -> None:
    """All readers of the parameter `value` read it divided, in the dtype that they compute in."""
    tensor = value.const_value
    if tensor is None:
        return
    array = mapped(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor.numpy()
    for read in [value, *(use.node.outputs[0] for use in value.uses() if _is_cast(use.node))]:
        number = (read.dtype or tensor.dtype).numpy()
        divided = ir.tensor((array.astype(number) / number.type(divisor)), name=f"{read.name}/less")
        fresh = ir.Value(
            name=divided.name,
            shape=read.shape,
            type=ir.TensorType(divided.dtype),
            const_value=divided,
        )
        readers = [(use.node, use.idx) for use in read.uses() if not _is_cast(use.node)]
        if readers:
            model.graph.register_initializer(fresh)
        for node, index in readers:
            node.replace_input_with(index, fresh)


def _is_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast"


def _parameter(value: ir.Value | None) -> str:
    """Name of the parameter that is read, behind its cast to FP32 if there is one."""
    if value is None:
        return ""
    producer = value.producer()
    if producer is not None and _is_cast(producer) and producer.inputs[0] is not None:
        value = producer.inputs[0]
    return value.name or ""
