"""What of an interrupted run is still to measure, and whether it may be measured here and now."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine.environment import collect, git_state
from bench.rows.cell import Cell
from bench.rows.fields import OK
from bench.rows.header import Header
from bench.rows.store import Run, open_run, run_names
from bench.run.plan import Candidate, Plan, probe
from bench.run.request import Sampling
from core.cli import image_size
from core.errors import PreconditionError
from export.bundle import Bundle, find_bundle
from export.models import SCHEDULERS


@dataclass(frozen=True)
class Here:
    """What a run that is gone on with finds on the machine that measures it."""

    candidates: tuple[Candidate, ...]
    bundle: Bundle
    environment: Mapping[str, Any]


def here_of(header: Header, given: Mapping[str, Any]) -> Here:
    """The backends, the bundle and the environment of this machine for a run's rest.

    Args:
        given: `model`, `weights`, `dtype`, where they are asked for.

    Raises:
        PreconditionError: none of its backends can be used, or there is no such bundle.
    """
    began = header.bundle
    own = {} if "model" in given else {name: began[name] for name in ("weights", "dtype")}
    bundle = find_bundle(
        given.get("model", began["name"]),
        given.get("weights", own.get("weights")),
        given.get("dtype", own.get("dtype")),
        image_size(header.plan[0].size),
    )
    return Here(tuple(probe(list(header.backends))), bundle, collect())


def reopen(
    run: Run, given: Mapping[str, Any], *, retry_failed: bool = False, there: Here | None = None
) -> Plan:
    """The rest of an earlier run, if everything that its rows must share still holds.

    Args:
        given: fields of a `Request` and of its method that are asked for now, by name; each must
            be what the run has.
        retry_failed: what failed is left to measure too.
        there: what was found on the machine that measures; None for this one.

    Raises:
        PreconditionError: the bundle, the machine, the packages, or a field differs from what the
            run began with; all differences are named.
    """
    for name in ("precision", "devices", "images"):
        flag = {"devices": "--device", "images": "--no-images"}.get(name, f"--{name}")
        if name in given:
            raise PreconditionError(
                f"{flag} does not go with --resume",
                "a run goes on with the backends that it began with",
                f"drop {flag}, or start a new run",
            )
    if not run.header.images:
        raise PreconditionError(
            f"run {run.name} is modelled without images",
            "all of it takes seconds, and nothing in it can be lost",
            "start it again: " + again_text(run.header.command),
        )
    method = Sampling.of(run.header.settings)
    here, began = there or here_of(run.header, given), run.header.environment
    now_is = here.environment
    refuse_changes(
        run.name,
        [
            ("the bundle's hash", run.header.bundle["hash"][:12], here.bundle.hash[:12]),
            ("the machine", began["machine"], now_is["machine"]),
            ("the packages' versions", began["versions"], now_is["versions"]),
            *axis_changes(run, method, given),
        ],
    )
    then, now = run.header.git_commit, git_state()["git_commit"]
    if then != now:  # a commit may have changed nothing that is measured
        note = f"note: run {run.name} began at commit {then}, this is {now}; each row names its own"
        print(note, file=sys.stderr)
    work = unfinished(run) if retry_failed else run.missing()
    return Plan(
        here.bundle,
        here.candidates,
        tuple(run.plan),
        method,
        began,
        roofline=run.header.roofline,
        rest=tuple(work),
    )


def again_text(command: Sequence[str]) -> str:
    """A header's command to be typed again; what its cut paths were is for a person to know."""
    cut = " (with the paths that ... stands for)" if any(".../" in word for word in command) else ""
    return shlex.join(command) + cut


def refuse_changes(name: str, compared: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse to go on with run `name` where one of (what, was, is) differs; all are named."""
    changes = [f"{what} was {was!r} and is {now!r}" for what, was, now in compared if was != now]
    if changes:
        raise PreconditionError(
            f"run {name} cannot be resumed",
            "; ".join(changes),
            "start a new run, or repeat the command without what differs (--model PATH if the"
            " bundle lies elsewhere)",
        )


FLAGS = {
    "backends": "backend",
    "batches": "batch",
    "decoders": "decoder",
    "schedulers": "scheduler",
    "guidance_modes": "guidance-mode",
    "encoders": "encoder",
    "strengths": "strength",
    "negatives": "negative",
}
"""Fields of a `Request` that the command line names in the singular."""


def axis_changes(
    run: Run, method: Sampling, given: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """(flag, value of the run, value asked for now) of every field that is asked for."""
    plan = run.plan

    def values(column: str) -> list[Any]:
        return list(dict.fromkeys(getattr(cell, column) for cell in plan))

    had: dict[str, Any] = {
        "backends": values("backend_text"),
        "steps": values("steps"),
        "batches": values("batch"),
        "decoders": values("decoder"),
        "size": image_size(plan[0].size),
        "schedulers": values("scheduler"),
        "guidance": plan[0].guidance,
        "guidance_modes": values("guidance_mode"),
        "low_memory": values("low_memory"),
        "encoders": values("encoder"),
        "strengths": values("strength"),
        "negatives": values("negative"),
        "quality": 0,
        "frames": 0,
        **method.columns(),
    }
    asked = {
        name: list(value) if isinstance(value, list | tuple) and name != "size" else value
        for name, value in given.items()
    }
    if "backends" in asked:
        asked["backends"] = [each.key for each in probe(asked["backends"])]
    if "schedulers" in asked:
        asked["schedulers"] = [SCHEDULERS.get(name, name) for name in asked["schedulers"]]
    return [
        (f"--{FLAGS.get(name, name.replace('_', '-'))}", was, asked[name])
        for name, was in had.items()
        if name in asked
    ]


def open_single(text: str, runs: Path) -> Run:
    """A run that is no side of a pair: those are gone on with together."""
    run = open_run(text, runs)
    for verb in ("versus", "ab"):
        if getattr(run.header, verb) is not None:
            raise PreconditionError(
                f"run {run.name} is one side of a pair",
                "finished on its own it would not be interleaved with the other",
                f"addbench versus --resume {run.argument}"
                if verb == "versus"
                else "measure the two revisions again with `addbench ab`",
            )
    return run


def open_pair(text: str, runs: Path) -> list[Run]:
    """The runs of base and head of `addbench versus`, from either one's name."""
    named = open_run(text, runs)
    said = named.header.versus
    if said is None:
        raise PreconditionError(
            f"run {named.name} is not of `addbench versus`",
            "its header names no other side",
            f"addbench sweep --resume {named.argument}",
        )
    folder = named.path.parent
    if said["side"] == "head":
        return [open_run(said["base"], folder), named]
    for name in run_names(folder):
        head = open_run(name, folder)
        if (head.header.versus or {}).get("base") == named.name:
            return [named, head]
    raise PreconditionError(
        f"run {named.name} is the base of a pair whose head is gone",
        "no run beside it names it as its base",
        "measure the pair again",
    )


def unfinished(run: Run) -> list[tuple[Cell, int]]:
    """(cell, round) pairs that are missing or not ok, in the order of measurement."""
    rows = run.rows()
    bad = [(Cell.of(row), row["round"]) for row in rows if row["status"] != OK]
    place = {cell: number for number, cell in enumerate(run.plan)}
    return sorted([*run.missing(rows), *bad], key=lambda item: (item[1], place[item[0]]))
