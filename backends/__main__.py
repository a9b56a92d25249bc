"""`addbench backends`: list backends, fill and look after the artifact cache, check parity."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from core.cli import (
    Parser,
    add_model_arguments,
    add_precision_argument,
    int_list,
    run,
    word_list,
)
from core.errors import EXIT_FAILED, EXIT_OK, PreconditionError
from export.models import DEFAULT_MODEL


def parser() -> Parser:
    top = Parser(prog="addbench backends", description=__doc__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    commands.add_parser("list", help="every backend, usable or not and why (the default)")

    compile_ = commands.add_parser("compile", help="compile a model's parts into the cache")
    add_model_arguments(compile_, DEFAULT_MODEL)
    compile_.add_argument(
        "--backend", action="append", metavar="NAME[:KEY=VALUE,...]", help="repeatable"
    )
    add_precision_argument(compile_)
    compile_.add_argument("--batch", type=int_list, default=[1], metavar="1,4")
    compile_.add_argument("--decoder", type=word_list, default=["vae", "taesd"])
    compile_.add_argument(
        "--dry-run",
        action="store_true",
        help="print the vendor's own commands for it; needs no device",
    )

    parts_ = commands.add_parser("parts", help="which parts of a model a backend takes")
    add_model_arguments(parts_, DEFAULT_MODEL)
    parts_.add_argument("--backend", default="ort", metavar="NAME[:KEY=VALUE,...]")

    cache = commands.add_parser("cache", help="the artifact cache")
    actions = cache.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("ls", help="what it holds")
    actions.add_parser("verify", help="hash every file")
    prune = actions.add_parser("prune", help="drop least recently used artifacts")
    prune.add_argument(
        "--max-gb", type=float, default=None, help="keep at most this much (default: the cap)"
    )

    parity = commands.add_parser("parity", help="hold a bundle's parts and images to torch FP32")
    parity.add_argument("model", metavar="NAME|PATH", help="model name or a bundle's folder")
    parity.add_argument("--weights", default=None)
    parity.add_argument("--dtype", default=None, choices=("fp16", "fp32"))
    parity.add_argument("--backend", default="ort")
    add_precision_argument(parity)
    parity.add_argument("--force", action="store_true", help="run it again")
    return top


def list_backends() -> int:
    from backends.base import Lacks
    from backends.registry import each_backend

    for name, backend, found in each_backend():
        state = "usable" if found.usable else "not usable"
        print(f"{name:<10} {state:<11} {found.version:<10} {found.what}")
        if not found.usable:
            print(f"{'':<22} why:  {found.why or found.what}\n{'':<22} next: {found.next}")
        for key, option in backend.option_types.items() if backend else ():
            values = f" ({', '.join(option.choices)})" if option.choices else ""
            print(f"{'':<10} :{key}={option.default}  {option.help}{values}")
        if backend and isinstance(backend, Lacks):
            for line in backend.lacks():
                print(f"{'':<10} {line}")
    return EXIT_OK


def compile_parts(args: argparse.Namespace) -> int:
    from backends.base import (
        DryRuns,
        DryRunsModels,
        Remarks,
        Shapes,
        UnsupportedError,
        check_decoder,
        probe_compiler,
        stage_parts,
    )
    from backends.registry import parse_backend, with_precision

    texts = [with_precision(text, args.precision) for text in args.backend or ["ort"]]
    chosen, done = [parse_backend(text) for text in texts], []
    for backend in chosen:
        if not args.dry_run:
            probe_compiler(backend).require(backend.name)
            continue
        if isinstance(backend, DryRunsModels):
            what = (args.model, args.weights, args.dtype, args.decoder, args.batch)
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
    for decoder in args.decoder:
        check_decoder(bundle, decoder)
    width, height = bundle.size
    recipe = make_recipe(bundle)
    for backend in chosen:
        every = backend.parts(bundle)
        wanted = {part for decoder in args.decoder for part in stage_parts(every, decoder)}
        for batch in args.batch:
            for part in (part for part in every if part in wanted):
                shapes = recipe.shapes(part, Shapes(batch, width, height))
                if args.dry_run and isinstance(backend, DryRuns):
                    print(f"# {backend.name} {bundle.path.name} {part} batch {batch}")
                    for words in backend.dry_run(bundle, part, shapes):
                        print(shlex.join(words))
                    continue
                artifact = backend.compile(bundle, part, shapes)
                how = "cached" if artifact.cached else "compiled"
                print(
                    f"{backend.name} {bundle.path.name} {part} batch {batch}: {how} in"
                    f" {artifact.compile_s:.1f} s, {artifact.path or 'nothing to keep'}"
                )
                if isinstance(backend, Remarks) and (remark := backend.remark(artifact)):
                    print(f"  {remark}")
    return EXIT_OK


def list_parts(args: argparse.Namespace) -> int:
    """Compile every part for one image; say which are taken, and what refuses the others."""
    from backends.base import BackendError, Shapes, UnsupportedError, probe_compiler
    from backends.registry import parse_backend

    backend = parse_backend(args.backend)
    probe_compiler(backend).require(backend.name)
    from export.bundle import find_bundle

    bundle = find_bundle(args.model, args.weights, args.dtype)
    print(f"{args.backend} on {bundle.path.name}: {backend.summary}")
    for part in backend.parts(bundle):
        try:
            backend.compile(bundle, part, Shapes(1, *bundle.size))
        except (BackendError, UnsupportedError) as error:
            print(f"  {part:<16} refused: {error.what}\n{'':<18} why: {error.why}")
        else:
            print(f"  {part:<16} taken")
    return EXIT_OK


def cache(args: argparse.Namespace) -> int:
    from backends.artifacts.cache import ArtifactCache, Entry, disk_bytes

    store = ArtifactCache()

    def show(entry: Entry) -> None:
        print(f"{entry.key}  {entry.bytes / 1e9:8.3f} GB  {entry.label}")

    if args.action == "prune":
        if args.max_gb is not None and args.max_gb < 0:
            raise PreconditionError("--max-gb is negative", "it is a size", "use 0 to drop all")
        before = disk_bytes(store.entries())
        removed = store.prune(store.cap_gb if args.max_gb is None else args.max_gb)
        for entry in removed:
            show(entry)
        freed = before - disk_bytes(store.entries())
        print(f"removed {len(removed)}, {freed / 1e9:.3f} GB")
        return EXIT_OK
    if args.action == "verify":
        found = store.verify()
        for key, sound in found.items():
            print(f"{key}  {'sound' if sound else 'damaged: removed, compile it again'}")
        return EXIT_OK if all(found.values()) else EXIT_FAILED
    entries = store.entries()
    for entry in entries:
        show(entry)
    total = disk_bytes(entries)
    shared = (sum(entry.bytes for entry in entries) - total) / 1e9
    print(
        f"{len(entries)} artifacts, {total / 1e9:.3f} GB of {store.cap_gb:g} GB"
        + (f" ({shared:.3f} GB more if none shared its files)" if shared else "")
        + f", in {store.root}"
    )
    return EXIT_OK


def parity(args: argparse.Namespace) -> int:
    from backends.registry import parse_backend, with_precision

    text = with_precision(args.backend, args.precision)
    backend = parse_backend(text)
    backend.probe().require(backend.name)
    from backends.check.parity import check, report
    from export.bundle import find_bundle

    bundle = find_bundle(args.model, args.weights, args.dtype)
    print(f"parity of {bundle.path.name}: {text} against torch FP32", flush=True)
    record = check(bundle, text, args.force, say=lambda line: print(line, flush=True))
    print(report(record))
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command == "compile":
        return compile_parts(args)
    if args.command == "parts":
        return list_parts(args)
    if args.command == "cache":
        return cache(args)
    if args.command == "parity":
        return parity(args)
    return list_backends()


if __name__ == "__main__":
    raise SystemExit(run(main))
