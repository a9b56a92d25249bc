"""One image, drawn with the FP32 graphs, and what the layers of one part read meanwhile.

The graphs run as they were lowered, unoptimised: FP16 weights stay in their mapped file and become
FP32 one operator at a time, so that recording takes the activations' memory and no more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import Artifact, Session, Shapes
from backends.check.parity import SEED
from backends.onnxrt.session import MODEL, session_options, translate
from backends.ort import OrtBackend
from backends.pipeline.pictures import Picture
from core.memory import give_memory_back
from export.lower import CPU, lower, storage
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


class RecordingBackend(OrtBackend):
    """onnxruntime over lowered graphs, unoptimised; the sessions of one part keep samples."""

    keeps_artifacts = False

    def __init__(self, part: str, scheme: Scheme, folder: Path, threads: str) -> None:
        super().__init__({"threads": threads})
        self.part, self.measured, self.folder = part, scheme, folder
        self.layers: list[Layer] = []
        self.evaluations: list[dict[str, LayerSample]] = []

    def _load(self, bundle: Bundle, artifact: Artifact) -> Session:
        graph = self.folder / artifact.part / MODEL
        lower(bundle.parts[artifact.part].graph, CPU, graph)
        recorded = artifact.part == self.part
        if recorded:
            model = storage.reopen(graph)
            self.layers = find_layers(model, self.measured)
            add_probes(model, self.layers)
            graph = self.folder / "probes" / MODEL
            storage.save(model, graph)
        session = open_recording(graph, self.options)
        return RecordingSession(session, bundle, artifact.part, self if recorded else None)


def open_recording(graph: Path, options: Mapping[str, Any]) -> Any:
    """A session that runs `graph` as it is, its weights mapped."""
    import onnxruntime

    made = session_options({**options, "arena": False}, optimise=False)
    made.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(graph), made, ["CPUExecutionProvider"])


class RecordingSession(Session):
    """A session of the lowered graph of a part; `recorder` gets what its probes gave."""

    def __init__(
        self, session: Any, bundle: Bundle, part: str, recorder: RecordingBackend | None
    ) -> None:
        self.session, self.recorder = session, recorder
        info = bundle.parts[part]
        self.inputs, self.outputs = (
            {
                spec.name: replace(spec, dtype=spec.dtype.replace("float16", "float32"))
                for spec in specs
            }
            for specs in (info.inputs, info.outputs)
        )

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        names = [output.name for output in self.session.get_outputs()]
        arrays = {name: tensor.contiguous().numpy() for name, tensor in inputs.items()}
        try:
            found = dict(zip(names, self.session.run(None, arrays), strict=True))
        except Exception as error:
            raise translate(error, "recording what the layers read") from error
        if self.recorder is not None:
            self.recorder.evaluations.append(samples(found, self.recorder.layers))
        return {name: torch.from_numpy(found[name]) for name in self.outputs}

    def close(self) -> None:
        del self.session
