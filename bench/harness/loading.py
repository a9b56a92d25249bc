"""What the artifact cache saves when ONNX Runtime loads a part.

cold      the first start: compile into an empty cache, and load what was stored
uncached  a start without a cache, as plain ONNX Runtime does it: optimise in memory, store nothing
warm      every later start: load the cached artifact from disk, as after a reboot
again     at once after that: its weights are still in memory, in the system's page cache

Each runs in a fresh process, in turn; `cold` and `uncached` read the bundle from disk.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from core.errors import PreconditionError
from core.process import run_apart

if TYPE_CHECKING:
    from export.bundle import Bundle


def cold(bundle: Bundle, part: str) -> float:
    """Seconds to a session when the cache is empty."""
    import tempfile

    from backends.base import Shapes
    from backends.ort import OrtBackend

    drop(bundle.path)
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

    from backends.onnxrt.session import MODEL, session_options
    from backends.ort import OrtBackend
    from export.lower import lower

    drop(bundle.path)
    with tempfile.TemporaryDirectory(dir=bundle.path.parent) as scratch:
        started = time.perf_counter()
        backend = OrtBackend()
        lower(bundle.parts[part].graph, backend.profile(part), Path(scratch) / MODEL)
        options = session_options(backend.options, optimise=True)
        onnxruntime.InferenceSession(str(Path(scratch) / MODEL), options)
        return time.perf_counter() - started


def warm(bundle: Bundle, part: str) -> float:
    """Seconds to a session over the artifact, which must be in the cache, from disk."""
    return again(bundle, part, from_disk=True)


def again(bundle: Bundle, part: str, from_disk: bool = False) -> float:
    """Seconds to a session over the artifact, which must be in the cache, as `warm` left it."""
    from backends.base import Shapes
    from backends.ort import OrtBackend

    backend = OrtBackend()
    artifact = backend.compile(bundle, part, Shapes(1, *bundle.size))
    if from_disk and artifact.path:
        drop(artifact.path)
    with backend.load(bundle, artifact) as session:
        return session.load_s


def drop(folder: Path) -> None:
    """The files below leave the page cache."""
    from core.memory import drop_cached

    for file in folder.rglob("*"):
        if file.is_file():
            drop_cached(file)


WAYS = {"cold": cold, "uncached": uncached, "warm": warm, "again": again}


def one(way: str, path: Path, part: str) -> dict[str, float]:
    """Measure one way in a fresh process: seconds, and its peak memory in MB.

    Or the peak of a process that it compiled in, where that is higher.
    """
    from export.bundle import Bundle

    seconds = WAYS[way](Bundle.open(path), part)
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(one).ru_maxrss for one in whose)
    return {"seconds": round(seconds, 2), "peak_memory_mb": round(peak * 1024 / 1e6)}


def compare_ways(
    bundle: Bundle, part: str, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds and memory of every way in turn, and their ratios, as a record.

    Raises:
        PreconditionError: ONNX Runtime is missing, or the bundle has no such part.
    """
    from backends.base import Shapes
    from backends.registry import parse_backend
    from bench.machine.environment import subject

    backend = parse_backend("ort")
    backend.probe().require("ort")
    if part not in bundle.parts:
        raise PreconditionError(
            f"{bundle.name} has no part {part!r}",
            f"its parts: {', '.join(bundle.parts)}",
            "pass one of these with --part",
        )
    backend.compile(bundle, part, Shapes(1, *bundle.size))
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, figures in results.items():
            figures.append(run_apart(one, way, bundle.path, part))
            say(f"{way}: {figures[-1]['seconds']:.1f} s, {figures[-1]['peak_memory_mb']} MB")
    medians = {way: median(each["seconds"] for each in figures) for way, figures in results.items()}
    ratios = {}
    for later, first in product(("warm", "again"), ("cold", "uncached")):
        ratio = ratios[f"{later}_over_{first}"] = round(medians[later] / medians[first], 3)
        say(f"{bundle.name} {part}: {later} / {first} = {ratio:.2f} (medians of {rounds})")
    return {"schema": 3, **subject(bundle, backend), "part": part, "rounds": results, **ratios}
