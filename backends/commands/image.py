"""`addbench image PROMPT...`: an image of each prompt, with what made it in the PNG's metadata.

Several prompts are drawn in one call, as a batch, from seeds that follow each other; the files are
FILE-1.png, FILE-2.png and so on.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from core.amounts import count_text
from core.cli import (
    Parser,
    add_model_arguments,
    add_precision_argument,
    add_recipe_argument,
    image_size,
    png_file,
)
from core.errors import EXIT_OK, PreconditionError
from export.models import DEFAULT_MODEL, SCHEDULERS

if TYPE_CHECKING:
    from backends.locked import LockedRecipe


def parser() -> Parser:
    made = Parser(prog="addbench image", description=__doc__)
    made.add_argument("prompt", metavar="PROMPT", nargs="+")
    add_model_arguments(made, DEFAULT_MODEL)
    made.set_defaults(model=None)
    made.add_argument("--backend", metavar="NAME[:KEY=VALUE,...]", help="(ort)")
    add_precision_argument(made)
    made.add_argument(
        "--decoder", help="vae or taesd, the tiny one (the best that the bundle has: vae)"
    )
    made.add_argument(
        "--image", type=Path, metavar="FILE", help="a PNG, JPEG or WebP to start from"
    )
    made.add_argument(
        "--strength", type=float, help="share of the steps that run on --image, above 0 to 1"
    )
    made.add_argument("--encoder", help="of --image: vae or taesd (that of --decoder)")
    made.add_argument("--negative", metavar="PROMPT", help="what guidance leads away from")
    made.add_argument("--steps", type=int, default=None, help="default: the model's own")
    made.add_argument("--size", type=image_size, metavar="PIXELS|WxH", help="of the bundle")
    made.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SCHEDULERS)} (the model's)")
    made.add_argument("--guidance", type=float, metavar="SCALE", help="default: the model's own")
    made.add_argument("--guidance-mode", choices=("batch", "calls"), help="(batch)")
    made.add_argument(
        "--low-memory", action="store_true", help="load each part when it is needed, then drop it"
    )
    add_recipe_argument(made)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=png_file, default=Path("image.png"), metavar="FILE.png")
    return made


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what belongs to a picture where there is none, before anything is loaded."""
    for flag in ("strength", "encoder"):
        if args.image is None and getattr(args, flag) is not None:
            raise PreconditionError(
                f"--{flag} belongs to a picture, and there is none",
                "it says how the picture of --image is read or changed",
                f"add --image FILE, or drop --{flag}",
            )


def recipe_of(args: argparse.Namespace) -> LockedRecipe:
    """Read --recipe and set what it says."""
    from backends.locked import LockedRecipe, refuse_beside

    locked = LockedRecipe.read(args.recipe)
    says = locked.arguments() | {"steps": locked.steps, "precision": None}
    del says["batch"]  # the prompts say it
    refuse_beside(f"--{name.replace('_', '-')}" for name in says if getattr(args, name))
    vars(args).update(says)
    return locked


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.steps is not None and args.steps < 1:
        raise PreconditionError("--steps is less than 1", "an image needs a step", "use --steps 1")

    from backends.registry import parse_backend, with_precision

    locked = recipe_of(args) if args.recipe else None
    args.model = args.model or DEFAULT_MODEL
    args.backend = with_precision(args.backend or "ort", args.precision)
    backend = parse_backend(args.backend)
    backend.probe().require(backend.name)
    if args.low_memory:
        backend.require_low_memory()

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from rich.console import Console

    from backends.load import load_pipeline
    from backends.pipeline.prompts import check_prompts, check_seeds
    from core.files import sha256_file, write_atomic

    check_flags(args)
    check_prompts(args.prompt)
    seeds = check_seeds(args.seed, len(args.prompt))
    if len(args.prompt) > 1 and not any(" " in prompt for prompt in args.prompt):
        apart = ", ".join(f'"{prompt}"' for prompt in args.prompt)
        print(f"note: {len(args.prompt)} prompts, an image each: {apart}; one of several words goes"
              " in quotes", file=sys.stderr)  # fmt: skip
    status = Console(stderr=True).status(f"opening {args.model}")
    with (
        status,
        load_pipeline(
            args.model,
            args.backend,
            args.decoder,
            weights=args.weights,
            dtype=args.dtype,
            size=args.size,
            low_memory=args.low_memory,
            scheduler=args.scheduler,
            guidance=args.guidance,
            guidance_mode=args.guidance_mode,
            encoder=args.encoder,
            batch=len(args.prompt),
            on_part=lambda doing, part: status.update(f"{doing} {part}"),
        ) as pipeline,
    ):
        bundle = pipeline.bundle
        if locked and (text := locked.elsewhere(bundle.hash)):
            print(f"note: {text}", file=sys.stderr)
        steps = args.steps or bundle.steps
        status.update(f"drawing, steps: {steps}")
        out = pipeline(
            args.prompt,
            steps=steps,
            seed=args.seed,
            images=args.image,
            strength=args.strength,
            negative=args.negative,
        )
        picture = (
            {}
            if args.image is None
            else {
                "image": args.image.name,
                "image_sha256": sha256_file(args.image.expanduser()),
                "image_done": list(out.pictures[0]),
                "strength": args.strength,
                "encoder": pipeline.encoder if out.timings.encode is not None else None,
            }
        )
        versions = {p: version(p) for p in ("torch", "diffusers", "transformers")}
        facts = {
            "steps": steps,
            **asdict(pipeline.recipe),
            **picture,
            **({} if args.negative is None else {"negative": args.negative}),
            "nfe": out.nfe,
            "model": bundle.name,
            "weights": bundle.weights,
            "licence": bundle.licence,
            "backend": args.backend,
            "provenance": out.provenance,
            "decoder": pipeline.decoder,
            "low_memory": args.low_memory,
            "precision": pipeline.backend.precision(bundle),
            "storage": pipeline.backend.storage(bundle),
            "versions": versions | pipeline.backend.fingerprint(),
            "bundle": bundle.hash,
        }
        load_s, compile_s = pipeline.load_s, pipeline.compile_s
    for number, (prompt, seed, image) in enumerate(
        zip(args.prompt, seeds, out.images, strict=True)
    ):
        info = PngInfo()
        for key, value in {"prompt": prompt, "seed": seed, **facts}.items():
            info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
        file = args.out
        if len(args.prompt) > 1:
            file = file.with_stem(f"{file.stem}-{number + 1}")
        try:
            write_atomic(file, buffer.getvalue())
        except OSError as error:
            raise PreconditionError(
                f"{file} cannot be written", str(error), "pass another place with --out"
            ) from error
        print(
            f"{file}: {bundle.name} ({bundle.weights} weights), {count_text(steps, 'step')},"
            f" NFE {out.nfe}, seed {seed}, {args.backend}, {facts['decoder']}"
        )
    if args.image is not None:
        print(
            f"  from {args.image}, strength {args.strength:g}:"
            f" {'; '.join(out.pictures[0]) or 'as it is'}"
        )
    times = out.timings
    stages = ""
    if times.text is not None and times.decode is not None and times.rest is not None:
        unet = " + ".join(f"{1e3 * step:.1f}" for step in times.unet)
        encode = "" if times.encode is None else f"encode {1e3 * times.encode:.1f} ms, "
        stages = (
            f"text {1e3 * times.text:.1f} ms, {encode}UNet {unet} ms,"
            f" decode {1e3 * times.decode:.1f} ms, rest {1e3 * times.rest:.1f} ms, "
        )
    if args.low_memory:
        stages += f"loading {1e3 * times.load:.1f} ms, "
    if out.provenance == "emulated":
        print(f"  {backend.probe().what}")
    elif out.provenance == "modelled":
        print(f"  modelled, not measured: {stages}total {1e3 * times.total:.1f} ms")
    else:
        print(
            f"  {stages}total {1e3 * times.total:.1f} ms"
            f" (this process's first call; compile {compile_s:.2f} s, load {load_s:.2f} s)"
        )
    if bundle.weights == "random":
        print(
            "  the weights are random: the image shows that it ran, nothing more", file=sys.stderr
        )
    return EXIT_OK
