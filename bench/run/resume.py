"""What of an interrupted run is still to measure, and whether it may be measured here and now."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.rows.cell import Cell
from bench.rows.fields import OK
from bench.rows.store import Run, open_run, run_names
from bench.run.plan import Candidate, Settings, probe
from core.cli import image_size
from core.errors import PreconditionError
from export.models import SCHEDULERS

if TYPE_CHECKING:
    from export.bundle import Bundle


@dataclass(frozen=True)
class Rest:
    """A run and the (cell, round) pairs it still lacks."""

    run: Run
    bundle: Bundle
    candidates: Sequence[Candidate]
    settings: Settings
    work: Sequence[tuple[Cell, int]]


def reopen(args: argparse.Namespace) -> Rest:
    """The rest of an earlier run, if everything that its rows must share still holds.

    Raises:
        PreconditionError: the bundle, the machine, the packages, or a flag given now differs from
            what the run began with; all differences are named.
    """
    from bench.machine.environment import collect, git_state
    from export.bundle import find_bundle

    given = {"--precision": args.precision, "--device": args.device, "--no-images": args.no_images}
    for flag in (flag for flag, value in given.items() if value):
        raise PreconditionError(
            f"{flag} does not go with --resume",
            "a run goes on with the backends that it began with",
            f"drop {flag}, or start a new run",
        )
    old = open_run(args.resume, args.out)
    if old.header.versus is not None:
        raise PreconditionError(
            f"run {old.name} is one side of a pair",
            "finished on its own it would not be interleaved with the other",
            f"addbench versus --resume {old.name}",
        )
    if not old.header.images:
        raise PreconditionError(
            f"run {old.name} is modelled without images",
            "all of it takes seconds, and nothing in it can be lost",
            "start it again: " + " ".join(map(str, old.header.command)),
        )
    made = old.header.bundle
    settings = Settings.of(old.header.settings)
    candidates = probe(list(old.header.backends))
    bundle = find_bundle(
        args.model or made["name"],
        args.weights or (None if args.model else made["weights"]),
        args.dtype or (None if args.model else made["dtype"]),
        image_size(old.plan[0].size),
    )
    here = collect()
    known = old.header.environment
    refuse_changes(
        old.name,
        [
            ("the bundle's hash", made["hash"][:12], bundle.hash[:12]),
            ("the machine", known["machine"], here["machine"]),
            ("the packages' versions", known["versions"], here["versions"]),
            *axis_changes(args, old, settings),
        ],
    )
    began, now = old.header.git_commit, git_state()["git_commit"]
    if began != now:  # a commit may have changed nothing that is measured
        note = (
            f"note: run {old.name} began at commit {began}, this is {now}; each row names its own"
        )
        print(note, file=sys.stderr)
    rows = old.rows()
    work = old.missing(rows)
    if args.retry_failed:
        work += [(Cell.of(row), row["round"]) for row in rows if row["status"] != OK]
        order = {cell: place for place, cell in enumerate(old.plan)}
        work.sort(key=lambda item: (item[1], order[item[0]]))
    return Rest(old, bundle, candidates, settings, work)


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


def axis_changes(
    args: argparse.Namespace, old: Run, settings: Settings
) -> list[tuple[str, Any, Any]]:
    """(flag, value of the run, value asked for now) of every flag that was given."""
    plan = old.plan
    had: dict[str, Any] = {
        "backend": list(dict.fromkeys(cell.backend_text for cell in plan)),
        "steps": list(dict.fromkeys(cell.steps for cell in plan)),
        "batch": list(dict.fromkeys(cell.batch for cell in plan)),
        "decoder": list(dict.fromkeys(cell.decoder for cell in plan)),
        "size": image_size(plan[0].size),
        "scheduler": list(dict.fromkeys(cell.scheduler for cell in plan)),
        "guidance": plan[0].guidance,
        "guidance_mode": list(dict.fromkeys(cell.guidance_mode for cell in plan)),
        "low_memory": list(dict.fromkeys(cell.low_memory for cell in plan)),
        "quality": 0,
        **settings.columns(),
    }
    given = {name: getattr(args, name) for name in had}
    if given["backend"] is not None:
        given["backend"] = [candidate.key for candidate in probe(given["backend"])]
    if given["scheduler"] is not None:
        given["scheduler"] = [SCHEDULERS.get(name, name) for name in given["scheduler"]]
    return [
        (f"--{name.replace('_', '-')}", had[name], value)
        for name, value in given.items()
        if value is not None
    ]


def open_pair(text: str, out: Path) -> list[Run]:
    """The runs of base and head of `addbench versus`, from either one's name."""
    found = open_run(text, out)
    said = found.header.versus
    if said is None:
        raise PreconditionError(
            f"run {found.name} is not of bench.commands.versus",
            "its header names no other side",
            f"addbench sweep --resume {found.name}",
        )
    if said["side"] == "head":
        return [open_run(said["base"], found.path.parent), found]
    for name in run_names(found.path.parent):
        head = open_run(name, found.path.parent)
        if (head.header.versus or {}).get("base") == found.name:
            return [found, head]
    raise PreconditionError(
        f"run {found.name} is the base of a pair whose head is gone",
        "no run beside it names it as its base",
        "measure the pair again",
    )


def unfinished(target: Run) -> list[tuple[Cell, int]]:
    """(cell, round) pairs that are missing or not ok."""
    rows = target.rows()
    bad = [(Cell.of(row), row["round"]) for row in rows if row["status"] != OK]
    return [*target.missing(rows), *bad]
