"""`addbench serve`: a page that keeps up with typing, and OpenAI's image API, for any bundle."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from core.cli import (
    Parser,
    add_backend_argument,
    add_model_arguments,
    add_recipe_argument,
    count,
    duration,
    image_size,
    natural,
    run,
    word_list,
)
from core.errors import PreconditionError
from export.models import DEFAULT_MODEL, SCHEDULERS

if TYPE_CHECKING:
    from backends.locked import LockedRecipe

TOKEN_VARIABLE = "ADDBENCH_TOKEN"


def parser() -> Parser:
    top = Parser(prog="addbench serve", description=__doc__)
    add_model_arguments(top, DEFAULT_MODEL)
    top.set_defaults(model=None)
    add_backend_argument(top, many=True)
    top.add_argument(
        "--decoder", type=word_list, default=[], metavar="vae,taesd",
        help="which may be asked for, the first where nothing is said (all of the bundle)",
    )  # fmt: skip
    top.add_argument("--size", type=image_size, metavar="PIXELS|WxH", help="of the bundle")
    top.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SCHEDULERS)} (the model's)")
    top.add_argument("--guidance", type=float, metavar="SCALE", help="default: the model's own")
    add_recipe_argument(top)
    top.add_argument(
        "--static", type=Path, metavar="FOLDER",
        help="serve a folder of `addbench export web` instead, which draws in the browser",
    )  # fmt: skip
    door = top.add_argument_group("where it listens")
    door.add_argument("--host", default="127.0.0.1", help="(127.0.0.1: this machine alone)")
    door.add_argument("--port", type=port, default=8000, help="0: any that is free (8000)")
    door.add_argument(
        "--token", default=os.environ.get(TOKEN_VARIABLE, ""), metavar="TEXT",
        help=f"what every request must carry; also from {TOKEN_VARIABLE}, which no list of"
        " processes shows",
    )  # fmt: skip
    load = top.add_argument_group("under load")
    load.add_argument(
        "--batch", type=count, metavar="N",
        help="pictures drawn together at most (4 where a picture takes under half a second and"
        " batches need no padding, else 1)",
    )  # fmt: skip
    load.add_argument(
        "--batch-window", type=milliseconds, default=0.0, metavar="MS",
        help="how long a batch that is not full waits for more (0: not at all)",
    )  # fmt: skip
    load.add_argument(
        "--queue", type=count, metavar="N",
        help="pictures of the API that may wait; one more is answered with 429 (4 batches)",
    )  # fmt: skip
    load.add_argument(
        "--deadline", type=duration, default=30.0, metavar="TIME",
        help="what waited for longer is not begun any more (30s)",
    )  # fmt: skip
    load.add_argument(
        "--cancel-stale", action="store_true",
        help="stop a live picture at its next stage when newer text comes, never two in a row: for"
        " pictures of half a second and more",
    )  # fmt: skip
    load.add_argument(
        "--timeout", type=duration, default=600.0, metavar="TIME",
        help="a worker that gives no picture for so long is started anew (10m)",
    )  # fmt: skip
    load.add_argument(
        "--drain", type=natural, default=30, metavar="SECONDS",
        help="how long SIGTERM waits for what is being answered (30)",
    )  # fmt: skip
    return top


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 to 65535")
    return int(text)


def milliseconds(text: str) -> float:
    """`20` -> 0.02 seconds."""
    try:
        value = float(text) / 1e3
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds, 0 to 10000")
    return value


def follow(args: argparse.Namespace) -> LockedRecipe:
    """Read --recipe and set what it says.

    Raises:
        PreconditionError: flags say it too, or it is of a call that the server does not make.
    """
    from backends.locked import LockedRecipe, refuse_beside

    locked = LockedRecipe.read(args.recipe)
    if locked.low_memory or locked.guidance_mode == "calls":
        raise PreconditionError(
            f"{args.recipe} cannot be served",
            "a server keeps all parts loaded, and makes both evaluations of guidance in one call",
            "choose from a run without low memory and without --guidance-mode calls",
        )
    says = locked.arguments()
    says |= {"backend": [locked.backend], "decoder": [locked.decoder]}
    del says["low_memory"], says["guidance_mode"]
    refuse_beside(f"--{name}" for name in says if getattr(args, name))
    vars(args).update(says)
    return locked


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.token and not args.token.isascii():
        raise PreconditionError(
            "--token is not ASCII", "a header carries it", "use letters and digits"
        )

    from serve.server import Listener, serve

    listener = Listener(args.host, args.port, args.token)
    if args.static is not None:
        from serve.static import serve_static

        return serve_static(args.static.expanduser().absolute(), listener)
    from backends.registry import named_options
    from export.bundle import find_bundle
    from serve.model import served_model

    for backend in args.backend or ():
        named_options(backend)  # a name that there is not is refused at once
    locked = follow(args) if args.recipe else None
    bundle = find_bundle(args.model or DEFAULT_MODEL, args.weights, args.dtype, args.size)
    model = served_model(bundle, tuple(args.decoder), args.scheduler, args.guidance)
    if locked:
        model = replace(model, steps=locked.steps)
        if text := locked.elsewhere(bundle.hash):
            print(f"note: {text}", file=sys.stderr)
    jobs = {
        backend: {
            "bundle": str(bundle.path),
            "backend": backend,
            "decoders": list(model.decoders),
            "all_decoders": bool(args.decoder),
            "batch": args.batch,
            "scheduler": args.scheduler,
            "guidance": args.guidance,
        }
        for backend in args.backend or ["ort"]
    }
    if len(jobs) < len(args.backend or ["ort"]):
        raise PreconditionError(
            "a --backend stands twice", "each is a worker on a device of its own",
            "name the devices, as --backend cuda:device=0 --backend cuda:device=1",
        )  # fmt: skip
    return serve(
        model,
        jobs,
        listener,
        drain_s=args.drain,
        queue=args.queue or 4 * (args.batch or 4),
        deadline_s=args.deadline,
        window_s=args.batch_window,
        timeout_s=args.timeout,
        stops_stale=args.cancel_stale,
    )


if __name__ == "__main__":
    raise SystemExit(run(main))
