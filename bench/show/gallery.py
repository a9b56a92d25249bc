"""A model's prompts by steps, and another model in full, as one picture.

Rows are steps, columns prompts, all from the same seeds, through the pipeline of any backend.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from numpy.typing import NDArray

from backends.load import load_pipeline
from bench.show.canvas import STYLE

TILE = 1.15
"""Inches of a picture's side; text and margins below are inches too."""
LABEL = 1.25
PROMPT = 0.95


def pictures(
    model: str, backend: str, decoder: str, counts: Sequence[int], prompts: Sequence[str],
    seed: int, weights: str | None = None, dtype: str | None = None,
) -> dict[str, NDArray[np.uint8]]:  # fmt: skip
    """Row label -> uint8 [prompts, height, width, 3]. No `counts`: the model's own step count."""
    with load_pipeline(model, backend, decoder, weights=weights, dtype=dtype) as pipeline:
        found = {}
        for steps in counts or [pipeline.bundle.steps]:
            guidance = pipeline.recipe.guidance
            label = f"{pipeline.bundle.name}\n{steps} step{'s' * (steps > 1)}"
            label += f"\nguidance {guidance:g}" if pipeline.recipe.guided else ""
            made = [
                pipeline([prompt], steps=steps, seed=seed + i).images[0]
                for i, prompt in enumerate(prompts)
            ]
            found[label] = np.stack(made)
        return found


def figure(rows: dict[str, NDArray[np.uint8]], prompts: Sequence[str]) -> Figure:
    width = LABEL + TILE * len(prompts) + 0.1
    height = PROMPT + TILE * len(rows) + 0.1
    with style.context(STYLE):
        drawn = Figure(figsize=(width, height))
        for column, prompt in enumerate(prompts):
            middle = (LABEL + TILE * (column + 0.5)) / width
            drawn.text(middle, 1 - (PROMPT - 0.06) / height, textwrap.fill(prompt, 21),
                       ha="center", va="bottom", fontsize=6.8)  # fmt: skip
        for row, (label, made) in enumerate(rows.items()):
            bottom = height - PROMPT - TILE * (row + 1)
            drawn.text((LABEL - 0.1) / width, (bottom + TILE / 2) / height, label, ha="right",
                       va="center", fontsize=8.5)  # fmt: skip
            for column, picture in enumerate(made):
                left = LABEL + TILE * column
                side = TILE - 0.06
                axes = drawn.add_axes((left / width, bottom / height, side / width, side / height))
                axes.imshow(
                    picture, interpolation="nearest" if len(picture) < 128 else "antialiased"
                )
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set(visible=True, color="#CCCCCC", linewidth=0.6)
    return drawn
