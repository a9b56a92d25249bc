"""Rows and runs made by hand, and what else the tests of this room share."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.rows import stats
from bench.rows.cell import Cell
from bench.rows.header import Header
from bench.rows.store import ROWS, Row, Run, create_run, make_row


def cell(**columns: Any) -> Cell:
    usual = {
        "model": "tiny-sdxl",
        "weights": "random",
        "backend": "null",
        "options": "",
        "device": "cpu",
        "precision": "fp32",
        "storage": "fp16",
        "size": "64x64",
        "batch": 1,
        "decoder": "taesd",
        "steps": 1,
        "scheduler": "EulerAncestralDiscreteScheduler",
    }
    return Cell(**(usual | columns))


def row(of: Cell, samples: Sequence[float], round_: int = 0, **columns: Any) -> Row:
    """A row as a worker's figures and the parent's context make it."""
    context = {"run": "made", "git_commit": "0" * 40, "git_dirty": False, "bundle_hash": "1" * 64}
    result = {
        "status": "ok",
        **vars(stats.summarise(samples, of.batch)),
        "samples_ms": list(samples),
        "cold_ms": 2.0 * max(samples, default=1.0),
        "stages_ms": {
            "text": 1.0,
            "unet_first": 2.0,
            "unet_step": None,
            "decode": 1.0,
            "rest": 0.5,
            "load": None,
        },
        "nfe": of.steps,
        "load_s": 1.0,
        "compile_s": 0.5,
        "peak_memory_mb": 400.0,
    }
    return make_row(of, round_, context, result | columns)


def make_run(out: Path, rows: Sequence[Row], rounds: int = 1) -> Run:
    """A run folder with these rows, its plan made of their cells."""
    plan = list(dict.fromkeys(Cell.of(one) for one in rows))
    header = Header(
        command=["python", "-m", "bench.sweep"],
        settings={
            "rounds": rounds,
            "min_samples": 3,
            "min_time": 0.1,
            "max_time": 5.0,
            "warmup": 1,
        },
        bundle={"name": "tiny-sdxl", "weights": "random", "dtype": "fp16", "hash": "1" * 64},
        backends={},
        environment={
            "cpu": "A CPU",
            "machine": "0" * 12,
            "cores_allowed": 2,
            "cores_physical": 2,
            "memory_gb": 8.0,
            "os": "Linux",
            "python": "3.11.0",
            "versions": {"torch": "2.13.0"},
        },
        plan=tuple(plan),
        unsaid=frozenset({"git_commit", "git_dirty", "images", "roofline"}),
    )
    made = create_run(out, header)
    (made.path / ROWS).write_text("".join(json.dumps(one) + "\n" for one in rows))
    return made


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether the process ends within `seconds`; a zombie has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
