"""The static folder: graphs, weights, modules, runtime and manifest, hashed and sized."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from core.amounts import bytes_text
from core.errors import PreconditionError
from core.files import ROOT, json_bytes, read_json, require_disk, sha256_file, staged_folder
from distill.shapes import WORDS
from export.bundle import MANIFEST, Bundle, Spec, external_locations
from export.lower import Profile, lower
from export.models import DECODERS
from export.web.runtime import PACKAGES, find_tarballs, unpack
from export.web.schedule import constants, require_euler, step_counts

SCHEMA = 1
KIND = "addbench-web"
MODULES = Path(__file__).parent / "modules"
WEB = Profile("web", dtype="float32", attention="matmul", norms="layer", batch=1)
"""The forms that onnxruntime-web's WebGPU kernels all take: Attention and GroupNormalization
are left to the CPU or inlined, and its MultiHeadAttention is less exact."""
PROFILES = {"fp32": WEB, "fp16": replace(WEB, name="web-fp16", dtype="as-is")}
"""Precision of the arithmetic -> profile. Both read the same weights."""
ISOLATION = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of a host that isolate the page: threads of WebAssembly share memory, which browsers give
to no other."""
PART_LIMIT = 2_000_000_000
"""Bytes of a part's weights: an ArrayBuffer holds 2 GB."""
TOTAL_LIMIT = 3_500_000_000
"""Bytes of all parts: WebAssembly addresses 4 GB, the activations among them."""
TOKENS = 77


def build_site(
    bundle: Bundle, out: Path, page: Mapping[str, bytes], ort: Path | None = None
) -> dict[str, Any]:
    """Write the folder of `bundle` to `out`, which is replaced as a whole; return its manifest.

    Args:
        page: files of a page, by name, that draws by `transport.mjs`.
        ort: where the runtime's tarballs lie; None for npm.

    Raises:
        PreconditionError: a browser cannot hold or draw this model, the runtime is not to be had,
            or `out` is another folder than one of these. Nothing is written then.
    """
    require_drawable(bundle)
    require_replaceable(out)
    weights = sum(part.weight_bytes for part in bundle.parts.values())
    require_disk(out.parent, weights + 100_000_000, "the folder for browsers")
    tarballs = find_tarballs(ort)
    with staged_folder(out) as folder:
        for package, tarball in tarballs:
            unpack(package, tarball, folder)
        for module in sorted(MODULES.iterdir()):
            shutil.copyfile(module, folder / module.name)
        for name, content in page.items():
            (folder / name).write_bytes(content)
        parts = {name: write_part(bundle, name, folder) for name in bundle.parts}
        manifest: dict[str, Any] = {
            "kind": KIND,
            "schema": SCHEMA,
            "model": bundle.name,
            "weights": bundle.weights,
            "bundle": bundle.hash,
            "licence": bundle.licence,
            "size": list(bundle.size),
            "vae_scale": bundle.vae_scale,
            "latent_channels": bundle.latent_channels,
            "steps": bundle.steps if bundle.steps in (counts := step_counts(bundle)) else counts[0],
            "prompts": list(bundle.model.prompts),
            "words": sorted(WORDS) if bundle.model.judge == "shapes" else None,
            "precisions": precisions(bundle),
            "decoders": [name for name in DECODERS if f"{name}_decoder" in bundle.parts],
            "scheduler": constants(bundle),
            "tokenizers": list(write_tokenizers(bundle, folder)),
            "parts": parts,
            "runtime": {package.name: package.version for package in PACKAGES},
        }
        notices = copy_notices(folder / "ort")
        (folder / "LICENCES.txt").write_text(licences_text(bundle, notices))
        shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
        manifest["files"] = {
            file.relative_to(folder).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": sha256_file(file),
            }
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        (folder / MANIFEST).write_bytes(json_bytes(manifest))
    return manifest


def require_drawable(bundle: Bundle) -> None:
    """Refuse a bundle that a browser cannot draw, or not hold."""
    require_euler(bundle)
    require_size(bundle)


def require_size(bundle: Bundle) -> None:
    """Refuse what a browser cannot hold, with the numbers."""
    if not bundle.has_graphs:
        raise PreconditionError(
            f"{bundle.path} has no graphs", "its weights are drawn on the device",
            f"addbench export --model {bundle.name} --weights random",
        )  # fmt: skip
    sizes = {name: part.weight_bytes for name, part in bundle.parts.items()}
    total = sum(sizes.values())
    listed = ", ".join(f"{name} {bytes_text(size)}" for name, size in sizes.items())
    next = "serve it instead: addbench serve; a small model fits: shapes-turbo, sd-turbo"
    for name, size in sizes.items():
        if size > PART_LIMIT:
            raise PreconditionError(
                f"a browser cannot hold {name} of {bundle.name}: {bytes_text(size)}",
                f"one buffer holds {bytes_text(PART_LIMIT)} at most ({listed})", next,
            )  # fmt: skip
    if total > TOTAL_LIMIT:
        raise PreconditionError(
            f"a browser cannot hold {bundle.name}: its parts are {bytes_text(total)}",
            f"{bytes_text(TOTAL_LIMIT)} fit beside what is computed ({listed})", next,
        )  # fmt: skip


def require_replaceable(out: Path) -> None:
    """Refuse to replace a folder that is none of these."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if (out / MANIFEST).is_file() and (
        isinstance(old := read_json(out / MANIFEST), dict) and old.get("kind") == KIND
    ):
        return
    raise PreconditionError(
        f"{out} is there and is no folder of `addbench export web`",
        "it would be replaced as a whole",
        "name another folder, or move this one away",
    )


def write_part(bundle: Bundle, name: str, folder: Path) -> dict[str, Any]:
    """Lower a part for each precision over one copy of its weights; return its entry."""
    part, graphs = bundle.parts[name], {}
    (folder / "model").mkdir(exist_ok=True)
    data: list[str] = []
    for precision in precisions(bundle):
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lower-") as scratch:
            lowered = Path(scratch) / "graph.onnx"
            lower(part.graph, PROFILES[precision], lowered)
            locations = sorted(external_locations(lowered))
            file = f"model/{name}.{precision}.onnx"
            shutil.move(lowered, folder / file)
            data = [f"model/{name}.data{number or ''}" for number in range(len(locations))]
            for location, copy in zip(locations, data, strict=True):
                if not (folder / copy).exists():  # a copy: a link would outlive the bundle's
                    shutil.copyfile(Path(scratch) / location, folder / copy)
        graphs[precision] = {
            "file": file,
            "locations": locations,
            "inputs": {spec.name: input_type(spec, precision) for spec in part.inputs},
        }
    return {"graphs": graphs, "data": data}


def precisions(bundle: Bundle) -> list[str]:
    """The precisions of the arithmetic that there are graphs for."""
    return [name for name in PROFILES if name in ("fp32", bundle.dtype)]


def input_type(spec: Spec, precision: str) -> str:
    """The type that a lowered graph takes."""
    return "float32" if spec.dtype == "float16" and precision == "fp32" else spec.dtype


def write_tokenizers(bundle: Bundle, folder: Path) -> Iterator[dict[str, Any]]:
    """Write each encoder's tokenizer; yield its entry: the file, and ids of the marks."""
    (folder / "model").mkdir(exist_ok=True)
    for number, tokenizer in enumerate(bundle.tokenizers()):
        learned = tokenizer.added_tokens_encoder
        if any(f"{token}_1" in learned for token in learned):
            raise PreconditionError(
                f"{bundle.name} cannot be drawn in the browser",
                "it has a learned token of several vectors, which is not read there",
                "export it without --embedding",
            )
        file = f"model/tokenizer{number or ''}.json"
        stored = json.loads(tokenizer.backend_tokenizer.to_str())
        for cut in stored["pre_tokenizer"].get("pretokenizers", ()):
            if cut["type"] == "ByteLevel":  # what CLIP's own cut leaves, this one leaves whole, but
                cut["use_regex"] = False  # for U+FEFF, which is a space to JavaScript alone
        (folder / file).write_text(json.dumps(stored, ensure_ascii=False))
        yield {
            "file": file,
            "length": TOKENS,
            "start": tokenizer.bos_token_id,
            "end": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
        }


def copy_notices(folder: Path) -> str | None:
    """Copy ONNX Runtime's licence and the notices of what is compiled into it, which the browser's
    package leaves out, from its Python package; the version that they are of, or None where that
    is not installed."""
    try:
        package = distribution("onnxruntime")
        files = [package.locate_file(f"onnxruntime/{name}") for name in NOTICES]
        for name, file in zip(NOTICES, files, strict=True):
            shutil.copyfile(str(file), folder / name)
    except (PackageNotFoundError, FileNotFoundError):
        return None
    return package.version


NOTICES = ("LICENSE", "ThirdPartyNotices.txt")
MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this
software and associated documentation files (the "Software"), to deal in the Software without
restriction, including without limitation the rights to use, copy, modify, merge, publish,
distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
"""The text that onnxruntime-web's package refers to and does not hold."""


def licences_text(bundle: Bundle, notices: str | None) -> str:
    """What is in the folder, and under which terms.

    Args:
        notices: the version of ONNX Runtime whose notices lie in ort/; None where none do.
    """
    runtime = "\n".join(
        f"{', '.join(package.files.values())}\n    {package.spec}: {package.licence}"
        for package in PACKAGES
    )
    there = (
        f"in ort/ThirdPartyNotices.txt, which are those of ONNX Runtime {notices}"
        if notices
        else "in ThirdPartyNotices.txt of ONNX Runtime, which is NOT in this folder: the Python\n"
        "package onnxruntime that holds it was not installed when this folder was made. Put it\n"
        "beside the files of ort/ before you pass the folder on"
    )
    return (
        f"model/\n    {bundle.name}: {bundle.licence}\n{runtime}\n"
        "all else\n    addbench: Apache-2.0, see LICENSE\n\n"
        "tokenizers/ is under the text in tokenizers/LICENSE; ort/ under this one, and what is\n"
        f"compiled into it under the terms\n{there}.\n\n"
        f"Copyright (c) Microsoft Corporation\n\n{MIT}"
    )
