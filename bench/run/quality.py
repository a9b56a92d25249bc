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
    from distill.shapes import Scene

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

    Of a cell that starts from pictures see `measure_change`; else:
    `all` and each attribute (shares in [0, 1]), `all_1` to `all_3` by number of objects,
    `captions`; where the checkpoint has the network (its folder is `fid`) and the captions are
    enough, `fid_shapes` and `fid_network`, which tells networks apart.
    """
    from distill.evaluate import fid_features, held_out
    from distill.fidelity import LEAST_PICTURES, frechet_distance
    from distill.judge import following

    if cell.encoder:
        return measure_change(pipe, cell, captions, on_pictures)
    scenes = held_out(captions)
    captioned = [scene.caption for scene in scenes]
    made = pictures(pipe, captioned, cell, on_pictures)
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


def measure_change(
    pipe: Pipeline,
    cell: Cell,
    captions: int,
    on_pictures: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """What the judge reads where another shape or colour is asked for of a drawn picture.

    The caption names no place: the object is to stay where it is. `all`: the share of captions
    right; `reshape` and `recolour`: of each half; `kept_place`: the share whose object moved by
    at most `NEAR_PX`; `shift_px` and `shift_p90_px`: by how much, of pictures with one object.
    """
    import numpy as np

    from distill.evaluate import CAPTION_SEED
    from distill.judge import judge, read_picture
    from distill.shapes import draw

    asked = changes(captions)
    drawn = draw([scene for scene, _, _ in asked], seed=CAPTION_SEED, size=pipe.shapes.width)
    texts = [wanted.caption for _, wanted, _ in asked]
    made = pictures(pipe, texts, cell, on_pictures, drawn)
    right = np.array([
        judge(picture, wanted).all_right
        for picture, (_, wanted, _) in zip(made, asked, strict=True)
    ])  # fmt: skip
    kinds = np.array([kind for _, _, kind in asked])
    shifts = []
    for before, after in zip(drawn, made, strict=True):
        there, here = (read_picture(picture)[1] for picture in (before, after))
        one = len(there) == len(here) == 1
        shifts.append(np.hypot(here[0].x - there[0].x, here[0].y - there[0].y) if one else np.inf)
    moved = np.array(shifts)
    read = moved[np.isfinite(moved)]
    figures = {
        "captions": len(asked),
        "all": right.mean(),
        **{kind: right[kinds == kind].mean() for kind in CHANGES if (kinds == kind).any()},
        "kept_place": (moved <= NEAR_PX).mean(),
        "shift_px": np.median(read) if len(read) else None,
        "shift_p90_px": np.quantile(read, 0.9) if len(read) else None,
    }
    return {
        name: value if value is None or name == "captions" else round(float(value), 4)
        for name, value in figures.items()
    }


CHANGES = ("reshape", "recolour")
"""What is asked for of a drawn picture, in turn."""
NEAR_PX = 4.0
"""How far an object may move that kept its place, of 64: less than half of the smallest."""


def changes(count: int) -> list[tuple[Scene, Scene, str]]:
    """(what is drawn, what is asked for, kind of change): captions that no network saw in training,
    of one object, whose place they do not name."""
    from dataclasses import replace

    from distill.evaluate import CAPTION_SEED
    from distill.shapes import COLOURS, SHAPES, Scene, scenes

    listed: list[tuple[Scene, Scene, str]] = []
    for scene in scenes(4 * count + 40, CAPTION_SEED, True, 1):
        kind = CHANGES[len(listed) % len(CHANGES)]
        (item,) = scene.objects
        others = (
            [replace(item, shape=shape) for shape in SHAPES if shape != item.shape]
            if kind == "reshape"
            else [
                replace(item, colour=colour)
                for colour in COLOURS
                if colour not in (item.colour, scene.background)
            ]
        )
        wanted = [Scene((other,), scene.background, (None,)) for other in others]
        wanted = [each for each in wanted if each.held_out]
        if wanted and len(listed) < count:
            listed.append((scene, wanted[len(listed) // 2 % len(wanted)], kind))
    return listed


def judge_accepts(quality: Mapping[str, float], checkpoint: Path, cell: Cell) -> bool:
    """Whether as many of a cell's captions are right as torch FP32 gets of the same checkpoint.

    Both are the same captions and seeds; a checkpoint without that figure, or captions that are
    too few to tell two points apart, accept nothing, and what is changed of pictures is another
    task.
    """
    path = checkpoint / "quality.json"
    if cell.encoder or not path.is_file() or quality["captions"] < JUDGE_CAPTIONS:
        return False
    rows = json.loads(path.read_text()).get("student" if cell.decoder == "vae" else "tiny", [])
    wanted = [row["all"] for row in rows if row["steps"] == cell.steps]
    return bool(wanted) and quality["all"] >= wanted[0] - JUDGE_TOLERANCE


def pictures(
    pipe: Pipeline,
    captions: Sequence[str],
    cell: Cell,
    on_pictures: Callable[[int], None] = lambda _: None,
    starts: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """uint8 [n, height, width, 3]; picture i has seed i, so they do not depend on the batch.

    Args:
        on_pictures: is told how many there are, call by call.
        starts: what each starts from, at the cell's strength; None for noise.
    """
    import numpy as np

    made = []
    for start, wanted, part in full_batches(captions, cell.batch):
        seeds = list(range(start, start + len(part)))
        given: dict[str, Any] = {"negative": cell.negative} if cell.negative else {}
        if starts is not None:
            rows = [min(start + row, len(starts) - 1) for row in range(len(part))]
            given |= {"images": list(starts[rows]), "strength": cell.strength}
        made.append(pipe(part, steps=cell.steps, seed=seeds, **given).images[:wanted])
        on_pictures(start + wanted)
    return np.concatenate(made)


def full_batches(captions: Sequence[str], batch: int) -> Iterator[tuple[int, int, list[str]]]:
    """(index of the first, how many count, captions): the last one is filled up, for graphs that
    take one batch only."""
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        yield start, len(part), part + part[-1:] * (batch - len(part))
