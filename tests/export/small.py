"""Small checkpoints as people have them, and images of them by diffusers and by us."""

from __future__ import annotations

import atexit
import functools
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folders import edit_json
from rich.console import Console

from backends.base import Shapes
from backends.check.gate import image_distance
from backends.check.oracle import Oracle
from backends.pipeline.recipe import make_recipe
from backends.registry import parse_backend
from export.build import ExportPlan, build_bundle
from export.bundle import Bundle
from export.models import MODELS
from export.request import infer_model, make_request
from export.source.checkpoint import open_checkpoint, open_request
from export.source.layout import COMPONENTS

PROMPT = "a photo of a small red circle"
SEED = 3


@functools.cache
def saved(model: str) -> Path:
    """A tiny model of seed 5 as a folder in diffusers format, FP32; not to be changed."""
    folder = Path(tempfile.mkdtemp(prefix="addbench-small-")) / model
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    checkpoint = open_checkpoint(MODELS[model], "random", seed=5)
    for part in checkpoint.model.parts:
        module: Any = checkpoint.module(part, torch.float32)
        module.save_pretrained(folder / COMPONENTS[part].folder)
    checkpoint.save_tokenizers(folder)
    shutil.copytree(checkpoint.find("scheduler"), folder / "scheduler")
    shutil.copy(checkpoint.find("model_index.json"), folder)
    return folder


def copied(model: str, folder: Path) -> Path:
    """A copy that a test may change; weights are hard links, which saving replaces."""
    source = saved(model)

    def link(old: str, new: str) -> str:
        big = old.endswith(".safetensors")
        return str(Path(new).hardlink_to(old)) if big else shutil.copy(old, new)

    return Path(shutil.copytree(source, folder, copy_function=link))


def redraw(folder: Path, part: str, seed: int = 1, **changes: object) -> None:
    """Change a component's config and give it weights of the new architecture."""
    import importlib

    component = COMPONENTS[part]
    cls = getattr(importlib.import_module(component.library), component.cls)
    place = folder / component.folder
    edit_json(place / "config.json", **changes)
    torch.manual_seed(seed)
    if component.library == "transformers":
        module = cls(cls.config_class.from_pretrained(place))
    else:
        module = cls.from_config(cls.load_config(place))
    for file in place.glob("*.safetensors"):
        file.unlink()
    module.save_pretrained(place)
    edit_json(place / "config.json", **changes)


def opened(folder: Path, target: Path, **asked: Any) -> Bundle:
    """A bundle of a checkpoint in FP32, without graphs: for torch's own modules."""
    model = infer_model(folder)
    request = make_request(model, str(folder), **asked)
    checkpoint = open_request(model, request, "fp32")
    side = model.size if isinstance(model.size, int) else model.size[0]
    plan = ExportPlan(checkpoint, "fp32", side, side, request.as_dict(), graphs=False)
    build_bundle(plan, target, Console(file=io.StringIO()))
    return Bundle.open(target)


def distance(
    bundle: Bundle, steps: int = 2, guidance: float | None = None, prompt: str = PROMPT
) -> dict[str, float]:
    """PSNR in dB of our order of the parts, on torch, against diffusers' pipeline, by decoder."""
    recipe = make_recipe(bundle, guidance=guidance)
    expected = Oracle(bundle, recipe).draw(prompt, [steps], SEED)
    distances = {}
    for decoder, count in expected:
        pipeline = parse_backend("torch").pipeline(
            bundle, decoder, Shapes(1, *bundle.size), recipe=recipe
        )
        with pipeline:
            image = pipeline([prompt], steps=steps, seed=[SEED]).images[0]
        assert np.ptp(image) > 0, "an even image would prove nothing"
        distances[decoder] = image_distance(image, expected[decoder, count]).psnr_db
    return distances
