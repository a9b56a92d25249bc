"""FP16 against FP32, and one captured graph against step by step, all on the device.

The FP32 images become the bundle's references, so that every row of the sweep is judged too.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.check.gate import GATES
from backends.check.parity import SEED, seeded_inputs
from bench.gpu.job import GpuJob, Result

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from backends.pipeline.pipeline import Pipeline

    Image = NDArray[np.uint8]

SAME_DB = 40.0
"""PSNR of two orders of the same FP16 arithmetic: sums are taken otherwise. Where FP16 itself is
farther from FP32, two roundings need not be nearer to each other than that."""


def check(job: GpuJob, _: Mapping[str, Result]) -> Result:
    """Parts' relative errors, and the PSNR of every image."""
    from export.bundle import Bundle, References, write_references

    bundle = Bundle.open(Path(job.bundle))
    half = "fp16" if job.device == "cuda" else "fp32"
    parts: dict[str, Any] = {}
    images: dict[str, Any] = {}
    references: dict[tuple[str, int], Image] = {}
    for decoder in job.decoders:
        with opened(job, bundle, decoder, "eager", "fp32") as exact:
            tensors = part_outputs(exact)
            drawn = {steps: image_of(exact, steps, staged=True) for steps in job.steps}
        references |= {(decoder, steps): image for steps, image in drawn.items()}
        with opened(job, bundle, decoder, "graph", half) as fast:
            for name, error in relative_errors(part_outputs(fast), tensors).items():
                parts[name] = {"error": error, "ok": error <= GATES["fp16"].relative_error}
            for steps, image in drawn.items():
                by_step = image_of(fast, steps, staged=True)
                whole = image_of(fast, steps, staged=False)
                again = image_of(fast, steps, staged=False)
                found = {
                    "to_fp32_db": psnr(by_step, image),
                    "whole_to_fp32_db": psnr(whole, image),
                    "whole_to_steps_db": psnr(whole, by_step),
                    "repeats": bool((whole == again).all()),
                }
                gate = GATES["fp16"].psnr_db
                found["ok"] = min(found["to_fp32_db"], found["whole_to_fp32_db"]) >= gate and found[
                    "whole_to_steps_db"
                ] >= min(SAME_DB, found["to_fp32_db"])
                images[f"{decoder}-{steps}"] = found
    # Rows are judged by scikit-image; without it they are not. Weights that are drawn on the device
    # may be others under another torch: their references are drawn with them.
    own = not bundle.has_graphs or bundle.references() is None
    if own and importlib.util.find_spec("skimage"):
        write_references(bundle, References(SEED, bundle.model.prompts[0], references))
    good = all(found["ok"] for found in (*parts.values(), *images.values()))
    return {"status": "ok" if good else "failed", "dtype": half, "parts": parts, "images": images}


def opened(job: GpuJob, bundle: Any, decoder: str, mode: str, dtype: str) -> Pipeline:
    from backends.base import Shapes
    from backends.registry import parse_backend

    backend = parse_backend(job.backend(mode, dtype=dtype))
    return backend.pipeline(bundle, decoder, Shapes(1, *bundle.size)).prepare()


def image_of(pipe: Pipeline, steps: int, *, staged: bool) -> Image:
    """Image of the reference's prompt and seed; `staged`: step by step."""
    pipe.staged = staged
    return pipe(pipe.bundle.model.prompts[:1], steps=steps, seed=SEED).images[0].copy()


def part_outputs(pipe: Pipeline) -> dict[str, torch.Tensor]:
    """Every output of every part on seeded inputs, float32 on the host."""
    import torch

    found = {}
    with torch.inference_mode():
        for part in pipe.parts:
            generator = torch.Generator().manual_seed(SEED)
            given = seeded_inputs(pipe.bundle.parts[part].inputs, generator)
            for name, tensor in pipe.run(part, **given).items():
                found[f"{part}.{name}"] = tensor.to("cpu", torch.float32)
    return found


def relative_errors(
    found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    return {
        name: float((found[name] - tensor).norm() / tensor.norm().clamp_min(1e-12))
        for name, tensor in exact.items()
    }


def psnr(image: Image, reference: Image) -> float:
    """Return dB, at most 100 (equal images); by hand, as scikit-image may be missing here."""
    import numpy as np

    error = float(np.mean((image.astype(np.float64) - reference) ** 2))
    return 100.0 if error == 0 else min(100.0, 10 * math.log10(255**2 / error))
