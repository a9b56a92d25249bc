"""The timing cache: how long each kernel took here. Kept on disk, so that a rebuild is quick.

One file for each TensorRT version and GPU. Processes that build at the same time add to it
together: each merges what is on disk into its own before it writes.
"""

from __future__ import annotations

from pathlib import Path

import tensorrt as trt
from filelock import FileLock

from backends.tensorrt.log import Log
from core.files import write_atomic


def attach(config: trt.IBuilderConfig, path: Path, log: Log) -> None:
    """Let the build that `config` describes use what `path` holds; a bad file counts as empty."""
    with lock(path):
        known = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        log.write(
            f"the timing cache {path.name} is not used: damaged, or of another GPU or version"
        )
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def keep(config: trt.IBuilderConfig, path: Path) -> None:
    """After a build: write what it measured, merged with what others wrote meanwhile."""
    cache = config.get_timing_cache()
    with lock(path):
        theirs = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
        if theirs is not None:
            cache.combine(theirs, ignore_mismatch=False)
        write_atomic(path, bytes(memoryview(cache.serialize())))


def lock(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))
