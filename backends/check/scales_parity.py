"""A UNet with Q/DQ pairs, run on the CPU: how far it is from the one without, and its images.

onnxruntime computes each pair as it is written (FP8 too) and everything else in FP32, so what is
seen is what the rounding costs. It is no speed, and not the kernels of the device that the pairs
are for: those add in FP16 or FP32 and in another order.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.artifacts.child import serve
from backends.base import Session, Shapes
from core.files import write_json

if TYPE_CHECKING:
    from export.bundle import Bundle
    from export.quantize.calibration import CalibrationOrigin

PARITY = "parity.json"
"""The file in the cache for itself, and beside a plan that was built with the scales."""
IMAGES = 4
LARGE_BYTES = 1e9
"""A UNet of more draws one image: each step takes seconds."""
CALLS = 16
"""UNet calls that are compared: at most so many of each image."""


def report(record: Mapping[str, Any]) -> str:
    """The record for a person, in one line."""
    if "skipped" in record:
        return f"{record['scheme']}: not compared with the UNet as it is: {record['skipped']}"
    unet, images = record["unet"], record["images"]
    worst = min(image["psnr_db"] for image in images)
    middle = statistics.median(image["psnr_db"] for image in images)
    return (
        f"{record['scheme']} on the CPU, against FP32: UNet relative error"
        f" {unet['relative_error']:.2e} (worst step {unet['worst']:.2e}), {len(images)} images of"
        f" {record['steps']} steps PSNR {middle:.1f} dB (worst {worst:.1f})"
    )


def compare(
    bundle: Bundle, scales: Path, origin: CalibrationOrigin, threads: str = "auto"
) -> dict[str, Any]:
    """Relative error of the UNet's output, PSNR and SSIM of whole images with new seeds.

    Both are over the same inputs: what went into the UNet as it is, while it drew the images.
    """
    import torch

    from backends.check.gate import image_distance
    from backends.commands.calibrate import CallRecorder
    from backends.ort import OrtBackend
    from backends.pipeline.recipe import make_recipe
    from export.quantize.qdq import read_scales

    layers, facts = read_scales(scales)
    count = 1 if bundle.parts["unet"].weight_bytes > LARGE_BYTES else IMAGES
    prompts = (origin.prompts * count)[:count]
    seeds = [max(origin.seeds) + 1 + number for number in range(count)]
    recipe = make_recipe(bundle, origin.scheduler, origin.guidance)
    decoders = [part.removesuffix("_decoder") for part in bundle.parts if "_decoder" in part]
    decoder = "taesd" if "taesd" in decoders else decoders[0]
    # Compiling would write the UNet's weights out once more, for a few images.
    backend = OrtBackend({"threads": threads, "graph": "canonical"})
    shapes = Shapes(1, *bundle.size)
    with ExitStack() as held:
        held.enter_context(torch.inference_mode())
        pipeline = held.enter_context(backend.pipeline(bundle, decoder, shapes, recipe=recipe))

        def draw() -> list[Any]:
            return [
                pipeline(prompt, steps=origin.steps, seed=seed).images[0]
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]

        with cpu_session(bundle, backend.options) as plain:
            recorder = pipeline.put("unet", CallRecorder(plain))
            expected = draw()
            calls = recorder.calls[:: math.ceil(len(recorder.calls) / (CALLS * count))]
            recorder.close()  # its weights are gone before the other's come
        session = held.enter_context(cpu_session(bundle, backend.options, scales))
        pipeline.put("unet", session)
        errors = [distance(session.run(inputs), outputs) for inputs, outputs in calls]
        images = [image_distance(a, b) for a, b in zip(draw(), expected, strict=True)]
    whole = (sum(e for e, _ in errors) / sum(n for _, n in errors)) ** 0.5
    return {
        "scheme": facts["scheme"],
        "layers": len(layers),
        "left": facts["asked"] - len(layers),
        "against": "the same UNet without pairs, both in FP32 on onnxruntime's CPU provider",
        "steps": origin.steps,
        "guidance": origin.guidance,
        "decoder": decoder,
        "unet": {
            "relative_error": whole,
            "worst": max((e / n) ** 0.5 for e, n in errors),
            "calls": len(errors),
        },
        "images": [
            {"prompt": prompt, "seed": seed, "psnr_db": found.psnr_db, "ssim": found.ssim}
            for prompt, seed, found in zip(prompts, seeds, images, strict=True)
        ],
    }


def distance(got: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[float, float]:
    """Squared L2 norms of the difference and of what is expected."""
    wanted = expected["out_sample"].float()
    return (
        float((got["out_sample"].float() - wanted).square().sum()),
        float(wanted.square().sum()),
    )


@contextmanager
def cpu_session(
    bundle: Bundle, options: Mapping[str, str], scales: Path | None = None
) -> Iterator[Session]:
    """The UNet in FP32, with the pairs of `scales` or without any."""
    import onnxruntime

    from backends.onnxrt.session import OrtSession, session_options
    from core.files import build_root
    from export.lower import CPU, lower
    from export.quantize.qdq import insert

    root = build_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".scales-") as scratch:
        folder = Path(scratch)
        source = bundle.parts["unet"].graph
        if scales is not None:
            insert(source, scales, folder / "pairs" / "model.onnx")
            source = folder / "pairs" / "model.onnx"
        lower(source, CPU, folder / "model.onnx")
        made = session_options(options, optimise=True)
        made.add_session_config_entry("session.disable_quant_qdq", "1")  # as written, not fused
        session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), made, ["CPUExecutionProvider"]
        )
        yield OrtSession(session, bundle, "unet")


def _compare(job: dict[str, Any]) -> None:
    """Child process."""
    from export.bundle import Bundle
    from export.quantize.calibration import Calibration
    from export.quantize.qdq import SCALES

    origin = Calibration.open(Path(job["calibration"])).origin
    record = compare(Bundle.open(Path(job["bundle"])), Path(job["scales"]) / SCALES, origin)
    write_json(Path(job["folder"]) / PARITY, record)


if __name__ == "__main__":
    serve(_compare)
