"""`addbench compile`: compile a model's parts into the artifact cache, ahead of a sweep."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from core.cli import (
    Parser,
    add_backend_argument,
    add_model_arguments,
    add_precision_argument,
    int_list,
    word_list,
)
from core.errors import EXIT_OK, PreconditionError
from export.models import DEFAULT_MODEL


def parser() -> Parser:
    top = Parser(prog="addbench compile", description=__doc__)
    add_model_arguments(top, DEFAULT_MODEL)
    add_backend_argument(top, many=True)
    add_precision_argument(top)
    top.add_argument(
        "--batch", type=int_list, default=[1], metavar="1,4", help="images of a call (1)"
    )
    top.add_argument(
        "--decoder", type=word_list, metavar="vae,taesd", help="(those that the bundle has)"
    )  # fmt: skip
    top.add_argument(
        "--encoder", type=word_list, default=[], metavar="vae,taesd", help="of pictures (none)"
    )
    top.add_argument(
        "--dry-run", action="store_true",
        help="print the vendor's own commands for it; needs no device",
    )  # fmt: skip
    top.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="with --dry-run: graphs and a script, to be copied to a machine with the compiler",
    )  # fmt: skip
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from backends.base import (
        DryRuns,
        DryRunsInto,
        DryRunsModels,
        Remarks,
        Shapes,
        UnsupportedError,
        check_decoder,
        decoders,
        probe_compiler,
        stage_parts,
    )
    from backends.pipeline.session import check_encoder
    from backends.registry import parse_backend, with_precision

    if args.out and (not args.dry_run or len(args.backend or ()) != 1):
        raise PreconditionError(
            f"--out {args.out} is the folder of one backend's dry run",
            "compiled artifacts go to the cache (`addbench cache`)",
            "pass --dry-run and one --backend, or leave --out out",
        )
    texts = [with_precision(text, args.precision) for text in args.backend or ["ort"]]
    chosen, done = [parse_backend(text) for text in texts], []
    for backend in chosen:
        if not args.dry_run:
            probe_compiler(backend).require(backend.name)
            continue
        if isinstance(backend, DryRunsModels):
            asked = args.decoder or ["vae", "taesd"]
            what = (args.model, args.weights, args.dtype, asked, args.batch, args.out, args.encoder)
            print("\n".join(backend.dry_run_model(*what)))
            done.append(backend)
        elif not isinstance(backend, DryRuns):
            raise UnsupportedError(
                f"backend {backend.name} has no dry run",
                "what it compiles with is not a command-line tool",
                "leave --dry-run out",
            )
    chosen = [backend for backend in chosen if backend not in done]
    if not chosen:
        return EXIT_OK
    from backends.pipeline.recipe import make_recipe
    from export.bundle import find_bundle

    bundle = find_bundle(args.model, args.weights, args.dtype)
    names = args.decoder or decoders(bundle)
    for decoder in names:
        check_decoder(bundle, decoder)
    for encoder in args.encoder:
        check_encoder(bundle, encoder)
    width, height = bundle.size
    recipe = make_recipe(bundle)
    for backend in chosen:
        every = backend.parts(bundle)
        wanted = {part for decoder in names for part in stage_parts(every, decoder)}
        wanted |= {f"{encoder}_encoder" for encoder in args.encoder}
        jobs = [
            (part, batch, recipe.shapes(part, Shapes(batch, width, height)))
            for batch in args.batch
            for part in every
            if part in wanted
        ]
        if args.out and isinstance(backend, DryRunsInto):
            parts = [(part, shapes) for part, _, shapes in jobs]
            print("\n".join(backend.dry_run_into(bundle, parts, args.out)))
            return EXIT_OK
        for part, batch, shapes in jobs:
            if args.dry_run and isinstance(backend, DryRuns):
                print(f"# {backend.name} {bundle.path.name} {part} batch {batch}")
                for command in backend.dry_run(bundle, part, shapes):
                    print(shlex.join(command))
                continue
            artifact = backend.compile(bundle, part, shapes)
            how = "cached" if artifact.cached else "compiled"
            print(
                f"{backend.name} {bundle.path.name} {part} batch {batch}: {how} in"
                f" {artifact.compile_s:.1f} s, {artifact.path or 'nothing to keep'}"
            )
            if isinstance(backend, Remarks) and (remark := backend.remark(artifact)):
                print(f"  {remark}")
        if args.dry_run and isinstance(backend, DryRunsInto):
            print("# these run in this checkout; for another machine: --dry-run --out FOLDER")
    return EXIT_OK
