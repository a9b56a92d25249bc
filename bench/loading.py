"""`python -m bench.loading`: what the artifact cache saves when ONNX Runtime loads a part.

cold      the first start: compile into an empty cache, and load what was stored
uncached  a start without a cache, as plain ONNX Runtime does it: optimise in memory, store nothing
warm      every later start: load the cached artifact

Each runs in a fresh process, in turn.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from core.cli import Parser, add_model_arguments, run
from core.errors import EXIT_OK, PreconditionError
from export.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from export.bundle import Bundle


def cold(bundle: Bundle, part: str) -> float:
    """Seconds to a session when the cache is empty."""
    import tempfile

    from backends.base import Shapes
    from backends.ort import OrtBackend

    with tempfile.TemporaryDirectory(dir=bundle.path.parent) as scratch:
        os.environ["ADDBENCH_BUILD"] = scratch  # where the cache lies; this process is its own
        backend = OrtBackend()
        artifact = backend.compile(bundle, part, Shapes(1, *bundle.size))
        with backend.load(bundle, artifact) as session:
            return artifact.compile_s + session.load_s


def uncached(bundle: Bundle, part: str) -> float:
    """Seconds to a session over the graph as the bundle has it, nothing stored."""
    import tempfile

    import onnxruntime

    from backends.ort import MODEL, OrtBackend, session_options
    from export.lower import CPU, lower

    with tempfile.TemporaryDirectory(dir=bundle.path.parent) as scratch:
        started = time.perf_counter()
        lower(bundle.parts[part].graph, CPU, Path(scratch) / MODEL)
        options = session_options(OrtBackend().options, optimise=True)
        onnxruntime.InferenceSession(str(Path(scratch) / MODEL), options)
        return time.perf_counter() - started


def warm(bundle: Bundle, part: str) -> float:
    """Seconds to a session over the artifact, which must be in the cache."""
    from backends.base import Shapes
    from backends.ort import OrtBackend

    backend = OrtBackend()
    artifact = backend.compile(bundle, part, Shapes(1, *bundle.size))
    with backend.load(bundle, artifact) as session:
        return session.load_s


WAYS = {"cold": cold, "uncached": uncached, "warm": warm}


def one(way: str, path: Path, part: str) -> dict[str, float]:
    """In a fresh process: seconds, and the peak memory of the process in MB."""
    from export.bundle import Bundle

    seconds = WAYS[way](Bundle.open(path), part)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(seconds, 2), "peak_memory_mb": round(peak * 1024 / 1e6)}


def parser() -> Parser:
    made = Parser(prog="python -m bench.loading", description=__doc__.split("\n")[0])
    add_model_arguments(made, DEFAULT_MODEL)
    made.add_argument("--part", default="unet")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.rounds < 1:
        raise PreconditionError("--rounds is less than 1", "one is the least", "use --rounds 3")
    from backends.base import Shapes, parse_backend
    from bench.environment import collect
    from core.files import write_json
    from export.bundle import find_bundle

    backend = parse_backend("ort")
    backend.probe().require("ort")
    bundle = find_bundle(args.model, args.weights, args.dtype)
    if args.part not in bundle.parts:
        raise PreconditionError(
            f"{bundle.name} has no part {args.part!r}",
            f"its parts: {', '.join(bundle.parts)}",
            "pass one of these with --part",
        )
    backend.compile(bundle, args.part, Shapes(1, *bundle.size))
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, results in found.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                results.append(pool.submit(one, way, bundle.path, args.part).result())
            print(f"{way}: {results[-1]['seconds']:.1f} s, {results[-1]['peak_memory_mb']} MB")
    medians = {way: median(each["seconds"] for each in many) for way, many in found.items()}
    ratios = {f"warm_over_{way}": round(medians["warm"] / medians[way], 3) for way in WAYS
              if way != "warm"}  # fmt: skip
    for name, ratio in ratios.items():
        over = name.removeprefix("warm_over_")
        print(f"{bundle.name} {args.part}: warm / {over} = {ratio:.2f} (medians of {args.rounds})")
    if args.out:
        record: dict[str, Any] = {
            "schema": 2,
            "model": bundle.name,
            "weights": bundle.weights,
            "part": args.part,
            "bundle_hash": bundle.hash,
            "backend": backend.fingerprint(),
            "environment": collect(),
            "rounds": found,
            **ratios,
        }
        write_json(args.out, record)
        print(f"written to {args.out}")
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(run(main))
