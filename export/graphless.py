"""A bundle without graphs: random weights that are drawn on the device whenever they are loaded.

For what runs torch's modules only: nothing is exported, nothing of the weights is stored or
carried, and neither onnx nor accelerate is needed. SDXL's 7 GB are there in seconds.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.files import sha256_file, sha256_json, staged_folder, write_json
from export.build import Plan, check_sizes, pipeline_entry, torch_dtype
from export.bundle import MANIFEST, SCHEMA
from export.models import Model
from export.source.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn

BATCH = 2
WEIGHTS = "weights.json"


class DrawnCheckpoint(Checkpoint):
    """A checkpoint whose random weights are drawn where they are wanted."""

    def skeleton(self, part: str) -> nn.Module:
        import torch

        with torch.device("meta"):
            return self.construct(part)

    def module(self, part: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
        import torch
        from torch import nn

        from export.source.random_weights import draw_in_place

        with torch.device(device):
            module = self.construct(part).requires_grad_(False)
        nn.Module.to(module, dtype=dtype)  # diffusers' own `to` warns of what does not apply here
        draw_in_place(module, self.origins[part].seed)
        return module


def drawn_checkpoint(model: Model, seed: int) -> DrawnCheckpoint:
    opened = open_checkpoint(model, "random", seed=seed)
    return DrawnCheckpoint(
        **{field.name: getattr(opened, field.name) for field in dataclasses.fields(opened)}
    )


def write_graphless(
    model: Model, target: Path, device: str, dtype: str = "fp16", seed: int = 0
) -> None:
    """Write the bundle at `target`: tokenizers, scheduler, and a manifest with every signature.

    Args:
        device: `cpu` or `cuda`, where it will be loaded: each draws other numbers.
    """
    checkpoint, side = drawn_checkpoint(model, seed), model.size
    plan = Plan(checkpoint, dtype, side, side, {})
    skeletons = {part: checkpoint.skeleton(part) for part in model.parts}
    scale, channels = check_sizes(plan, {part: m.config for part, m in skeletons.items()})
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
            "pipeline": pipeline_entry(checkpoint, scale, channels),
            "parts": {
                part: describe(plan, part, module) | {"hash": sha256_json([part, files[WEIGHTS]])}
                for part, module in skeletons.items()
            },
            "files": files,
        }
        write_json(folder / MANIFEST, manifest)


def describe(plan: Plan, part: str, module: nn.Module) -> dict[str, Any]:
    """A part's entry in the manifest: its signature, by running it without weights or numbers."""
    import torch

    from export.graphs import UNBATCHED
    from export.parts import example_inputs, output_names, wrap

    model, dtype = plan.checkpoint.model, torch_dtype(plan.dtype)
    inputs = example_inputs(part, module, BATCH, plan.width, plan.height, dtype)
    wrapped = wrap(part, module, model).to("meta", dtype=dtype)
    with torch.no_grad():
        result = wrapped(*(tensor.to("meta") for tensor in inputs.values()))
    results = result if isinstance(result, tuple) else (result,)

    def specs(tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape if name in UNBATCHED else ("batch", *tensor.shape[1:])),
            }
            for name, tensor in tensors.items()
        ]

    return {
        "graph": f"{part}/none",
        "data": None,
        "inputs": specs(inputs),
        "outputs": specs(dict(zip(output_names(part, model), results, strict=True))),
        "weight_bytes": sum(p.numel() * p.element_size() for p in wrapped.parameters()),
        "ops": {},
    }
