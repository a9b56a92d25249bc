"""`addbench cards`: what a Cloud AI 100 would do, by a model of it. Nothing is measured.

Holds a published period (4 images for 4 prompts every ~250 ms on an Ultra) against every step
count, decoder and split; says what the tiny decoder buys; puts the cards side by side; and says
how far the model was off on published results that it had not seen. The model, what it assumes and
where it is weak: backends/modelled.

A target against a modelled range: `impossible` below the floor, `beyond the range` below its low
end, `fits` inside it, `time to spare` above it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from core.cli import (
    Parser,
    add_cell_arguments,
    add_format_argument,
    image_size,
    word_list,
)
from core.errors import EXIT_OK

MODEL, TARGET_MS, BATCH = "sdxl-turbo", 250.0, 4
CARDS = ("ai100-standard", "ai100-pro", "ai100-ultra")


def period(text: str) -> float:
    """A positive number of milliseconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of milliseconds")
    return value


def parser() -> Parser:
    top = Parser(
        prog="addbench cards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--model", default=MODEL, metavar="NAME", help=f"({MODEL})")
    top.add_argument("--size", type=image_size, metavar="PIXELS|WxH", help="(the model's own)")
    top.add_argument(
        "--device", type=word_list, default=list(CARDS), metavar="NAME[,...]",
        help=f"({','.join(CARDS)})",
    )  # fmt: skip
    add_cell_arguments(top, steps=[1, 2, 4], batch=BATCH, decoder=["vae", "taesd"])
    top.add_argument(
        "--target", type=period, default=TARGET_MS, metavar="MS", help=f"period ({TARGET_MS:g})"
    )
    add_format_argument(top)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from bench.limits.cards import Question, markdown, options, report, sections, show

    question = Question(
        args.model, args.size, args.device, args.steps, args.batch, args.decoder, args.target
    )
    ways = options(question)
    if args.format == "json":
        json.dump(report(ways, question), sys.stdout, indent=2)
        print()
    elif args.format == "markdown":
        print(markdown(sections(ways, question)), end="")
    else:
        show(sections(ways, question))
    return EXIT_OK
