"""Two revisions of the code on the same cells: prepared, measured in alternating rounds, judged."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from backends.pipeline.session import decoders
from bench.rows.store import create_run
from bench.run import revisions
from bench.run.orders import HEAD, Trial
from bench.run.plan import Candidate, Plan, plan_of, probe
from bench.run.progress import Display
from bench.run.request import Request
from bench.run.revisions import WORKTREE, Say
from bench.run.runner import Runner, Seat, Side, sigterm_as_ctrl_c
from bench.verdict.outcome import Outcome
from bench.verdict.rules import PAIR_PROOF
from bench.worker import PROTOCOL
from core.errors import PreconditionError
from core.files import ROOT
from export.bundle import MANIFEST, Bundle
from export.models import MODELS

SHOWN = 6
"""Differences of two environments that are listed in a note."""


def measure(
    request: Request,
    asked: Sequence[str],
    runs: Path,
    command: Sequence[str],
    *,
    max_slowdown: float,
    budget_s: float,
    timeout_s: float,
    extra: str,
    work: Path | None,
    say: Say = print,
) -> Outcome:
    """Everything from two revisions to a verdict.

    Args:
        request: its model is exported by each revision for itself; a bundle's folder serves both.
        asked: base and head.
        runs: the folder that the two runs are made in.
        extra: of pyproject.toml, for the revisions' environments.
        work: keeps checkouts, bundles and caches for the next time; None: a scratch folder.
        say: prints a line of progress.
    """
    say(f"comparing revisions of {ROOT}")
    commits = [revisions.resolve(revision) for revision in asked]
    protocols = [revisions.protocol_of(commit) for commit in commits]
    if any(protocol != PROTOCOL for protocol in protocols):
        return unknown_protocol(asked, commits, protocols, max_slowdown)
    for revision, commit in zip(asked, commits, strict=True):
        pictured = any(strength < 1 for strength in request.strengths)
        if pictured and revisions.file_at(commit, "bench/run/pictures.py") is None:
            raise PreconditionError(
                f"--strength does not go with {revision}",
                "that revision draws from text alone, and would measure that",
                "drop --strength, or compare revisions that start from pictures",
            )
        cell = revisions.file_at(commit, "bench/rows/cell.py") or ""
        if any(request.negatives) and "negative" not in cell:
            raise PreconditionError(
                f"--negative does not go with {revision}",
                "that revision measures without negative prompts",
                "drop --negative, or compare revisions that have it",
            )
    candidates = probe(request.backends)
    for candidate in candidates:
        if candidate.provenance != "measured":
            raise PreconditionError(
                f"--backend {candidate.key} has no speed to compare",
                f"its figures are {candidate.provenance}: no clock gives them",
                "compare backends that run on this machine",
            )
    with sigterm_as_ctrl_c(), ExitStack() as stack:
        place = stack.enter_context(revisions.workplace(work))
        pair = revisions.sides(asked, commits, place, extra, say)
        bundles = [prepare(side, request, candidates, place, say) for side in pair]
        planned = plan_of(request, candidates, bundles[HEAD])
        sides = [
            side_of(revision, replace(planned, bundle=bundle), pair, runs, command)
            for revision, bundle in zip(pair, bundles, strict=True)
        ]
        cells, rounds = sides[HEAD].plan.cells, request.method.rounds
        display = Display(2 * rounds * len(cells), rounds)
        trial = Trial(cells, rounds, max_slowdown, budget_s, say=say, more=display.more)
        with Runner(sides, display, timeout_s=timeout_s) as runner:
            runner.measure(trial.turns(), trial.note)
        notes = notes_on(pair, bundles, extra)
    notes.append(f"rows: {' (base), '.join(side.run.name for side in sides)} (head)")
    disturbed = sum("disturbed" in row["flags"] for row in trial.rows.values())
    if disturbed:
        notes.append(f"{disturbed} of {len(trial.rows)} rows were disturbed by other processes")
    base, head = map(str, pair)
    return Outcome(base, head, rule_text(max_slowdown), trial.lines, notes)


def side_of(
    revision: revisions.Revision,
    plan: Plan,
    pair: Sequence[revisions.Revision],
    runs: Path,
    command: Sequence[str],
) -> Side:
    """A revision's plan, its run, made here like that of a sweep, and the seat of its workers."""
    if revision.interpreter != Path(sys.executable):  # its packages, not those of this process
        versions = {"versions": revision.versions()}
        plan = replace(plan, environment={**plan.environment, **versions})
    commit = {"git_commit": revision.recorded, "git_dirty": revision.revision == WORKTREE}
    said = {"side": revision.name, "commits": [each.recorded for each in pair]}
    run = create_run(runs, plan.header(command, **commit, ab=said))
    seat = Seat(revision.interpreter, revision.tree, revision.build, commit)
    return Side(plan, run, revision.name, seat)


def rule_text(limit: float) -> str:
    return (
        f"slower: over alternating rounds the Hodges-Lehmann estimate is above {limit:+.0%} and its"
        f" one-sided 95% bound above {PAIR_PROOF:+.0%}, and so again when measured once more."
        " Intervals: both one-sided 95% bounds."
    )


def unknown_protocol(
    asked: Sequence[str], commits: Sequence[str], protocols: Sequence[object], limit: float
) -> Outcome:
    """The outcome where a revision's worker does not speak this version's protocol."""
    notes = [
        f"{revision} ({commit[:9]}) speaks worker protocol {protocol}; this version speaks"
        f" {PROTOCOL}, and so nothing was measured"
        for revision, commit, protocol in zip(asked, commits, protocols, strict=True)
        if protocol != PROTOCOL
    ]
    return Outcome(asked[0], asked[1], rule_text(limit), [], notes)


def absolute(text: str) -> str:
    """A folder as it is meant here: the export runs in another one. A name stays a name."""
    path = Path(text).expanduser()
    named = text in (*MODELS, "hub", "folder", "random")
    return str(path.resolve()) if path.is_dir() and not named else text


def prepare(
    side: revisions.Revision,
    request: Request,
    candidates: Sequence[Candidate],
    place: Path,
    say: Say,
) -> Bundle:
    """The bundle that one side measures; its cache filled, so that no round pays for a compile."""
    log = place / f"{side.name}.log"
    revisions.check_code(side, log)
    if Path(request.model, MANIFEST).is_file():
        folder = Path(request.model).absolute()
    else:
        say(f"{side.name} {side}: exporting {request.model}")
        asked = ["--model", absolute(request.model), "--dtype", request.dtype or "fp16"]
        asked += ["--weights", absolute(request.weights)] if request.weights else []
        folder = revisions.export(side, asked, log)
    bundle = Bundle.open(folder)
    kept = [each for each in candidates if each.backend and each.backend.keeps_artifacts]
    if kept:
        say(f"{side.name} {side}: compiling")
        backends = [piece for each in kept for piece in ("--backend", each.text)]
        axes = ["--batch", ",".join(map(str, request.batches))]
        axes += ["--decoder", ",".join(request.decoders or decoders(bundle))]
        # Whether it works is for the workers to say, cell by cell.
        side.python("-m", "backends", "compile", "--model", str(folder), *backends, *axes, log=log)
    return bundle


def notes_on(
    pair: Sequence[revisions.Revision], bundles: Sequence[Bundle], extra: str
) -> list[str]:
    """What a reader of the verdict should know of the two sides."""
    notes = []
    if pair[0].commit == pair[1].commit:
        notes.append("both are one commit: whatever differs is noise")
    if bundles[0].hash != bundles[1].hash:
        notes.append("the bundles differ in content: the change is in what is exported")
    if pair[0].interpreter != pair[1].interpreter:
        lines = revisions.differences([side.commit for side in pair], extra)
        more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        notes.append(
            f"the constraints differ ({', '.join(lines[:SHOWN])}{more}): each side ran in an"
            " environment of its own"
        )
    if WORKTREE not in [side.revision for side in pair] and revisions.changed():
        notes.append(
            "uncommitted changes were not measured: --head WORKTREE measures the working tree"
        )
    return notes
