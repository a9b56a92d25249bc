"""`addbench gallery`: a model's prompts by steps, and another model in full, as one picture.

Rows are steps, columns prompts, all from the same seeds; through the pipeline of any backend.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.show.latency import STYLE, image_bytes
from core.cli import Parser, add_model_arguments, int_list, png_file, run
from core.errors import EXIT_OK, PreconditionError
from core.files import write_atomic
from export.models import DEFAULT_MODEL

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

TILE = 1.15
"""Inches of a picture's side; text and margins below are inches too."""
LABEL = 1.25
PROMPT = 0.95


def parser() -> Parser:
    top = Parser(prog="addbench gallery", description=__doc__.split("\n")[0])
    add_model_arguments(top, DEFAULT_MODEL)
    top.add_argument("--steps", type=int_list, default=[1, 2, 4], help="of the model (1,2,4)")
    top.add_argument("--beside", metavar="NAME|PATH", help="another model, at its own steps")
    top.add_argument("--prompts", type=int, default=8, metavar="N", help="how many columns (8)")
    top.add_argument("--backend", default="ort", metavar="NAME[:KEY=VALUE,...]")
    top.add_argument("--decoder", default="vae", help="vae or taesd")
    top.add_argument("--seed", type=int, default=0, help="of the first column; one more for each")
    top.add_argument("--out", type=png_file, default=Path("gallery.png"), metavar="FILE.png")
    return top


def pictures(
    model: str, backend: str, decoder: str, counts: Sequence[int], prompts: Sequence[str],
    seed: int, weights: str | None = None, dtype: str | None = None,
) -> dict[str, NDArray[np.uint8]]:  # fmt: skip
    """Row label -> uint8 [prompts, height, width, 3]. No `counts`: the model's own step count."""
    import numpy as np

    from backends.pipeline.pipeline import load_pipeline

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
    from matplotlib import style
    from matplotlib.figure import Figure

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


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.prompts < 1:
        raise PreconditionError(
            f"--prompts {args.prompts} draws nothing", "it counts columns", "use 1 or more"
        )
    from backends.registry import parse_backend
    from export.bundle import find_bundle

    chosen = parse_backend(args.backend)
    chosen.probe().require(chosen.name)
    asked = find_bundle(args.model, args.weights, args.dtype).model.prompts[: args.prompts]
    if args.beside:
        find_bundle(args.beside, None, None)  # say that it is missing before minutes of pictures
    common = (args.backend, args.decoder)
    rows = pictures(args.model, *common, args.steps, asked, args.seed, args.weights, args.dtype)
    if args.beside:
        rows |= pictures(args.beside, *common, (), asked, args.seed)
    write_atomic(args.out, image_bytes(figure(rows, asked), "png"))
    print(f"{args.out}: {len(rows)} rows of {len(asked)} prompts, {args.backend}, {args.decoder}")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run(main))
