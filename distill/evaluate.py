"""Judge a model folder: prompt following on held-out captions, and FID, by steps.

addbench evaluate build/distill/shapes/shapes-turbo --steps 1,2,4
addbench evaluate build/distill/shapes/shapes-turbo --steps 1 --wording grounds,loose,cut,typed
addbench evaluate build/distill/shapes/shapes-teacher --steps 50,4,1 --guidance 3
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.cli import Parser, int_list, run
from core.errors import PreconditionError

if TYPE_CHECKING:
    from distill.captions import Wording
    from distill.fidelity import Features
    from distill.shapes import Pictures, Scene

WORDINGS = ("full", "grounds", "loose", "cut", "typed")
CAPTION_SEED = 7
"""Held-out captions are the same in every evaluation."""


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="addbench evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder in diffusers format")
    parser.add_argument("--steps", type=int_list, default=[1, 2, 4], help="comma list")
    parser.add_argument("--guidance", type=float, default=0.0, help="0: none")
    parser.add_argument("--captions", type=int, default=600, help="a third each of 1, 2, 3 objects")
    parser.add_argument(
        "--wording", type=wordings, default=["full"],
        help=f"comma list of {', '.join(WORDINGS)}: the grammar's captions, the same on every"
        " background, looser ones, cut ones, and captions typed letter by letter",
    )  # fmt: skip
    parser.add_argument("--decoder", choices=("vae", "taesd"), default="vae")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scheduler", help="another diffusers class than the folder's")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--picture", type=Path, help="write some of the pictures as a PNG")
    parser.add_argument("--inception", type=Path, help="local weights: the standard FID too")
    parser.add_argument("--clip", type=Path, help="local CLIP folder: the CLIP score too")
    return parser


def wordings(text: str) -> list[str]:
    """The comma list of `--wording`.

    Raises:
        argparse.ArgumentTypeError: one of them is none.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in WORDINGS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(WORDINGS)}")
    return names


def held_out(captions: int, seed: int = CAPTION_SEED) -> list[Scene]:
    """Held-out scenes, a third each of one, two and three objects."""
    from distill.shapes import scenes

    third = -(-captions // 3)
    items = [scene for count in (1, 2, 3) for scene in scenes(third, seed, True, count)]
    return items[:captions]


def fid_features(
    drawn: Pictures, items: Sequence[Scene], network_folder: Path, size: int
) -> tuple[Features, Features]:
    """The project's own network's features of pictures and of drawings of the same scenes."""
    from distill.features import load_features
    from distill.fidelity import features
    from distill.shapes import draw

    network = load_features(network_folder, "fid")
    real = draw(items, seed=CAPTION_SEED, size=size)
    return features(network, drawn), features(network, real)


def fid_shapes(
    drawn: Pictures, items: Sequence[Scene], network_folder: Path, size: int
) -> tuple[float, float]:
    """FID over the project's own network, and its standard error."""
    from distill.fidelity import frechet_deviation, frechet_distance

    pair = fid_features(drawn, items, network_folder, size)
    return frechet_distance(*pair), frechet_deviation(*pair)


def open_model(
    model: Path, device: str = "cpu", scheduler: str | None = None, decoder: str = "vae"
) -> Any:
    """A model folder's pipeline, with another sampler, or through its tiny decoder (`taesd`)."""
    from distill.pipeline import open_folder, require_parts, use_tiny_decoder

    require_parts(model, ["taesd"] if decoder == "taesd" else [])
    pipeline = open_folder(model, device)
    if decoder == "taesd":
        use_tiny_decoder(pipeline, model / "taesd")
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
    return pipeline


def draw_texts(
    model: Path,
    texts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float = 0.0,
    device: str = "cpu",
    scheduler: str | None = None,
    decoder: str = "vae",
) -> tuple[dict[str, Any], Pictures]:
    """A model's pictures of texts, and under which circumstances it drew them."""
    from distill.pipeline import generate

    pipeline = open_model(model, device, scheduler, decoder)
    started = time.perf_counter()
    pictures = generate(
        pipeline,
        texts,
        steps=steps,
        guidance=guidance,
        seeds=seeds,
        size=pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
    )
    circumstances = {
        "model": model.name,
        "steps": steps,
        "guidance": guidance,
        "scheduler": type(pipeline.scheduler).__name__,
        "decoder": decoder,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return circumstances, pictures


def evaluate(
    model: Path, *, captions: int = 600, seed: int = 0, **options: Any
) -> tuple[dict[str, Any], Pictures]:
    """Figures of one model at one step count, and its pictures; `options` are `draw_texts`'s.

    `all`, an entry per attribute, `all_1` to `all_3` by number of objects (shares in [0, 1]),
    `fid_shapes` and its standard error `fid_shapes_se` where the folder has the network,
    `captions`, `seconds`.
    """
    from distill.judge import following

    items = held_out(captions)
    seeds = range(seed, seed + len(items))
    drawn_under, pictures = draw_texts(model, [scene.caption for scene in items], seeds, **options)
    figures = {**drawn_under, "captions": len(items), "seed": seed, **following(pictures, items)}
    if (model / "fid" / "fid.json").exists():
        distance, error = fid_shapes(pictures, items, model / "fid", pictures.shape[1])
        figures |= {"fid_shapes": distance, "fid_shapes_se": error}
        figures["fid_samples"] = len(items)
    return figures, pictures


def evaluate_wording(
    model: Path, wording: str, *, captions: int = 600, seed: int = 0, **options: Any
) -> tuple[dict[str, Any], Pictures]:
    """Figures of one model on held-out captions in other words than the grammar's.

    `grounds`, `loose`, `cut`: what `judge.saying` counts. `typed`: `steady`, how still pictures
    hold while `captions` / 10 captions are typed letter by letter, each of one seed
    (`judge.steadiness`), and `valid`, the share of all these pictures that are a scene.
    """
    from distill.captions import Said
    from distill.captions import captions as draw_captions
    from distill.judge import judge, saying, steadiness

    typed = wording == "typed"
    kind: Wording = "loose" if wording == "loose" else "cut" if wording == "cut" else "full"
    count = max(1, captions // 10) if typed else captions
    whole = draw_captions(count, CAPTION_SEED, True, {kind: 1.0})
    # Every prefix of a caption is drawn from the caption's own seed.
    prefixes = [(caption.prefixes() if typed else [caption]) for caption in whole]
    texts = [caption.text for row in prefixes for caption in row]
    seeds = [seed + index for index, row in enumerate(prefixes) for _ in row]
    drawn_under, pictures = draw_texts(model, texts, seeds, **options)
    figures = {**drawn_under, "wording": wording, "captions": len(whole), "seed": seed}
    if not typed:
        return figures | saying(pictures, [caption.said for caption in whole]), pictures
    shown = iter(pictures)
    figures["pictures"] = len(pictures)
    figures["steady"] = steadiness([(row[-1].text, [next(shown) for _ in row]) for row in prefixes])
    nothing = Said((), counted=False)
    figures["valid"] = sum(judge(picture, nothing).valid for picture in pictures) / len(pictures)
    return figures, pictures


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from core.files import write_json
    from distill.log import contact_sheet

    if (arguments.inception or arguments.clip) and arguments.wording != ["full"]:
        raise PreconditionError(
            "--inception and --clip compare the pictures of full captions",
            f"--wording is {','.join(arguments.wording)}",
            "leave --wording out",
        )
    rows, sheets = [], []
    for wording, steps in product(arguments.wording, arguments.steps):
        options = {
            "steps": steps,
            "guidance": arguments.guidance,
            "captions": arguments.captions,
            "seed": arguments.seed,
            "device": arguments.device,
            "scheduler": arguments.scheduler,
            "decoder": arguments.decoder,
        }
        if wording == "full":
            figures, pictures = evaluate(arguments.model, **options)
        else:
            figures, pictures = evaluate_wording(arguments.model, wording, **options)
        if arguments.inception or arguments.clip:
            from distill.fidelity import standard_scores
            from distill.shapes import draw

            items = held_out(arguments.captions)
            real = draw(items, seed=CAPTION_SEED, size=pictures.shape[1])
            figures |= standard_scores(
                pictures, real, [scene.caption for scene in items],
                inception=arguments.inception, clip=arguments.clip,
            )  # fmt: skip
        rows.append(figures)
        spread = pictures[:: max(1, len(pictures) // 16)][:16]
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
