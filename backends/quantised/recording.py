"""One image, drawn with the FP32 graphs, and what the layers of one part read meanwhile.

The graphs run as they were lowered, unoptimised: FP16 weights stay in their mapped file and become
FP32 one operator at a time, so that recording takes the activations' memory and no more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from backends.base import Artifact, Backend, Capability, Option, Session, Shapes, thread_count
from backends.check.parity import SEED
from backends.onnxrt.session import MODEL, OrtSession, session_options
from backends.pipeline.pictures import Picture
from core.memory import give_memory_back
from export.lower import CPU, Profile, lower, storage
from export.models import PICTURE_PARTS
from export.quantize import Scheme
from export.quantize.layers import Layer, find_layers
from export.quantize.measure import LayerSample, add_probes, relative_errors, samples

if TYPE_CHECKING:
    import torch

    from backends.pipeline.pipeline import Pipeline
    from export.bundle import Bundle

STEPS = 4
"""Steps of the image where a model may be drawn with any number: early, middle, late timesteps."""


def measure(
    bundle: Path, part: str, scheme: Scheme, scratch: Path, threads: str = "auto"
) -> dict[str, dict[str, Any]]:
    """Name of a layer of `part` -> its operator, shape and relative error under `scheme`.

    Args:
        scratch: a folder for lowered graphs, which are removed again.
        threads: of the recording, as `ort:threads` takes it.
    """
    from export.bundle import Bundle

    opened = Bundle.open(bundle)
    if not find_layers(storage.reopen(opened.parts[part].graph), scheme):
        return {}
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".record-") as folder:
        recorder = RecordingBackend(part, scheme, Path(folder), threads)
        own = part.endswith("_decoder") or part in PICTURE_PARTS
        decoder = part.rpartition("_")[0] if own else "taesd"
        with recorder.pipeline(opened, decoder, Shapes(1, *opened.size)) as pipeline:
            draw(pipeline, part)
        give_memory_back()
        errors = relative_errors(recorder.layers, recorder.evaluations, scheme)
        return {
            layer.name: {
                "operator": layer.node.op_type,
                "depth": layer.depth,
                "columns": layer.columns,
                "error": float(f"{errors[layer.name]:.4g}"),
            }
            for layer in recorder.layers
        }


def draw(pipeline: Pipeline, part: str) -> None:
    """One seeded image, as far as `part`."""
    import torch

    with torch.inference_mode():
        conditioning = pipeline.condition(pipeline.bundle.model.prompts[:1])
        if part.startswith("text_encoder"):
            return
        steps = max(pipeline.bundle.model.step_counts, default=STEPS)
        latents = pipeline.denoise(conditioning, steps, [SEED]).latents
        if part != "unet":
            image = pipeline.to_uint8(pipeline.decode(latents))[0]
        if part in PICTURE_PARTS:
            pipeline.use_encoder(part.removesuffix("_encoder"))
            pipeline.encode_pictures([Picture(image, ())], 1)


class RecordingBackend(Backend):
    """onnxruntime over lowered graphs, unoptimised; the session of one part keeps samples."""

    name = "ort"
    summary = "ONNX Runtime on the CPU, recording what layers read"
    keeps_artifacts = False
    option_types: ClassVar[Mapping[str, Option]] = {
        "threads": Option("auto", "intra-op threads (auto: physical cores)", thread_count)
    }

    def __init__(self, part: str, scheme: Scheme, folder: Path, threads: str) -> None:
        super().__init__({"threads": threads})
        self.part, self.measured, self.folder = part, scheme, folder
        self.layers: list[Layer] = []
        self.evaluations: list[dict[str, LayerSample]] = []

    def probe(self) -> Capability:
        return Capability(True, self.summary, devices=("cpu",))

    def profile(self, part: str) -> Profile:
        return CPU

    def precision(self, bundle: Bundle) -> str:
        return "fp32"

    def fingerprint(self) -> dict[str, str]:
        return {}

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        graph = self.folder / artifact.part / MODEL
        lower(bundle.parts[artifact.part].graph, CPU, graph)
        if artifact.part != self.part:
            return OrtSession(open_recording(graph, self.options), bundle, artifact.part)
        model = storage.reopen(graph)
        self.layers = find_layers(model, self.measured)
        add_probes(model, self.layers)
        graph = self.folder / "probes" / MODEL
        storage.save(model, graph)
        return RecordingSession(open_recording(graph, self.options), bundle, self)


def open_recording(graph: Path, options: Mapping[str, Any]) -> Any:
    """A session that runs `graph` as it is, its weights mapped."""
    import onnxruntime

    plain = {"spin": "in-call", **options, "arena": False}
    settings = session_options(plain, optimise=False)
    settings.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(graph), settings, ["CPUExecutionProvider"])


class RecordingSession(OrtSession):
    """A session of the graph with probes; `recorder` gets what they gave."""

    def __init__(self, session: Any, bundle: Bundle, recorder: RecordingBackend) -> None:
        super().__init__(session, bundle, recorder.part)
        self.recorder = recorder
        self.names = [spec.name for spec in bundle.parts[recorder.part].outputs]

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        gave = super()._run(inputs)
        arrays = {name: tensor.numpy() for name, tensor in gave.items()}
        self.recorder.evaluations.append(samples(arrays, self.recorder.layers))
        return {name: gave[name] for name in self.names}
