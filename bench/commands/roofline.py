"""`addbench roofline`: the distance to the hardware's limit, FLOPs and bytes of each part.

A floor is the time that direct algorithms need: every multiply-add done once at the peak, or every
byte moved once at full bandwidth, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.cli import Parser, add_format_argument, add_model_arguments, count, image_size
from core.errors import EXIT_OK
from export.models import DEFAULT_MODEL, MODELS

if TYPE_CHECKING:
    from export.source.checkpoint import Checkpoint


def parser() -> Parser:
    top = Parser(
        prog="addbench roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(top, DEFAULT_MODEL)
    top.add_argument("--size", type=image_size, metavar="PIXELS|WxH", help="(the model's own)")
    top.add_argument("--batch", type=count, default=1, metavar="N", help="images of a call (1)")
    where = top.add_mutually_exclusive_group()
    where.add_argument("--measure", action="store_true", help="measure this machine's ceilings")
    where.add_argument("--device", metavar="NAME", help="a known card: its published peaks")
    add_format_argument(top, ("table", "json"))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from bench.limits.floors import published, roofline, show
    from bench.machine.ceilings import measure
    from bench.run.plan import default_steps
    from core.devices import find_device

    checkpoint, size, dtype = subject(args)
    ceilings = measure() if args.measure else published(args.device) if args.device else None
    report = roofline(
        checkpoint, size, dtype, args.batch, ceilings, default_steps(checkpoint.model)
    )
    source = find_device(args.device).source_text if args.device else None
    if args.format == "json":
        print(json.dumps({"model": args.model} | report | {"peaks_from": source}, indent=2))
    else:
        show({"model": args.model} | report)
        if source:
            print(f"peaks from {source}")
    return EXIT_OK


def subject(args: argparse.Namespace) -> tuple[Checkpoint, tuple[int, int], str]:
    """What is counted: a checkpoint, the size of its images, the dtype of its weights.

    From the architecture alone where the model's name is known.
    """
    from export.bundle import find_bundle
    from export.request import require_size
    from export.source.checkpoint import open_checkpoint

    if args.model in MODELS:
        model = MODELS[args.model]
        checkpoint = open_checkpoint(model, "random")
        size, dtype = (model.size, model.size), args.dtype or "fp16"
    else:
        bundle = find_bundle(args.model, args.weights, args.dtype)
        checkpoint, size, dtype = bundle.checkpoint(), bundle.size, bundle.dtype
    if args.size:
        size = args.size
        require_size(checkpoint.model, checkpoint.multiple, *size)
    return checkpoint, size, dtype
