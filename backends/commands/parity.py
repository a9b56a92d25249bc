"""`addbench parity`: hold a bundle's parts and images to torch in FP32.

With --strength it draws reference images from a picture and adds them to the bundle's, for rows of
`addbench sweep --strength 0.5` to be held against: of large models none are drawn otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.cli import (
    Parser,
    add_backend_argument,
    add_model_arguments,
    add_precision_argument,
    image_size,
    int_list,
    run,
    share_list,
    word_list,
)
from core.errors import EXIT_OK, PreconditionError
from export.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from export.bundle import Bundle


def parser() -> Parser:
    top = Parser(prog="addbench parity", description=__doc__)
    add_model_arguments(top, DEFAULT_MODEL)
    add_backend_argument(top)
    add_precision_argument(top)
    top.add_argument("--force", action="store_true", help="run it again")
    top.add_argument("--size", type=image_size, metavar="PIXELS|WxH", help="of the bundle")
    drawn = top.add_argument_group("reference images from a picture")
    drawn.add_argument("--strength", type=share_list, metavar="0.5,0.75",
                       help="share of the steps that run on the picture")  # fmt: skip
    drawn.add_argument("--steps", type=int_list, metavar="2,4", help="(those of the references)")
    drawn.add_argument("--encoder", type=word_list, metavar="vae,taesd", help="(vae)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for flag in ("steps", "encoder"):
        if getattr(args, flag) and args.strength is None:
            raise PreconditionError(
                f"--{flag} without --strength", "it is of reference images from a picture",
                f"add --strength 0.5, or drop --{flag}",
            )  # fmt: skip
    from backends.registry import parse_backend, with_precision

    text = with_precision(args.backend, args.precision)
    backend = parse_backend(text)
    backend.probe().require(backend.name)
    from backends.check.parity import check, report
    from export.bundle import find_bundle

    bundle = find_bundle(args.model, args.weights, args.dtype, args.size)
    if args.strength is not None:
        return redraw_references(args, bundle)
    print(f"parity of {bundle.path.name}: {text} against torch FP32", flush=True)
    record = check(bundle, text, args.force, say=lambda line: print(line, flush=True))
    print(report(record))
    return EXIT_OK


def redraw_references(args: argparse.Namespace, bundle: Bundle) -> int:
    """Draw the reference images from a picture that are asked for."""
    from backends.check.parity import redraw, reference_steps
    from backends.pipeline.recipe import check_steps, make_recipe
    from backends.pipeline.start import check_strength, kept_steps

    recipe = make_recipe(bundle)
    for steps in args.steps or ():
        check_steps(bundle, recipe, steps)
        for share in args.strength:
            check_strength(bundle, recipe, steps, share)
    pairs = dict.fromkeys(
        (steps, kept)
        for steps in args.steps or reference_steps(bundle)
        for share in args.strength
        if 0 < (kept := kept_steps(steps, share)) < steps
    )
    if not pairs:
        check_strength(bundle, recipe, reference_steps(bundle)[-1], min(args.strength))
        raise PreconditionError(
            "--strength 1 draws from no picture", "it is text to image, whose references are there",
            "pass a share below 1",
        )  # fmt: skip
    names = args.encoder or ["vae"]
    for key in redraw(bundle, list(pairs), names, say=lambda line: print(line, flush=True)):
        decoder, steps, encoder, kept = key
        print(f"{decoder}: {kept} of {steps} steps from a picture ({encoder})")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run(main))
