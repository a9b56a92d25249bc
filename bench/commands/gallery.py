"""`addbench gallery`: a model's prompts by steps, and another model in full, as one picture.

Rows are steps, columns prompts, all from the same seeds; through the pipeline of any backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.cli import Parser, add_model_arguments, int_list, png_file
from core.errors import EXIT_OK, PreconditionError
from export.models import DEFAULT_MODEL


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


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.prompts < 1:
        raise PreconditionError(
            f"--prompts {args.prompts} draws nothing", "it counts columns", "use 1 or more"
        )
    from backends.registry import parse_backend
    from bench.show.canvas import image_bytes
    from bench.show.gallery import figure, pictures
    from core.files import write_atomic
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
