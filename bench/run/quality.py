"""`addbench sweep --quality`: are a cell's pictures right? Prompt following and FID.

For models whose captions can be judged from pixels (`Model.judge`): those trained here. The
pictures are the cell's own - its backend, precision, decoder and steps - of held-out captions that
no network saw in training, each from a seed of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import PreconditionError
from export.models import MODELS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from backends.pipeline.pipeline import Pipeline
    from bench.rows.cell import Cell


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
    `captions`; `fid_shapes` where the checkpoint has the network: its folder is `fid`.
    """
    from distill.evaluate import fid_features, held_out
    from distill.fidelity import frechet_distance
    from distill.judge import following

    scenes = held_out(captions)
    made = pictures(pipe, [scene.caption for scene in scenes], cell.batch, cell.steps, on_pictures)
    found: dict[str, Any] = {
        "captions": len(scenes),
        **{name: round(share, 4) for name, share in following(made, scenes).items()},
        "fid_shapes": None,
    }
    if fid is not None and (fid / "fid.json").is_file():
        found["fid_shapes"] = round(
            frechet_distance(*fid_features(made, scenes, fid, made.shape[1])), 4
        )
    return found


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
