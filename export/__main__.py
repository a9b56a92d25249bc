"""`addbench export`: a checkpoint becomes a bundle, one ONNX graph for each part."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.cli import Parser, image_size, natural, run
from core.errors import EXIT_FAILED, EXIT_OK, AddbenchError, PreconditionError
from core.files import ROOT, read_json
from export.models import DEFAULT_MODEL, MODELS, Model, default_weights, find_model

if TYPE_CHECKING:
    from rich.console import Console

    from export.request import ExportRequest


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["verify"]:  # `python -m export verify`, for `addbench verify`
        from export import verify

        return verify.main(arguments[1:])
    return _export(parser().parse_args(arguments))


def parser() -> Parser:
    top = Parser(
        prog="addbench export",
        description="Export a checkpoint to a bundle: one ONNX graph for each part.",
        epilog="`addbench verify BUNDLE` hashes a bundle again.",
    )
    top.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|PATH",
        help=f"{', '.join(MODELS)}, or a folder or .safetensors file of an SDXL-like or SD-like"
        " checkpoint"
        " (default: %(default)s)",
    )
    top.add_argument(
        "--weights",
        metavar="hub|folder|random|ORG/NAME[@REVISION]|PATH",
        help="the model's own hub repository, what ships with the checkout, random numbers, "
        "another repository, or a folder in diffusers format or one .safetensors file (default: "
        "the first of folder, hub and random that the model has)",
    )
    top.add_argument(
        "--dtype", default="fp16", choices=("fp16", "fp32"), help="of the weights (default: fp16)"
    )
    for flag, what in (
        ("--vae", "AutoencoderKL"),
        ("--taesd", "AutoencoderTiny"),
        ("--unet", "UNet2DConditionModel"),
    ):
        says = f"{what} to use instead of the model's: a folder, or one .safetensors file"
        says += ", or taesd_decoder.pth" * (flag == "--taesd")
        top.add_argument(flag, metavar="ID|PATH", help=says)
    top.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE|ID[:WEIGHT]",
        help="LoRA weights to fuse, repeatable; the bundle's name says so",
    )
    top.add_argument(
        "--variant",
        metavar="NAME",
        help="of the weights' files, such as fp16 or non_ema (default: that of --dtype, else any)",
    )
    top.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE|ID[:TOKEN]",
        help="learned vectors of a token (textual inversion), repeatable",
    )
    top.add_argument(
        "--clip-skip",
        type=natural,
        default=0,
        metavar="LAYERS",
        help="layers of the text encoders to leave out, as diffusers counts them (others count the"
        " last layer too: their 2 is 1 here)",
    )
    top.add_argument(
        "--size",
        type=image_size,
        metavar="PIXELS|WxH",
        help="of the images, which the graphs are made for (default: the model's)",
    )
    top.add_argument("--seed", type=int, default=0, help="of random weights (default: 0)")
    top.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="the bundle's own folder (default: build/<model>-<weights>-<dtype>[-<size>])",
    )
    top.add_argument("--force", action="store_true", help="export again what is there already")
    top.add_argument(
        "--no-parity", action="store_true", help="skip the comparison with torch in FP32"
    )
    top.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read .bin files where there is no safetensors; reading a pickle RUNS CODE that is in "
        "the file: only for files whose origin you trust",
    )
    return top


def _export(args: argparse.Namespace) -> int:
    from filelock import FileLock, Timeout
    from rich.console import Console

    from export.bundle import bundle_path
    from export.request import make_request

    console = Console(file=sys.stdout)
    model, weights = _model_and_weights(args.model, args.weights)
    request = make_request(
        model, weights, args.vae, args.taesd, args.seed, args.allow_pickle, args.unet, args.lora,
        args.embedding, args.variant, args.clip_skip,
    )  # fmt: skip
    width, height = args.size or (model.size, model.size)
    size = width if width == height else f"{width}x{height}"
    asked = {"dtype": args.dtype, "size": size} | request.as_dict()
    named = "+".join([model.name, *(lora.name for lora in request.loras)])
    named = "+".join([named, *(embedding.name for embedding in request.embeddings)])
    named += f"+clip-skip-{request.clip_skip}" if request.clip_skip else ""
    other = None if size == model.size else (width, height)
    kind = request.weights.kind.replace("file", "folder")
    target: Path = args.out or bundle_path(named, kind, args.dtype, other)
    target = target.expanduser().absolute()
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"another export is making {target.name}: waiting for it", soft_wrap=True)
        lock.acquire()
    except OSError as error:
        raise PreconditionError(
            f"{target.parent} cannot be written",
            str(error),
            "name another folder with --out, or set ADDBENCH_BUILD",
        ) from error
    try:
        if _is_there(target, model, asked, args.force):
            print(f"{target} is there already and matches: nothing to do (--force exports again)")
            return EXIT_OK if args.no_parity or _vouched(target) else _parity(target)
        _build(args.dtype, model, request, (width, height), asked, target, console)
    finally:
        lock.release()
    print(f"bundle: {target}")
    return EXIT_OK if args.no_parity else _parity(target)


def _build(
    dtype: str,
    model: Model,
    request: ExportRequest,
    size: tuple[int, int],
    asked: dict[str, Any],
    target: Path,
    console: Console,
) -> None:
    from export.request import require_size
    from export.source.checkpoint import open_request

    named = "".join(f" + the terms of {lora.name}" for lora in request.loras)
    console.print(f"licence: {model.licence}{named}", soft_wrap=True, highlight=False)
    if model.licence_notice:
        console.print(f"  {model.licence_notice}", soft_wrap=True, highlight=False)
    checkpoint = open_request(model, request, dtype)
    require_size(model, checkpoint.multiple, *size)
    for note in checkpoint.notes:
        console.print(note, soft_wrap=True, highlight=False)
    with console.status("loading torch"):
        from export.build import ExportPlan, build_bundle
    build_bundle(ExportPlan(checkpoint, dtype, *size, asked), target, console)


def _model_and_weights(model: str, weights: str | None) -> tuple[Model, str]:
    """What `--model` and `--weights` mean together."""
    from export.request import FILES, find_place, infer_file, infer_model

    path = Path(model).expanduser()
    is_file = path.is_file() or path.suffix in FILES
    if model in MODELS or not (path.is_dir() or is_file or "/" in model):
        entry = find_model(model)
        return entry, weights or default_weights(entry)
    if weights not in (None, "folder"):
        raise PreconditionError(
            f"--model {model} is a folder and --weights {weights} names another checkpoint",
            "with a folder as the model, the weights are those in it",
            f"leave --weights out, or write --model {next(iter(MODELS))} --weights {weights}",
        )
    if is_file:
        find_place(str(path), "--model", files=True)
        return infer_file(path), str(path)
    return infer_model(path), str(path)


def _is_there(target: Path, model: Model, asked: dict[str, Any], force: bool) -> bool:
    """Whether `target` is a whole bundle of what is asked for. Raises when it is of something else.

    Imports no torch: every verb of the Makefile that needs a bundle asks this first.
    """
    from export.bundle import MANIFEST, Bundle
    from export.request import CHANGED, differences

    if not target.exists():
        return False
    if not (target / MANIFEST).is_file():
        raise PreconditionError(
            f"{target} is there and is not a bundle",
            f"it holds no {MANIFEST}; an export would replace the whole folder",
            "name another folder with --out, or move this one away",
        )
    if force:
        return False
    try:
        bundle = Bundle.open(target)
    except PreconditionError as error:
        print(f"{error.what} ({error.why}): exporting it again", file=sys.stderr)
        return False
    words = differences(bundle.manifest["request"], {"model": model.name} | asked)
    if words == [CHANGED] and asked["weights"]["path"] == model.folder is not None:
        print(f"{target.name}: {CHANGED}: exporting it again", file=sys.stderr)
        return False  # they ship with the checkout, and came with a newer one
    if words:
        raise PreconditionError(
            f"{target} holds another bundle",
            "; ".join(words),
            "replace it with --force, or name another folder with --out",
        )
    return True


def _vouched(target: Path) -> bool:
    """Whether parity is on record for this very bundle, and passed; read without torch."""
    from export.bundle import PARITY, Bundle

    try:
        record = read_json(target / PARITY)
    except (OSError, AddbenchError):
        return False
    known = (record.get("bundle_hash"), record.get("backend"), record.get("ok"))
    return known == (Bundle.open(target).hash, "ort", True)


def _parity(bundle: Path) -> int:
    """Compare the bundle with torch, in a process of its own. Its exit code is the command's."""
    sys.stdout.flush()
    command = [sys.executable, "-m", "backends.commands.parity", "--model", str(bundle)]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        print(
            f"parity failed with exit code {code}: the bundle {bundle} is complete, its numbers are"
            f" not vouched for\n  next: addbench parity --model {bundle}",
            file=sys.stderr,
        )
    return code if code >= 0 else EXIT_FAILED  # a negative one is a signal


if __name__ == "__main__":
    raise SystemExit(run(main))
