"""`addbench export triton BUNDLE OUT`: a model repository for NVIDIA's Triton Inference Server."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.cli import Parser, count
from core.errors import EXIT_OK, PreconditionError

if TYPE_CHECKING:
    from export.bundle import Bundle

MARK = "# written by addbench export triton"
NAME = re.compile(r"[\w.-]{1,100}", re.ASCII)


def parser() -> Parser:
    top = Parser(prog="addbench export triton", description=__doc__)
    top.add_argument(
        "bundle", metavar="BUNDLE", help="a bundle's folder, or the model whose bundle it is"
    )
    top.add_argument("out", type=Path, metavar="OUT", help="the repository; other models stay")
    top.add_argument("--weights", help="hub, random or folder: which bundle of that model")
    top.add_argument("--dtype", choices=("fp16", "fp32"), help="weights' dtype")
    top.add_argument("--backend", default="ort", metavar="NAME[:KEY=VALUE,...]", help="(ort)")
    top.add_argument("--decoder", metavar="vae|taesd", help="(the best there is)")
    top.add_argument("--name", type=model_name, metavar="NAME", help="of the model (the bundle's)")
    top.add_argument(
        "--batch", type=count, default=4, metavar="N", help="pictures drawn together at most (4)"
    )
    top.add_argument("--queue", type=count, metavar="N", help="requests that may wait (4 batches)")
    top.add_argument(
        "--form", choices=("python", "onnx"), default="python",
        help="one model that runs the backend itself, or a model for each part, which Triton's ONNX"
        " Runtime runs, and one that asks them (python)",
    )  # fmt: skip
    top.add_argument(
        "--environment", type=Path, metavar="FOLDER",
        help="of the environment that holds addbench, where it is not Triton's own Python",
    )  # fmt: skip
    return top


def model_name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: letters, digits, _ . and -")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from backends.pipeline.session import check_decoder, decoders
    from backends.registry import parse_backend
    from core.files import staged_folder
    from export.bundle import find_bundle
    from serve.artist import one_batch_only
    from serve.triton.parts import part_model, parts_of, write_part

    if args.form == "onnx" and args.backend != "ort":
        raise PreconditionError(
            "--backend does not fit --form onnx", "Triton's own ONNX Runtime runs the parts then",
            "drop one of them",
        )  # fmt: skip
    backend = parse_backend(args.backend)
    if backend.interpreter is not None:
        raise PreconditionError(
            f"backend {backend.name} does not run in Triton",
            "it needs an environment of its own beside addbench's",
            "take ort, openvino or torch",
        )
    bundle = find_bundle(args.bundle, args.weights, args.dtype)
    decoder = args.decoder or decoders(bundle)[0]
    check_decoder(bundle, decoder)
    if args.batch > 1 and one_batch_only(backend, bundle):
        raise PreconditionError(
            f"{args.backend} draws batches of one size alone",
            "its graphs are compiled for it, and Triton joins as many as wait", "pass --batch 1",
        )  # fmt: skip
    name = args.name or bundle.name
    out: Path = args.out.expanduser().absolute()
    config = config_text(
        bundle, name, args.backend, decoder,
        batch=args.batch, queue=args.queue or 4 * args.batch, environment=args.environment,
        form=args.form,
    )  # fmt: skip
    parts = parts_of(bundle, decoder) if args.form == "onnx" else ()
    for folder in (out / name, *(out / part_model(name, part) for part in parts)):
        require_ours(folder)
    write(bundle, out / name, config)
    for part in parts:
        with staged_folder(out / part_model(name, part)) as staged:
            write_part(bundle, part, name, staged, MARK)
    print(f"licence: {bundle.licence}")
    print(f"{out / name}: config.pbtxt, 1/model.py and the bundle")
    print(f"  next: tritonserver --model-repository={out}")
    return EXIT_OK


def require_ours(folder: Path) -> None:
    """Refuse to replace a folder that this command did not write."""
    there = folder / "config.pbtxt"
    if folder.exists() and not (there.is_file() and there.read_text().startswith(MARK)):
        raise PreconditionError(
            f"{folder} is there and was not written by `addbench export triton`",
            "it would be replaced as a whole", "pass another --name, or move it away",
        )  # fmt: skip


def write(bundle: Bundle, folder: Path, config: str) -> None:
    """Write the folder of the model that is asked for pictures."""
    import shutil

    from core.files import require_disk, staged_folder

    size = sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())
    require_disk(folder.parent, size, "Triton's repository")
    with staged_folder(folder) as staged:
        version = staged / "1"
        version.mkdir()
        shutil.copyfile(Path(__file__).with_name("model.py"), version / "model.py")
        shutil.copytree(bundle.path, version / "bundle")
        (staged / "config.pbtxt").write_text(config)


def config_text(
    bundle: Bundle,
    name: str,
    backend: str,
    decoder: str,
    *,
    batch: int,
    queue: int,
    environment: Path | None,
    form: str = "python",
) -> str:
    """Return the model's config.pbtxt: prompt in, picture out, requests joined as they come."""
    width, height = bundle.size
    parameters = {"backend": backend, "decoder": decoder, "steps": str(bundle.steps),
                  "form": form}  # fmt: skip
    if environment is not None:
        parameters["EXECUTION_ENV_PATH"] = str(environment.expanduser().absolute())
    said = "\n".join(
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
        for key, value in parameters.items()
    )
    return f"""{MARK}
name: {json.dumps(name)}
backend: "python"
max_batch_size: {batch}
input [
  {{ name: "prompt" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "seed" data_type: TYPE_INT64 dims: [ 1 ] optional: true }},
  {{ name: "steps" data_type: TYPE_INT32 dims: [ 1 ] optional: true }}
]
output [
  {{ name: "image" data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] }}
]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
dynamic_batching {{
  max_queue_delay_microseconds: 0
  default_queue_policy {{ max_queue_size: {queue} }}
}}
{said}
"""
