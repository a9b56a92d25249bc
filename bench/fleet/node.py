"""What runs on a machine of a fleet: all of it today's own functions, in that machine's checkout.

The driver names these functions and sends their arguments; the code is never sent.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.machine.environment import git_state
from bench.rows.cell import Cell
from bench.rows.header import Header
from bench.run import spawn
from bench.run.plan import Plan, plan
from bench.run.request import Request
from bench.run.resume import Here, here_of
from core.errors import AddbenchError, PreconditionError
from core.files import ROOT, build_root, sha256_file, sha256_json
from export.bundle import MANIFEST, Bundle, export_again, find_bundle

ROOMS = ("core", "distill", "export", "backends", "serve", "bench", "addbench")
LOG_BYTES = 1 << 18
"""How much of a worker's log, its end, comes to the driver."""


@dataclass(frozen=True)
class CodeState:
    """Which code a checkout measures with.

    Attributes:
        commit: `git_commit` and `git_dirty` of its rows.
        code: the hash of every module: two checkouts with changes differ in it, or do not.
    """

    commit: dict[str, Any]
    code: str

    @property
    def text(self) -> str:
        """The commit, whether it holds changes, and the code's hash, short."""
        commit = (self.commit["git_commit"] or "no commit")[:12]
        return f"{commit}{' with changes' * bool(self.commit['git_dirty'])}, code {self.code[:12]}"


def revision() -> CodeState:
    """The revision of the checkout that this runs in."""
    files = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    code = sha256_json({str(file.relative_to(ROOT)): sha256_file(file) for file in files})
    return CodeState(git_state(), code)


@dataclass(frozen=True)
class Home:
    """Where a machine's workers run: its interpreter and its checkout."""

    interpreter: Path
    root: Path


def home() -> Home:
    """The place that this runs in."""
    return Home(Path(sys.executable), ROOT)


def once(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """The one result of a call, as a fleet takes it."""
    yield function(*arguments)


def planned(request: Request, bundle: Bundle) -> Plan:
    """What a request comes to on this machine, of a bundle equal to the driver's."""
    path = str(bundle_here(bundle).path)
    return plan(replace(request, model=path, weights=None, dtype=None))


def reopened(header: Header, bundle: Bundle) -> Here:
    """What a run that is gone on with finds on this machine."""
    return here_of(header, {"model": str(bundle_here(bundle).path)})


def bundle_here(wanted: Bundle) -> Bundle:
    """The bundle of the same content on this machine: at the same path, as one that lies in the
    build folder, or exported again as its manifest says.

    Raises:
        AddbenchError: it cannot be exported here.
        PreconditionError: what was exported here is another.
    """
    again = build_root() / "fleet" / wanted.hash[:12]
    for folder in (wanted.path, again):
        if (folder / MANIFEST).is_file() and (bundle := Bundle.open(folder)).hash == wanted.hash:
            return bundle
    try:
        bundle = find_bundle(wanted.name, wanted.weights, wanted.dtype, wanted.size)
    except PreconditionError:
        bundle = exported(wanted, again)
    if bundle.hash != wanted.hash and bundle.path != again:
        bundle = exported(wanted, again)
    if bundle.hash != wanted.hash:
        theirs, ours = wanted.manifest["files"], bundle.manifest["files"]
        differing = sorted(
            name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)
        )
        raise PreconditionError(
            f"bundle {wanted.name} exported on this machine is another",
            f"its hash is {bundle.hash[:12]} and not {wanted.hash[:12]};"
            f" {len(differing)} files differ: {', '.join(differing[:3])}",
            "put the bundle where all machines see it, and name its folder: --model PATH",
        )
    return bundle


def exported(wanted: Bundle, target: Path) -> Bundle:
    """The bundle that its manifest's request gives on this machine, in `target`."""
    words = shlex.split(export_again(wanted))
    words[words.index("--out") + 1] = str(target)
    done = subprocess.run(
        [sys.executable, "-m", "export", *words[2:]], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise AddbenchError(
            f"bundle {wanted.name} could not be exported on this machine",
            said[-1],
            "put the bundle where all machines see it, and name its folder: --model PATH",
        )
    return Bundle.open(target)


# ---- a group


@dataclass(frozen=True)
class LogEnd:
    """The end of what a group's workers wrote to stderr."""

    text: str


class Unwatched:
    """A `spawn.View` that nobody looks at."""

    redraws = False

    def loading(self, cells: Sequence[Cell], round_: int) -> None: ...
    def begin(self, cell: Cell) -> None: ...
    def sampled(self, count: int, captions: int | None) -> None: ...
    def tick(self) -> None: ...


def measured(job: spawn.Job, timeout_s: float) -> Iterator[tuple[Cell, spawn.Result] | LogEnd]:
    """Every cell of a group with its result, as each is done, and the log at the end."""
    with tempfile.TemporaryDirectory(prefix="addbench-") as folder:
        log = Path(folder) / job.log.name
        here = replace(job, log=log)
        yield from spawn.results(here, spawn.Limits(timeout_s, None), Unwatched())
        yield LogEnd(log.read_bytes()[-LOG_BYTES:].decode(errors="replace"))
