"""What of an interrupted run is still to measure, and whether it may be measured here and now."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.cell import Cell
from bench.plan import Candidate, Settings, probe
from bench.store import OK, Run, open_run
from core.errors import PreconditionError

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
    from bench.environment import collect
    from export.bundle import find_bundle

    old = open_run(args.resume, args.out)
    made = old.header["bundle"]
    settings = Settings.of(old.header["settings"])
    candidates = probe(list(old.header["backends"]))
    bundle = find_bundle(
        args.model or made["name"],
        args.weights or (None if args.model else made["weights"]),
        args.dtype or (None if args.model else made["dtype"]),
    )
    here = collect()
    known = old.header["environment"]
    changes = [
        f"{name} was {was!r} and is {now!r}"
        for name, was, now in (
            ("the bundle's hash", made["hash"][:12], bundle.hash[:12]),
            ("the machine", known["machine"], here["machine"]),
            ("the packages' versions", known["versions"], here["versions"]),
            *axis_changes(args, old, settings),
        )
        if was != now
    ]
    if changes:
        raise PreconditionError(
            f"run {old.name} cannot be resumed",
            "; ".join(changes),
            "start a new run, or repeat the command without what differs (--model PATH if the"
            " bundle lies elsewhere)",
        )
    rows = old.rows()
    work = old.missing(rows)
    if args.retry_failed:
        work += [(Cell.of(row), row["round"]) for row in rows if row["status"] != OK]
        order = {cell: place for place, cell in enumerate(old.plan)}
        work.sort(key=lambda item: (item[1], order[item[0]]))
    return Rest(old, bundle, candidates, settings, work)


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
        "size": plan[0].size,
        **settings.columns(),
    }
    given = {name: getattr(args, name) for name in had}
    if given["backend"] is not None:
        given["backend"] = [candidate.key for candidate in probe(given["backend"])]
    return [
        (f"--{name.replace('_', '-')}", had[name], value)
        for name, value in given.items()
        if value is not None
    ]
