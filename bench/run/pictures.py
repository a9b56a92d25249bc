"""What a cell's images start from beside noise: the same in every call, on every machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bench.rows.cell import Cell
    from export.bundle import Bundle


def start_of(bundle: Bundle, cell: Cell) -> dict[str, Any]:
    """What a pipeline is told beside prompts and seeds, the same in every call: `images` and
    `strength` of a picture, `negative` of a negative prompt; {} for neither."""
    told: dict[str, Any] = {"negative": cell.negative} if cell.negative else {}
    if cell.encoder:
        told |= {"images": [start_picture(bundle)] * cell.batch, "strength": cell.strength}
    return told


def start_picture(bundle: Bundle) -> NDArray[np.uint8]:
    """The bundle's reference image of the most steps, uint8 [height, width, 3]; a slope of colours
    where it has none. What an encoder takes does not depend on what is to be seen."""
    references = bundle.references()
    if references is not None:
        return references.picture
    width, height = bundle.size
    rows, columns = np.linspace(0, 255, height), np.linspace(0, 255, width)
    slope = np.stack(np.broadcast_arrays(rows[:, None], columns, (rows[:, None] + columns) / 2), -1)
    return np.ascontiguousarray(slope.astype(np.uint8))
