"""`addbench gates`: what a change must not alter unseen, and no clock is needed for.

UNet evaluations of an image, ONNX operators of every part, bytes of the bundle, parity with torch,
columns of the rows: counted on the default model's bundle and held against a small golden file. A
change that means to alter one of them regenerates the file with --update and shows the difference
in review. Exit code 4 if something differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.cli import Parser, add_model_arguments, run
from core.errors import EXIT_FAILED, EXIT_OK, PreconditionError
from core.files import ROOT, read_json, write_json
from export.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from export.bundle import Bundle

GOLDEN = ROOT / "tests" / "golden" / "gates.json"
STEPS = (1, 2, 4)
UPDATE = "addbench gates --update"


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
    from backends.base import Shapes, parse_backend

    backend = parse_backend("null:text_ms=0,unet_ms=0,decode_ms=0")
    found: dict[str, dict[str, int]] = {}
    for part in bundle.parts:
        if not part.endswith("_decoder"):
            continue
        decoder = part.removesuffix("_decoder")
        with backend.pipeline(bundle, decoder, Shapes(1, *bundle.size)) as pipe:
            found[decoder] = {str(steps): pipe(["a fox"], steps=steps).nfe for steps in STEPS}
    return found


def sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes of every part's graph and weights, and of all files."""
    files = bundle.manifest["files"]
    found = {"bundle": sum(entry["bytes"] for entry in files.values())}
    for name, part in bundle.parts.items():
        found[f"{name} graph"] = files[str(part.graph.relative_to(bundle.path))]["bytes"]
        found[f"{name} weights"] = part.weight_bytes
    return found


def parity(bundle: Bundle) -> dict[str, Any]:
    """The gates themselves, so that nobody loosens one unseen, and what passes them."""
    from backends.check.parity import check

    record = check(bundle, say=lambda _: None)
    return {
        "gate": record["gate"],
        "parts": {name: found["ok"] for name, found in record["parts"].items()},
        "images": {name: found["ok"] for name, found in record["images"].items()},
    }


def schema() -> dict[str, Any]:
    from bench.rows.store import COLUMNS, FLAGS, SCHEMA, STATUSES

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


def differences(golden: Any, found: Any) -> list[str]:
    """What differs, a line each."""
    was, now = dict(flat(golden)), dict(flat(found))
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


def parser() -> Parser:
    top = Parser(prog="addbench gates", description=__doc__)
    add_model_arguments(top, DEFAULT_MODEL)
    what = top.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="the default: 4 if something differs")
    what.add_argument("--update", action="store_true", help="write the golden file anew")
    top.add_argument("--golden", type=Path, default=GOLDEN, help="(tests/golden/gates.json)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from export.bundle import find_bundle

    if not args.update and not args.golden.exists():
        raise PreconditionError(
            f"there is no golden file {args.golden.name}",
            f"{args.golden} is what the gates are held against",
            UPDATE,
        )
    golden = read_json(args.golden) if args.golden.exists() else {}
    found = facts(find_bundle(args.model, args.weights, args.dtype))
    lines = differences(golden, found)
    for line in lines:
        print(line)
    if args.update:
        write_json(args.golden, found)
        print(f"written: {args.golden}, {len(lines)} differences")
        return EXIT_OK
    if lines:
        print(f"{len(lines)} differences; if they are meant: {UPDATE}")
        return EXIT_FAILED
    print(f"gates hold: {len(list(flat(found)))} figures as in {args.golden.name}")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run(main))
