"""`addbench sweep --quality`: are a cell's pictures right? Prompt following and FID.

For models whose captions can be judged from pixels (`Model.judge`): those trained here. The
pictures are the cell's own - its backend, precision, decoder and steps - of held-out captions that
no network saw in training, each from a seed of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import PreconditionError
from export.models import MODELS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from backends.pipeline.pipeline import Pipeline
    from bench.rows.cell import Cell

JUDGE_CAPTIONS = 200
"""The least number of captions by which a picture below the gate of pixels can be accepted."""
JUDGE_TOLERANCE = 0.02
"""How much less of the captions may be right than in torch FP32: two standard errors of a share of
98% of 200."""


def require_judge(model: str) -> None:
    """Refuse `--quality` for a model whose pictures nothing here can judge."""
    known = MODELS.get(model)
    if known is None or known.judge is None:
        judged = ", ".join(name for name, entry in MODELS.items() if entry.judge)
        raise PreconditionError(
            f"--quality does not judge {model}",
            "only captions whose every attribute can be read back from pixels are judged",
            f"use --model with one of: {judged}; for the standard FID and CLIP score with local"
            " weights: addbench evaluate --help",
        )


def measure_quality(
    pipe: Pipeline,
    cell: Cell,
    captions: int,
    fid: Path | None,
    on_pictures: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """What the judge reads from the cell's pictures of `captions` held-out captions.

    `all` and each attribute (shares in [0, 1]), `all_1` to `all_3` by number of objects,
    `captions`; where the checkpoint has the network (its folder is `fid`) and the captions are
    enough, `fid_shapes` and `fid_network`, which tells networks apart.
    """
    from distill.evaluate import fid_features, held_out
    from distill.fidelity import LEAST_PICTURES, frechet_distance
    from distill.judge import following

    scenes = held_out(captions)
    made = pictures(pipe, [scene.caption for scene in scenes], cell.batch, cell.steps, on_pictures)
    figures: dict[str, Any] = {
        "captions": len(scenes),
        **{name: round(share, 4) for name, share in following(made, scenes).items()},
        "fid_shapes": None,
    }
    if fid is not None and (fid / "fid.json").is_file() and len(scenes) >= LEAST_PICTURES:
        distance = frechet_distance(*fid_features(made, scenes, fid, made.shape[1]))
        weights = (fid / "fid.safetensors").read_bytes()
        figures["fid_shapes"] = round(distance, 4)
        figures["fid_network"] = int(sha256(weights).hexdigest()[:8], 16)
    return figures


def judge_accepts(quality: Mapping[str, float], checkpoint: Path, cell: Cell) -> bool:
    """Whether as many of a cell's captions are right as torch FP32 gets of the same checkpoint.

    Both are the same captions and seeds; a checkpoint without that figure, or captions that are
    too few to tell two points apart, accept nothing.
    """
    path = checkpoint / "quality.json"
    if not path.is_file() or quality["captions"] < JUDGE_CAPTIONS:
        return False
    rows = json.loads(path.read_text()).get("student" if cell.decoder == "vae" else "tiny", [])
    wanted = [row["all"] for row in rows if row["steps"] == cell.steps]
    return bool(wanted) and quality["all"] >= wanted[0] - JUDGE_TOLERANCE


def pictures(
    pipe: Pipeline,
    captions: Sequence[str],
    batch: int,
    steps: int,
    on_pictures: Callable[[int], None] = lambda _: None,
) -> NDArray[np.uint8]:
    """uint8 [n, height, width, 3]; picture i has seed i, so they do not depend on the batch.

    Args:
        on_pictures: is told how many there are, call by call.
    """
    import numpy as np

    made = []
    for start, wanted, part in full_batches(captions, batch):
        seeds = list(range(start, start + len(part)))
        made.append(pipe(part, steps=steps, seed=seeds).images[:wanted])
        on_pictures(start + wanted)
    return np.concatenate(made)


def full_batches(captions: Sequence[str], batch: int) -> Iterator[tuple[int, int, list[str]]]:
    """(index of the first, how many count, captions): the last one is filled up, for graphs that
    take one batch only."""
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        yield start, len(part), part + part[-1:] * (batch - len(part))
