"""`addbench backends`: every backend, usable here or not and why, with its options.

`addbench backends parts --backend NAME` compiles every part of a model for one image and says which
are taken, and what refuses the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from core.cli import Parser, add_backend_argument, add_model_arguments
from core.errors import EXIT_OK
from export.models import DEFAULT_MODEL


def parser() -> Parser:
    top = Parser(
        prog="addbench backends",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = top.add_subparsers(dest="action", metavar="list|parts")
    actions.add_parser("list", help="every backend, usable or not and why (the default)")
    parts = actions.add_parser("parts", help="which parts of a model a backend takes")
    add_model_arguments(parts, DEFAULT_MODEL)
    add_backend_argument(parts)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return list_parts(args) if args.action == "parts" else list_backends()


def list_backends() -> int:
    from backends.base import Lacks
    from backends.registry import each_backend

    for name, backend, probe in each_backend():
        state = "usable" if probe.usable else "not usable"
        print(f"{name:<10} {state:<11} {probe.version:<10} {probe.what}")
        if not probe.usable:
            print(f"{'':<22} why:  {probe.why or probe.what}\n{'':<22} next: {probe.next}")
        for key, option in backend.option_types.items() if backend else ():
            values = f" ({', '.join(option.choices)})" if option.choices else ""
            print(f"{'':<10} :{key}={option.default}  {option.help}{values}")
        if backend and isinstance(backend, Lacks):
            for line in backend.lacks():
                print(f"{'':<10} {line}")
    return EXIT_OK


def list_parts(args: argparse.Namespace) -> int:
    """Compile every part for one image; say which are taken, and what refuses the others."""
    from backends.base import BackendError, Remarks, Shapes, UnsupportedError, probe_compiler
    from backends.registry import parse_backend
    from export.bundle import find_bundle

    backend = parse_backend(args.backend)
    probe_compiler(backend).require(backend.name)
    bundle = find_bundle(args.model, args.weights, args.dtype)
    print(f"{args.backend} on {bundle.path.name}: {backend.summary}")
    for part in backend.parts(bundle):
        try:
            artifact = backend.compile(bundle, part, Shapes(1, *bundle.size))
        except (BackendError, UnsupportedError) as error:
            print(f"  {part:<16} refused: {error.what}\n{'':<18} why: {error.why}")
        else:
            remark = backend.remark(artifact) if isinstance(backend, Remarks) else ""
            print(f"  {part:<16} taken{f': {remark}' if remark else ''}")
    return EXIT_OK
