"""A bundle without graphs: random weights that are drawn on the device whenever they are loaded.

For what runs torch's modules only: nothing is exported, nothing of the weights is stored or
carried, and neither onnx nor accelerate is needed. SDXL's 7 GB are there in seconds.
"""

from __future__ import annotations

from pathlib import Path

from core.files import sha256_file, sha256_json, staged_folder, write_json
from export.build import ExportPlan, open_all, pipeline_entry
from export.bundle import MANIFEST, SCHEMA
from export.models import Model
from export.source.drawn import drawn_checkpoint

WEIGHTS = "weights.json"


def write_graphless(
    model: Model, target: Path, device: str, dtype: str = "fp16", seed: int = 0
) -> None:
    """Write the bundle at `target`: tokenizers, scheduler, and a manifest with every signature.

    Args:
        device: `cpu` or `cuda`, where it will be loaded: each draws other numbers.
    """
    checkpoint, side = drawn_checkpoint(model, seed), model.size
    plan = ExportPlan(checkpoint, dtype, side, side, {})
    opened = open_all(plan)
    weights = {"drawn_on": device, "seed": seed, "dtype": dtype, "size": side}
    with staged_folder(target) as folder:
        checkpoint.save_tokenizers(folder)
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", checkpoint.scheduler_config())
        write_json(folder / WEIGHTS, {**weights, "architecture": model.architecture})
        files = {
            file.relative_to(folder).as_posix(): {
                "sha256": sha256_file(file),
                "bytes": file.stat().st_size,
            }
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        manifest = {
            "schema": SCHEMA,
            "graphs": False,
            "model": model.name,
            "name": target.name,
            "weights": "random",
            "dtype": dtype,
            "size": [side, side],
            "source": {"kind": "random", "seed": seed},
            "request": {"model": model.name},
            "licence": model.licence,
            "steps": model.steps,
            "guidance": model.guidance,
            "pipeline": pipeline_entry(checkpoint, opened),
            "parts": {
                part: entry | {"hash": sha256_json([part, files[WEIGHTS]])}
                for part, entry in opened.described.items()
            },
            "files": files,
        }
        write_json(folder / MANIFEST, manifest)
