"""Figures that a change must not alter unseen, and no clock is needed for.

UNet evaluations of an image, ONNX operators of every part, bytes of the bundle, parity with torch,
columns of the rows, counted on a bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from backends.base import Shapes
from backends.check.parity import check
from backends.registry import parse_backend
from bench.rows.fields import COLUMNS, FLAGS, SCHEMA, STATUSES
from export.bundle import Bundle

STEPS = (1, 2, 4)


def facts(bundle: Bundle) -> dict[str, Any]:
    """Everything that is gated, as JSON.

    Raises:
        AddbenchError: the bundle misses parity.
    """
    return {
        "bundle": {"model": bundle.name, "weights": bundle.weights, "dtype": bundle.dtype},
        "nfe": evaluations(bundle),
        "ops": {name: dict(sorted(part.ops.items())) for name, part in bundle.parts.items()},
        "bytes": sizes(bundle),
        "parity": parity(bundle),
        "rows": schema(),
    }


def evaluations(bundle: Bundle) -> dict[str, dict[str, int]]:
    """UNet evaluations of an image by decoder and steps, counted in a pipeline as they happen.

    On the scripted device: the pipeline is the real one, only the parts compute nothing.
    """
    backend = parse_backend("null:text_ms=0,unet_ms=0,decode_ms=0")
    counted: dict[str, dict[str, int]] = {}
    for part in bundle.parts:
        if not part.endswith("_decoder"):
            continue
        decoder = part.removesuffix("_decoder")
        with backend.pipeline(bundle, decoder, Shapes(1, *bundle.size)) as pipe:
            prompt = bundle.model.prompts[0]
            counted[decoder] = {str(steps): pipe(prompt, steps=steps).nfe for steps in STEPS}
    return counted


def sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes of every part's graph and weights, and of all files."""
    files = bundle.manifest["files"]
    counted = {"bundle": sum(entry["bytes"] for entry in files.values())}
    for name, part in bundle.parts.items():
        counted[f"{name} graph"] = files[str(part.graph.relative_to(bundle.path))]["bytes"]
        counted[f"{name} weights"] = part.weight_bytes
    return counted


def parity(bundle: Bundle) -> dict[str, Any]:
    """The gates themselves, so that nobody loosens one unseen, and what passes them."""
    record = check(bundle, say=lambda _: None)
    return {
        "gate": record["gate"],
        "parts": {name: entry["ok"] for name, entry in record["parts"].items()},
        "images": {name: entry["ok"] for name, entry in record["images"].items()},
    }


def schema() -> dict[str, Any]:
    """The columns of a row, and the values that its status and flags can take."""
    return {
        "schema": SCHEMA,
        "columns": list(COLUMNS),
        "statuses": list(STATUSES),
        "flags": list(FLAGS),
    }


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of a JSON value; a list is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def differences(golden: Any, counted: Any) -> list[str]:
    """What differs, a line each."""
    was, now = dict(flat(golden)), dict(flat(counted))
    lines = []
    for path in sorted({*was, *now}):
        if path not in now:
            lines.append(f"{path}: gone, was {was[path]}")
        elif path not in was:
            lines.append(f"{path}: new, {now[path]}")
        elif isinstance(was[path], list) and isinstance(now[path], list):
            lines += [f"{path}: {item} is gone" for item in was[path] if item not in now[path]]
            lines += [f"{path}: {item} is new" for item in now[path] if item not in was[path]]
            if was[path] != now[path] and sorted(was[path]) == sorted(now[path]):
                lines.append(f"{path}: the order differs")
        elif was[path] != now[path]:
            lines.append(f"{path}: {was[path]} -> {now[path]}")
    return lines
