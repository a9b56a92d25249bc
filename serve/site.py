"""`addbench export web BUNDLE OUT`: a static folder that draws a bundle's model in the browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.cli import Parser
from core.errors import EXIT_OK

if TYPE_CHECKING:
    from export.bundle import Bundle


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
    top.add_argument(
        "--coi", action="store_true",
        help="for a host that sends no headers: a service worker puts them on, for threads",
    )  # fmt: skip
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from core.amounts import bytes_text
    from export.bundle import find_bundle
    from export.web.site import build_site, require_drawable

    bundle = find_bundle(args.bundle, args.weights, args.dtype)
    out: Path = args.out.expanduser().absolute()
    require_drawable(bundle)
    manifest = build_site(
        bundle, out, page_files(bundle, args.coi), args.ort and args.ort.expanduser()
    )
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    model = sum(
        entry["bytes"] for name, entry in manifest["files"].items() if name.startswith("model/")
    )
    print(f"licence: {bundle.licence}")
    print(f"{out}: {bytes_text(size)}, {bytes_text(model)} of them the model")
    print(f"  next: addbench serve --static {out}")
    return EXIT_OK


def page_files(bundle: Bundle, coi: bool = False) -> dict[str, bytes]:
    """The server's own page, with the worker in place of the WebSocket, and what it must know.

    Args:
        coi: let a service worker isolate it, where the host does not.
    """
    from dataclasses import replace

    from backends.pipeline.recipe import make_recipe
    from core.files import json_bytes
    from export.web.schedule import step_counts
    from serve.model import redraws, served_model
    from serve.pages import FOLDER, page_facts

    files = {file.name: file.read_bytes() for file in FOLDER.iterdir() if file.is_file()}
    socket, worker = b'data-transport="socket"', b'data-transport="transport.mjs"'
    scripts = ("opened.js", *(("coi.js",) if coi else ()))
    tags = "".join(f'<script src="{name}"></script>\n' for name in scripts).encode()
    html = files["index.html"].replace(socket, worker)
    files["index.html"] = html.replace(b"</head>", tags + b"</head>")
    model, counts = served_model(bundle), step_counts(bundle)
    encoders = {f"{name}_encoder" for name in model.decoders}
    pairs = redraws(bundle, make_recipe(bundle), counts)
    able = bool(pairs) and encoders <= set(bundle.parts)
    facts = page_facts(replace(model, pictures=able, pairs=tuple(pairs)))
    return files | {"page.json": json_bytes(facts | {"step_choices": counts})}
