"""A bundle's parts as models that Triton's own ONNX Runtime runs, and sessions that ask it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from backends.base import Artifact, Backend, Capability, Session
from backends.pipeline.session import stage_parts
from export.bundle import Bundle, Spec
from export.lower import Profile, lower

PARTS = Profile("triton", opset=17, attention="matmul", norms="layer", dtype="float32")
"""A form that every ONNX Runtime of Triton's containers reads: opset 17, FP32 over the weights as
they are stored, the batch a named axis."""
KINDS = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}

Ask = Callable[[str, Mapping[str, NDArray[Any]], Sequence[str]], Mapping[str, NDArray[Any]]]
"""Ask Triton for outputs of a model by its name: its inputs, and the names of the outputs."""


def part_model(name: str, part: str) -> str:
    """Return what the model of a part is called in the repository."""
    return f"{name}_{part}"


def write_part(bundle: Bundle, part: str, name: str, folder: Path, mark: str) -> None:
    """Write the folder of a part's model: configuration, graph and weights."""
    (folder / "1").mkdir(parents=True)
    lower(bundle.parts[part].graph, PARTS, folder / "1" / "model.onnx")
    (folder / "config.pbtxt").write_text(part_config(bundle, part, name, mark))


def part_config(bundle: Bundle, part: str, name: str, mark: str) -> str:
    """Return the config.pbtxt of a part's model; the batch is an axis like any other."""
    info = bundle.parts[part]
    return (
        f"{mark}\nname: {json.dumps(part_model(name, part))}\n"
        'platform: "onnxruntime_onnx"\nmax_batch_size: 0\n'
        f"{tensors('input', info.inputs)}{tensors('output', info.outputs)}"
    )


def tensors(which: str, specs: Sequence[Spec]) -> str:
    lines = ",\n".join(
        f"  {{ name: {json.dumps(spec.name)} data_type: {KINDS[spec.dtype]}"
        f" dims: [ {', '.join(str(n) if isinstance(n, int) else '-1' for n in spec.shape)} ] }}"
        for spec in map(in_fp32, specs)
    )
    return f"{which} [\n{lines}\n]\n"


def in_fp32(spec: Spec) -> Spec:
    """Return what a lowered graph has in place of an input or output of the bundle's."""
    return Spec(spec.name, "float32" if spec.dtype == "float16" else spec.dtype, spec.shape)


def parts_of(bundle: Bundle, decoder: str) -> tuple[str, ...]:
    """Return the parts that a picture from text takes."""
    return stage_parts(tuple(bundle.parts), decoder)


class PartSession(Session):
    """A part that Triton runs."""

    def __init__(self, model: str, inputs: Sequence[Spec], outputs: Sequence[Spec], ask: Ask):
        self.model, self.ask = model, ask
        self.inputs = {spec.name: spec for spec in map(in_fp32, inputs)}
        self.outputs = {spec.name: spec for spec in map(in_fp32, outputs)}

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        answered = self.ask(self.model, arrays, list(self.outputs))
        return {name: torch.from_numpy(array.copy()) for name, array in answered.items()}


class PartsBackend(Backend):
    """Triton as what runs the parts of a pipeline that itself runs in Triton."""

    name = "triton"
    summary = "the models of the same repository"
    keeps_artifacts = False

    def __init__(self, model: str, ask: Ask) -> None:
        super().__init__()
        self.model, self.ask = model, ask

    def probe(self) -> Capability:
        return Capability(True, self.summary)

    def profile(self, part: str) -> Profile:
        return PARTS

    def precision(self, bundle: Bundle) -> str:
        return "fp32"

    def fingerprint(self) -> dict[str, str]:
        return {}

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        info = bundle.parts[artifact.part]
        return PartSession(
            part_model(self.model, artifact.part), info.inputs, info.outputs, self.ask
        )
