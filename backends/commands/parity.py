"""`addbench parity`: hold a bundle's parts and images to torch in FP32."""

from __future__ import annotations

from collections.abc import Sequence

from core.cli import Parser, add_backend_argument, add_model_arguments, add_precision_argument, run
from core.errors import EXIT_OK
from export.models import DEFAULT_MODEL


def parser() -> Parser:
    top = Parser(prog="addbench parity", description=__doc__)
    add_model_arguments(top, DEFAULT_MODEL)
    add_backend_argument(top)
    add_precision_argument(top)
    top.add_argument("--force", action="store_true", help="run it again")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
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


if __name__ == "__main__":
    raise SystemExit(run(main))
