"""`addbench verify BUNDLE`: hash a bundle's files against its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.cli import Parser
from core.errors import EXIT_FAILED, EXIT_OK


def parser() -> Parser:
    top = Parser(prog="addbench verify", description=__doc__)
    top.add_argument("bundle", metavar="BUNDLE", help="its folder, or the model whose bundle it is")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from export.bundle import Bundle, find_bundle

    folder = Path(args.bundle)
    bundle = Bundle.open(folder) if folder.is_dir() else find_bundle(args.bundle)
    problems = bundle.verify()
    for problem in problems:
        print(problem)
    if problems:
        print(f"{bundle.path}: {len(problems)} problems; export it again with --force")
        return EXIT_FAILED
    print(f"{bundle.path}: {len(bundle.manifest['files'])} files, as they were exported")
    return EXIT_OK
