"""`addbench export web BUNDLE OUT`: a static folder that draws a bundle's model in the browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.cli import Parser
from core.errors import EXIT_OK


def parser() -> Parser:
    top = Parser(prog="addbench export web", description=__doc__)
    top.add_argument(
        "bundle", metavar="BUNDLE", help="a bundle's folder, or the model whose bundle it is"
    )
    top.add_argument("out", type=Path, metavar="OUT", help="the folder; replaced as a whole")
    top.add_argument("--weights", help="hub, random or folder: which bundle of that model")
    top.add_argument("--dtype", choices=("fp16", "fp32"), help="weights' dtype")
    top.add_argument(
        "--ort", type=Path, metavar="FOLDER",
        help="where the runtime's packages lie, as `npm pack` writes them (npm brings them)",
    )  # fmt: skip
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from core.amounts import bytes_text
    from export.bundle import find_bundle
    from export.web.site import build_site

    bundle = find_bundle(args.bundle, args.weights, args.dtype)
    out: Path = args.out.expanduser().absolute()
    manifest = build_site(bundle, out, args.ort and args.ort.expanduser())
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    model = sum(
        entry["bytes"] for name, entry in manifest["files"].items() if name.startswith("model/")
    )
    print(f"licence: {bundle.licence}")
    print(f"{out}: {bytes_text(size)}, {bytes_text(model)} of them the model")
    return EXIT_OK
