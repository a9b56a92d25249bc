"""INT8 and 4-bit weights for backends over onnxruntime's CPU provider.

Options of a backend become a scheme (`scheme_of`); a part is compiled under it (`quantise`): one
image is drawn with the FP32 graphs, every layer is measured on what it read meanwhile, those beyond
the bound stay in FP32, the others are rewritten. Which and why is in `quantisation.json`, beside
the compiled graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.base import Option, UnsupportedError
from core.errors import PreconditionError
from core.files import read_json, write_json
from export.models import CONTEXT_PART
from export.quantize import Scheme, SchemeName, weight_bits

if TYPE_CHECKING:
    from backends.base import Artifact
    from export.bundle import Bundle

RECORD = "quantisation.json"


def bound(text: str) -> float | None:
    """`auto` -> None; `0.05` -> 0.05, a relative error."""
    try:
        value = None if text == "auto" else float(text)
    except ValueError:
        value = math.nan
    if value is not None and not value >= 0:
        raise PreconditionError(
            f"bound={text} is no bound", "it is a relative error: a number of at least 0, or auto",
            "use bound=auto",
        )  # fmt: skip
    return value


OPTIONS: Mapping[str, Option] = {
    "precision": Option(
        "fp32",
        "of products with large weights; int8: activations quantised as they come",
        choices=("fp32", "int8"),
    ),
    "storage": Option(
        "auto",
        "of large weights; int8 or int4 at precision=fp32: in blocks, for a small memory",
        choices=("auto", "int8", "int4"),
    ),
    "block": Option(
        32, "weights with one scale, for storage", int, ("16", "32", "64", "128", "256")
    ),
    "conv": Option("fp32", "of convolutions, at precision=int8", choices=("fp32", "int8")),
    "bound": Option(
        "auto", "largest relative error of a layer that is quantised; others stay in FP32", bound
    ),
}
LIBRARIES = 900 * 10**6
"""Bytes of torch, diffusers and onnxruntime in the process that draws it."""
BOUNDS: Mapping[SchemeName, float] = {
    "dynamic-int8": 0.05,
    "weight-int8": 0.02,
    "weight-int4": 0.15,
}
"""Default of `bound`. The worst layers of shapes-teacher have 0.035, 0.006 and 0.10, the median
0.008, 0.003 and 0.06: what is beyond has outliers."""


def scheme_of(given: Mapping[str, str], options: Mapping[str, Any], isa: str) -> Scheme | None:
    """The scheme that a backend's options ask for; None for none.

    Args:
        given: the options that the user wrote.
        options: all of OPTIONS, with the values that count.
        isa: as `core.isa.isa` writes it.

    Raises:
        UnsupportedError: options that do not go together.
    """
    name = _scheme_name(options["precision"], options["storage"])
    blocks, dynamic = name in ("weight-int8", "weight-int4"), name == "dynamic-int8"
    for key, used, wanted in (
        ("block", blocks, "storage=int8 or storage=int4"),
        ("conv", dynamic, "precision=int8"),
        ("bound", name is not None, "precision=int8, storage=int8 or storage=int4"),
    ):
        if key in given and not used:
            raise UnsupportedError(
                f"{key}={given[key]} has nothing to act on", f"it goes with {wanted}",
                f"add {wanted}, or drop {key}",
            )  # fmt: skip
    if name is None:
        return None
    bound = BOUNDS[name] if options["bound"] is None else options["bound"]
    if dynamic:
        return Scheme(name, weight_bits(isa), bound, convolutions=options["conv"] == "int8")
    return Scheme(name, 4 if name == "weight-int4" else 8, bound, options["block"])


def _scheme_name(precision: str, storage: str) -> SchemeName | None:
    if precision == "int8" and storage == "int4":
        raise UnsupportedError(
            "precision=int8 does not go with storage=int4",
            "4-bit weights are computed with in FP32",
            "drop storage=int4 to be fast, or precision=int8 to be small",
        )
    if precision == "int8":
        return "dynamic-int8"
    names: Mapping[str, SchemeName] = {"int8": "weight-int8", "int4": "weight-int4"}
    return names.get(storage)


def quantise(job: Mapping[str, Any], graph: Path, out: Path) -> None:
    """Child process: the lowered `graph` of a part as `out`, and the record of its layers.

    Args:
        job: `bundle` and `part`; `folder` of the artifact; `options` of the backend; `scheme`, the
            fields of a Scheme.
    """
    from backends.quantised.recording import measure
    from export.lower.storage import reopen
    from export.quantize.layers import find_layers
    from export.quantize.rewrite import rewrite

    scheme = Scheme(**job["scheme"])
    threads = job["options"]["threads"]
    # The halves of a UNet have its layers between them, by the same names.
    part = "unet" if job["part"] == CONTEXT_PART else job["part"]
    measured = measure(Path(job["bundle"]), part, scheme, out.parent, threads)
    here = {layer.name for layer in find_layers(reopen(graph), scheme)}
    layers = {name: found for name, found in measured.items() if name in here}
    taken = {name for name, found in layers.items() if found["error"] <= scheme.bound}
    rewrite(graph, scheme, taken, out, own=job["options"]["products"] == "linear")
    record = {
        "scheme": asdict(scheme),
        "quantised": len(taken),
        "left_out": sorted(layers.keys() - taken),
        "layers": layers,
    }
    write_json(Path(job["folder"]) / RECORD, record)


def weight_bytes(bundle: Bundle, part: str, scheme: Scheme) -> int:
    """Return a compiled part's weight bytes, no layer left out; of half a UNet the whole's."""
    from export.quantize.layers import sizes

    return sizes(bundle.source(part).graph, scheme).weights


def recording_bytes(bundle: Bundle, part: str, scheme: Scheme) -> int:
    """Peak memory of drawing one image with the FP32 graphs, one weight at a time in FP32.

    Weights that are mapped from their file count as available.
    """
    from export.quantize.layers import sizes

    return 2 * sizes(bundle.source(part).graph, scheme).activations + LIBRARIES


def remark(artifact: Artifact) -> str:
    """What the record of a compiled part says, in a line."""
    if artifact.path is None or not (artifact.path / RECORD).exists():
        return ""
    record = read_json(artifact.path / RECORD)
    scheme, layers = record["scheme"], record["layers"]
    if not layers:
        return f"{scheme['name']}: it has no layer to quantise"
    worst = max(
        (one["error"] for one in layers.values() if one["error"] <= scheme["bound"]), default=0
    )
    return (
        f"{scheme['name']}, {scheme['bits']} bits: {record['quantised']} of {len(layers)} layers,"
        f" relative errors up to {worst:.3f}; {len(record['left_out'])} stay in FP32, beyond"
        f" {scheme['bound']:g}: {RECORD}"
    )
