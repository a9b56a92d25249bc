"""Judge a model folder: prompt following on held-out captions, and FID, by steps.

addbench evaluate build/distill/shapes/shapes-turbo --steps 1,2,4
addbench evaluate build/distill/shapes/shapes-teacher --steps 50,4,1 --guidance 3
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.cli import Parser, int_list, run
from core.errors import PreconditionError

if TYPE_CHECKING:
    from distill.fidelity import Features
    from distill.shapes import Pictures, Scene

CAPTION_SEED = 7
"""Held-out captions are the same in every evaluation."""


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="addbench evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder in diffusers format")
    parser.add_argument("--steps", type=int_list, default=[1, 2, 4], help="comma list")
    parser.add_argument("--guidance", type=float, default=0.0, help="0: none")
    parser.add_argument("--captions", type=int, default=600, help="a third each of 1, 2, 3 objects")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scheduler", help="another diffusers class than the folder's")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--picture", type=Path, help="write some of the pictures as a PNG")
    parser.add_argument("--inception", type=Path, help="local weights: the standard FID too")
    parser.add_argument("--clip", type=Path, help="local CLIP folder: the CLIP score too")
    return parser


def held_out(captions: int, seed: int = CAPTION_SEED) -> list[Scene]:
    """Held-out scenes, a third each of one, two and three objects."""
    from distill.shapes import scenes

    third = -(-captions // 3)
    found = [scene for count in (1, 2, 3) for scene in scenes(third, seed, True, count)]
    return found[:captions]


def fid_features(
    made: Pictures, items: Sequence[Scene], network_folder: Path, size: int
) -> tuple[Features, Features]:
    """The project's own network's features of pictures and of drawings of the same scenes."""
    from distill.features import load_features
    from distill.fidelity import features
    from distill.shapes import draw

    network = load_features(network_folder, "fid")
    real = draw(items, seed=CAPTION_SEED, size=size)
    return features(network, made), features(network, real)


def fid_shapes(
    made: Pictures, items: Sequence[Scene], network_folder: Path, size: int
) -> tuple[float, float]:
    """FID over the project's own network, and its standard error."""
    from distill.fidelity import frechet_deviation, frechet_distance

    pair = fid_features(made, items, network_folder, size)
    return frechet_distance(*pair), frechet_deviation(*pair)


def evaluate(
    model: Path,
    *,
    steps: int,
    guidance: float = 0.0,
    captions: int = 600,
    seed: int = 0,
    device: str = "cpu",
    scheduler: str | None = None,
) -> tuple[dict[str, Any], Pictures]:
    """Figures of one model at one step count, and its pictures.

    `all`, an entry per attribute, `all_1` to `all_3` by number of objects (shares in [0, 1]),
    `fid_shapes` and its standard error `fid_shapes_se` where the folder has the network,
    `captions`, `seconds`.
    """
    from distill.judge import following
    from distill.pipeline import generate, open_folder

    pipeline = open_folder(model, device)
    if scheduler:
        import diffusers

        kind = getattr(diffusers, scheduler, None)
        if kind is None:
            raise PreconditionError(
                f"diffusers has no scheduler {scheduler!r}",
                "--scheduler names it",
                "check the name",
            )
        extra = {"original_inference_steps": 4} if scheduler == "LCMScheduler" else {}
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **extra)
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    items = held_out(captions)
    started = time.perf_counter()
    made = generate(
        pipeline,
        [scene.caption for scene in items],
        steps=steps,
        guidance=guidance,
        seeds=range(seed, seed + len(items)),
        size=size,
    )
    figures: dict[str, Any] = {
        "model": model.name,
        "steps": steps,
        "guidance": guidance,
        "scheduler": type(pipeline.scheduler).__name__,
        "captions": len(items),
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        **following(made, items),
    }
    if (model / "fid" / "fid.json").exists():
        distance, error = fid_shapes(made, items, model / "fid", size)
        figures |= {"fid_shapes": distance, "fid_shapes_se": error}
        figures["fid_samples"] = len(items)
    return figures, made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from core.files import write_json
    from distill.log import contact_sheet

    rows, sheets = [], []
    for steps in arguments.steps:
        figures, made = evaluate(
            arguments.model,
            steps=steps,
            guidance=arguments.guidance,
            captions=arguments.captions,
            seed=arguments.seed,
            device=arguments.device,
            scheduler=arguments.scheduler,
        )
        if arguments.inception or arguments.clip:
            from distill.fidelity import standard_scores
            from distill.shapes import draw

            items = held_out(arguments.captions)
            real = draw(items, seed=CAPTION_SEED, size=made.shape[1])
            figures |= standard_scores(
                made, real, [scene.caption for scene in items],
                inception=arguments.inception, clip=arguments.clip,
            )  # fmt: skip
        rows.append(figures)
        spread = made[:: max(1, len(made) // 16)][:16]
        sheets.append(spread)
        print(json.dumps(figures), flush=True)
    if arguments.out:
        write_json(arguments.out, rows)
    if arguments.picture:
        import numpy as np
        from PIL import Image

        Image.fromarray(contact_sheet(np.concatenate(sheets), 16)).save(arguments.picture)
        print(f"wrote {arguments.picture}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
