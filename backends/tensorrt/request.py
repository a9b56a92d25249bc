"""What a plan is built for: the form of its graph, its shapes, its flags; and the same in trtexec.

Does not import tensorrt, so that the commands can be printed on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.artifacts.split_unet import form_of
from backends.base import Shapes
from backends.tensorrt.probe import ATTENTION, GROUP_NORM
from core.errors import PreconditionError
from export.lower import Profile

if TYPE_CHECKING:
    from export.bundle import Bundle, PartInfo

PLAN, LOG, RECORD, GRAPH = "model.plan", "build.log", "plan.json", "model.onnx"
PAIRS = "pairs"
"""Folder of the canonical graph with Q/DQ pairs, on its way to the lowered one."""


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes that one plan takes; kernels are chosen for the largest."""

    least: int
    most: int

    def __contains__(self, batch: object) -> bool:
        return isinstance(batch, int) and self.least <= batch <= self.most


def parse_batch(text: str) -> BatchRange | None:
    """`1-4` -> a range; `static` -> None: a plan for each batch size."""
    if text == "static":
        return None
    least, dash, most = text.partition("-")
    if dash and least.isdigit() and most.isdigit() and 1 <= int(least) <= int(most):
        return BatchRange(int(least), int(most))
    raise PreconditionError(
        f"trt:batch={text} is neither `static` nor a range",
        "a range is the least and the largest batch size of one plan",
        "write trt:batch=1-4, or leave it out for a plan of each batch size",
    )


def parse_gigabytes(text: str) -> float | None:
    """`auto` -> None; `8` -> 8.0 (GiB)."""
    try:
        value = None if text == "auto" else float(text)
    except ValueError:
        value = 0.0
    if value is not None and not 0 < value < 1e6:
        raise PreconditionError(
            f"trt:workspace={text} is not a size",
            "it is auto (all of the GPU's memory) or a number of GiB",
            "write trt:workspace=8",
        )
    return value


def profile_for(part: str, release: tuple[int, int], options: Mapping[str, Any]) -> Profile:
    """The newest form of a graph that the ONNX parser of this TensorRT takes. FP16 stays FP16.

    Args:
        release: (10, 14) for TensorRT 10.14.
        options: the backend's; `attention`: `op`, `matmul`, or `auto`, the operator where the
            parser has it.
    """
    attention, batch = options["attention"], options["batch"]
    if attention == "auto":
        attention = "op" if release >= ATTENTION else "matmul"
    if attention == "op" and release < ATTENTION:
        raise PreconditionError(
            "trt:attention=op needs TensorRT 10.14",
            f"the ONNX parser of {release[0]}.{release[1]} does not know the Attention operator",
            "use trt:attention=matmul, or a newer TensorRT",
        )
    return Profile(
        "trt",
        # The parsers of 10.0 to 10.8 know opset 20, and 10.9 reads the norms of opset 21.
        opset=23 if attention == "op" else 21 if release >= GROUP_NORM else 20,
        attention="op" if attention == "op" else "matmul",
        norms="op" if release >= GROUP_NORM else "decomposed",
        batch=None if batch else 1,  # a number where static; each compile puts its own
        context=form_of(part, options["context"]),
    )


@dataclass(frozen=True)
class PlanRequest:
    """One plan.

    Attributes:
        profile: form of the graph, with the batch size in it (None: a named axis).
        shapes: input -> its least, its best and its largest shape; empty for a static plan.
        level: builder optimisation level, 0 to 5.
        workspace_bytes: limit of one layer's scratch memory; None: the GPU's memory.
        refit: leave the weights out of the plan, and put them in from the bundle at load.
        hardware: `none`, or `ampere+`: runs on every GPU from Ampere on.
        version_compatible: runs on other versions of TensorRT too.
    """

    part: str
    profile: Profile
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    level: int
    workspace_bytes: int | None
    refit: bool
    hardware: str
    version_compatible: bool

    def record(self) -> dict[str, Any]:
        return asdict(self)


def make_request(
    bundle: Bundle, part: str, shapes: Shapes, options: Mapping[str, Any], release: tuple[int, int]
) -> PlanRequest:
    batch = options["batch"]
    profile = profile_for(part, release, options)
    workspace = options["workspace"]
    return PlanRequest(
        part=part,
        profile=profile if batch else replace(profile, batch=shapes.batch),
        shapes=ranges(inputs(bundle.source(part), profile), batch) if batch else {},
        level=options["level"],
        workspace_bytes=None if workspace is None else int(workspace * 2**30),
        refit=options["refit"],
        hardware=options["hardware"],
        version_compatible=options["version_compatible"],
    )


def inputs(info: PartInfo, profile: Profile) -> Mapping[str, tuple[int | str, ...]]:
    """Shapes of the inputs of the graph that is compiled of `info`, which may be half of it."""
    if profile.context == "inline":
        return {spec.name: spec.shape for spec in info.inputs}
    from export.lower.context import input_shapes

    return input_shapes(info.graph, profile.context)


def ranges(
    inputs: Mapping[str, tuple[int | str, ...]], batch: BatchRange
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Least, best and largest shape of every input with a named axis."""

    def sized(shape: tuple[int | str, ...], size: int) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else size for dim in shape)

    return {
        name: (sized(shape, batch.least), sized(shape, batch.most), sized(shape, batch.most))
        for name, shape in inputs.items()
        if not all(isinstance(dim, int) for dim in shape)
    }


def lower_command(
    graph: Path, profile: Profile, out: Path, scales: Path | None = None
) -> list[str]:
    """Writes the graph in the form that `trtexec` is to read, with the Q/DQ pairs of `scales`."""
    asked = ", ".join(
        f"{field.name}={json.dumps(value)}"
        for field in fields(profile)
        if (value := getattr(profile, field.name)) != field.default
    )

    def path(of: Path) -> str:
        return f"Path({json.dumps(str(of))})"

    code = "from pathlib import Path; from export.lower import Profile, lower; "
    if scales is not None:
        pairs = out.parent / PAIRS / out.name
        code += f"from export.quantize.qdq import insert; insert({path(graph)}, {path(scales)}, "
        code += f"{path(pairs)}); "
        graph = pairs
    return ["python", "-c", code + f"lower({path(graph)}, Profile({asked}), {path(out)})"]


def scales_command(graph: Path, scheme: str, calibration: Path, folder: Path) -> list[str]:
    """Calibrates the scales that `lower_command` takes."""
    asked = ", ".join(
        json.dumps(text) if index == 1 else f"Path({json.dumps(text)})"
        for index, text in enumerate((str(graph), scheme, str(calibration), str(folder)))
    )
    code = (
        "from pathlib import Path; from export.quantize.modelopt import make_scales;"
        f" make_scales({asked})"
    )
    return ["python", "-c", code]


def trtexec(
    request: PlanRequest, release: tuple[int, int], graph: Path, plan: Path, timing: Path
) -> list[str]:
    """The command that builds the plan of `request` (options as in trtexec 10.1 to 11.1)."""
    words = ["trtexec", f"--onnx={graph}", f"--saveEngine={plan}", "--skipInference", "--noTF32"]
    if release < (11, 0):
        words.append("--stronglyTyped")  # always so in 11
    if request.profile.attention == "op":
        words.append("--decomposableAttentions=*")
    words.append(f"--builderOptimizationLevel={request.level}")
    words.append(f"--timingCacheFile={timing}")
    if request.workspace_bytes is not None:
        words.append(f"--memPoolSize=workspace:{request.workspace_bytes / 2**20:g}M")
    if request.refit:
        words.append("--stripWeights")
    if request.hardware != "none":
        words.append(f"--hardwareCompatibilityLevel={request.hardware}")
    if request.version_compatible:
        words.append("--versionCompatible")
    for option, which in (("minShapes", 0), ("optShapes", 1), ("maxShapes", 2)):
        if request.shapes:
            parts = (
                f"{name}:{'x'.join(map(str, triple[which]))}"
                for name, triple in request.shapes.items()
            )
            words.append(f"--{option}={','.join(parts)}")
    return words
