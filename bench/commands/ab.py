"""`addbench ab --base REV`: did a change make it slower?

Checks two revisions out side by side, each with a bundle and a cache of its own, and measures the
same cells on both in alternating order, every round in fresh processes. What the machine does to
both cancels; what looks slower is measured once more.

Exit code 0: no regression. 3: a cell is slower. 4: cells failed or are missing. 5: inconclusive.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.rows.cell import Cell
from bench.rows.header import Header
from bench.rows.store import RUNS, Row, RowWriter, Run, create_run, make_row
from bench.run.arguments import AXES, calls, count, positive, shown
from bench.sweep import bundle_columns, interrupt, unavailable
from bench.verdict.outcome import Outcome, show
from core.cli import Parser, add_format_argument, int_list, run, word_list
from core.errors import PreconditionError
from export.models import DEFAULT_MODEL, MODELS

if TYPE_CHECKING:
    from bench.run.plan import Candidate, Settings
    from bench.run.revisions import Side
    from export.bundle import Bundle

ROUNDS, BUDGET_MIN = 10, 30.0
SHOWN = 6
"""Differences of two environments that are listed in a note."""
METHOD = {"min_samples": 5, "min_time": 1.0, "max_time": 20.0, "warmup": 1}


def parser() -> Parser:
    from core.cli import share

    top = Parser(
        prog="addbench ab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = top.add_argument_group("which revisions")
    what.add_argument("--base", required=True, metavar="REV", help="what to compare with")
    what.add_argument("--head", default="HEAD", metavar="REV", help="the change (HEAD)")
    axes = top.add_argument_group("what to measure")
    axes.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME|PATH",
        help="each revision exports it for itself; the folder of a bundle serves both as it is",
    )  # fmt: skip
    axes.add_argument("--weights", metavar="hub|random|ORG/NAME|PATH", help="as for the export")
    axes.add_argument("--dtype", default="fp16", choices=("fp16", "fp32"), help="(fp16)")
    axes.add_argument(
        "--backend", action="append", metavar="NAME[:KEY=VALUE,...]", help="repeatable (ort)"
    )
    axes.add_argument("--steps", type=int_list, metavar="1,2,4")
    axes.add_argument("--batch", type=int_list, default=AXES["batch"], metavar="1,4")
    axes.add_argument("--decoder", type=word_list, default=AXES["decoder"], metavar="vae,taesd")
    how = top.add_argument_group("how to measure")
    how.add_argument("--rounds", type=count, default=ROUNDS, help="of both sides (10)")
    how.add_argument("--max-slowdown", type=share, default=None, metavar="8%", help="limit (8%%)")
    how.add_argument(
        "--budget", type=positive, default=BUDGET_MIN, metavar="MINUTES",
        help="for measuring; cuts cells, never rounds (30)",
    )  # fmt: skip
    how.add_argument("--min-samples", type=count, default=METHOD["min_samples"], help="(5)")
    how.add_argument("--min-time", type=positive, default=METHOD["min_time"], metavar="S")
    how.add_argument("--max-time", type=positive, default=METHOD["max_time"], metavar="S")
    how.add_argument("--warmup", type=calls, default=METHOD["warmup"], metavar="N")
    how.add_argument("--timeout", type=positive, default=1800.0, metavar="S", help="(1800)")
    where = top.add_argument_group("where")
    where.add_argument("--extra", default="cpu", help="of pyproject.toml, for environments (cpu)")
    where.add_argument(
        "--work", type=Path, metavar="FOLDER",
        help="keep checkouts, bundles and caches here for the next time (none: a scratch folder)",
    )  # fmt: skip
    where.add_argument("--out", type=Path, default=RUNS, help="runs land below it (results/runs)")
    add_format_argument(where)
    return top


def say(text: str) -> None:
    """Progress goes to stderr: stdout is the result, for a file or a summary."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        outcome = measure(args, arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    show(outcome, args.format)
    return outcome.exit_code


def measure(args: argparse.Namespace, arguments: Sequence[str]) -> Outcome:
    """Everything from two revisions to a verdict."""
    from bench.run import revisions as sides
    from bench.run.plan import default_steps, make_cells, probe
    from bench.verdict.rules import PAIR_ROUNDS, PAIR_SLOWDOWN
    from bench.worker import PROTOCOL

    if args.rounds < PAIR_ROUNDS:
        raise PreconditionError(
            f"--rounds {args.rounds} is too few",
            f"no rule holds its error rate with fewer than {PAIR_ROUNDS} rounds",
            f"use --rounds {ROUNDS}",
        )
    settings = settings_of(args)
    limit = args.max_slowdown or PAIR_SLOWDOWN
    revisions = (args.base, args.head)
    commits = [sides.resolve(revision) for revision in revisions]
    protocols = [sides.protocol_of(commit) for commit in commits]
    if any(protocol != PROTOCOL for protocol in protocols):
        return unknown_protocol(revisions, commits, protocols, limit)
    candidates = probe(args.backend or ["ort"])
    for candidate in candidates:
        if candidate.provenance != "measured":
            raise PreconditionError(
                f"--backend {candidate.key} has no speed to compare",
                f"its figures are {candidate.provenance}: no clock gives them",
                "compare backends that run on this machine",
            )
    with ExitStack() as stack:
        place = stack.enter_context(sides.workplace(args.work))
        pair = sides.sides(revisions, commits, place, args.extra, say)
        bundles = [prepare(side, args, candidates, place) for side in pair]
        cells = make_cells(
            bundles[1],
            candidates,
            batches=args.batch,
            decoders=args.decoder,
            steps=args.steps or default_steps(bundles[1].model),
        )
        duel = Duel(pair, bundles, candidates, settings, args.timeout)
        duel.open(args.out, cells, arguments, stack)
        notes = notes_on(pair, bundles, args.extra)
        return duel.judge(cells, limit, args.budget * 60, notes)


def settings_of(args: argparse.Namespace) -> Settings:
    from bench.run.plan import Settings

    if args.max_time < args.min_time:
        raise PreconditionError(
            f"--max-time {args.max_time:g} is below --min-time {args.min_time:g}",
            "a cell cannot take at least one and at most the other",
            "raise --max-time or lower --min-time",
        )
    return Settings.of({"rounds": args.rounds} | {name: getattr(args, name) for name in METHOD})


def rule_text(limit: float) -> str:
    from bench.verdict.rules import PAIR_PROOF

    return (
        f"slower: over alternating rounds the Hodges-Lehmann estimate is above {limit:+.0%} and its"
        f" one-sided 95% bound above {PAIR_PROOF:+.0%}, and so again when measured once more."
        " Intervals: both one-sided 95% bounds."
    )


def unknown_protocol(
    revisions: Sequence[str], commits: Sequence[str], protocols: Sequence[object], limit: float
) -> Outcome:
    from bench.worker import PROTOCOL

    notes = [
        f"{revision} ({commit[:9]}) speaks worker protocol {protocol}; this version speaks"
        f" {PROTOCOL}, and so nothing was measured"
        for revision, commit, protocol in zip(revisions, commits, protocols, strict=True)
        if protocol != PROTOCOL
    ]
    return Outcome(revisions[0], revisions[1], rule_text(limit), [], notes)


def given(text: str) -> str:
    """A folder as it is meant here: the export runs in another one. A name stays a name."""
    path = Path(text).expanduser()
    named = text in (*MODELS, "hub", "folder", "random")
    return str(path.resolve()) if path.is_dir() and not named else text


def prepare(
    side: Side, args: argparse.Namespace, candidates: Sequence[Candidate], place: Path
) -> Bundle:
    """The bundle that one side measures; its cache filled, so that no round pays for a compile."""
    from bench.run import revisions as sides
    from export.bundle import MANIFEST, Bundle

    log = place / f"{side.name}.log"
    sides.check_code(side, log)
    if Path(args.model, MANIFEST).is_file():
        folder = Path(args.model).absolute()
    else:
        say(f"{side.name} {side}: exporting {args.model}")
        asked = ["--model", given(args.model), "--dtype", args.dtype]
        asked += ["--weights", given(args.weights)] if args.weights else []
        folder = sides.export(side, asked, log)
    bundle = Bundle.open(folder)
    kept = [each for each in candidates if each.backend and each.backend.keeps_artifacts]
    if kept:
        say(f"{side.name} {side}: compiling")
        backends = [piece for each in kept for piece in ("--backend", each.text)]
        axes = ["--batch", ",".join(map(str, args.batch)), "--decoder", ",".join(args.decoder)]
        # Whether it works is for the workers to say, cell by cell.
        side.python("-m", "backends", "compile", "--model", str(folder), *backends, *axes, log=log)
    return bundle


def notes_on(pair: Sequence[Side], bundles: Sequence[Bundle], extra: str) -> list[str]:
    from bench.run import revisions as sides

    notes = []
    if pair[0].commit == pair[1].commit:
        notes.append("both are one commit: whatever differs is noise")
    if bundles[0].hash != bundles[1].hash:
        notes.append("the bundles differ in content: the change is in what is exported")
    if pair[0].interpreter != pair[1].interpreter:
        lines = sides.differences([side.commit for side in pair], extra)
        more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        notes.append(
            f"the constraints differ ({', '.join(lines[:SHOWN])}{more}): each side ran in an"
            " environment of its own"
        )
    if pair[1].revision == "HEAD" and sides.uncommitted():
        notes.append("uncommitted changes were not measured")
    return notes


class Duel:
    """Two sides with their bundles and run folders: gives a `Trial` its rows."""

    redraws = False

    def __init__(
        self,
        pair: Sequence[Side],
        bundles: Sequence[Bundle],
        candidates: Sequence[Candidate],
        settings: Settings,
        timeout_s: float,
    ) -> None:
        self.pair, self.bundles, self.settings = pair, bundles, settings
        self.candidates = {candidate.key: candidate for candidate in candidates}
        self.timeout_s = timeout_s
        self.runs: list[Run] = []
        self.writers: list[RowWriter] = []

    def open(
        self, out: Path, cells: Sequence[Cell], arguments: Sequence[str], stack: ExitStack
    ) -> None:
        """A run folder for each side, like those of a sweep; the head's is the latest."""
        from bench.machine.environment import collect, with_hardware

        environment = with_hardware(collect(), self.candidates.values())
        for side, bundle in zip(self.pair, self.bundles, strict=True):
            header = Header(
                command=["python", "-m", "bench.commands.ab", *shown(arguments)],
                settings=self.settings.columns(),
                bundle=bundle_columns(bundle),
                backends={
                    key: {
                        "usable": candidate.found.usable,
                        "version": candidate.found.version,
                        "what": candidate.found.what,
                    }
                    for key, candidate in self.candidates.items()
                },
                environment=environment | self.versions(side),
                git_commit=side.commit,
                git_dirty=False,
                plan=tuple(cells),
                ab={"side": side.name, "commits": [each.commit for each in self.pair]},
                unsaid=frozenset({"images", "roofline"}),
            )
            self.runs.append(create_run(out, header))
            self.writers.append(stack.enter_context(RowWriter(self.runs[-1].path)))

    def versions(self, side: Side) -> dict[str, Any]:
        """A side's own, where it does not run in this environment."""
        return {} if side.interpreter == Path(sys.executable) else {"versions": side.versions()}

    def judge(
        self, cells: Sequence[Cell], limit: float, budget_s: float, notes: Sequence[str]
    ) -> Outcome:
        from bench.run.orders import Trial

        trial = Trial(cells, self.settings.rounds, self.rows, limit, budget_s, say=say)
        lines = trial.run()
        disturbed = sum("disturbed" in row["flags"] for row in trial.rows.values())
        found = [f"rows: {' (base), '.join(target.name for target in self.runs)} (head)"]
        if disturbed:
            found.append(f"{disturbed} of {len(trial.rows)} rows were disturbed by other processes")
        base, head = map(str, self.pair)
        return Outcome(base, head, rule_text(limit), lines, [*notes, *found])

    def rows(self, side: int, group: Sequence[Cell], round_: int) -> Iterator[tuple[Cell, Row]]:
        """Measure a group on one side in a fresh process; each row on disk as it comes."""
        from bench.run.spawn import Job, Limits, results

        place, bundle, target = self.pair[side], self.bundles[side], self.runs[side]
        context = {
            "run": target.name,
            "bundle_hash": bundle.hash,
            "git_commit": place.commit,
            "git_dirty": False,
        }
        candidate = self.candidates[group[0].backend_text]
        if not candidate.found.usable or candidate.backend is None:
            for cell in group:
                yield cell, make_row(cell, round_, context, unavailable(candidate))
            return
        name = f"{candidate.key}-{group[0].decoder}-b{group[0].batch}-r{round_}"
        job = Job(
            bundle=bundle.path,
            backend=candidate.text,
            interpreter=candidate.backend.interpreter or place.interpreter,
            cells=group,
            round=round_,
            rule=self.settings.rule,
            log=target.path / "logs" / f"{name.replace(':', '-').replace('/', '-')}.log",
            root=place.tree,
            build=place.build,
            home=place.interpreter,
        )
        with closing(results(job, Limits(self.timeout_s, None), self)) as stream:
            for cell, result in stream:
                row = make_row(cell, round_, context, result)
                self.writers[side].append(row)
                yield cell, row

    # ---- spawn.View: `Trial` says what is being measured

    def loading(self, cells: Sequence[Cell], round_: int) -> None: ...
    def begin(self, cell: Cell) -> None: ...
    def sampled(self, count: int) -> None: ...
    def tick(self) -> None: ...


if __name__ == "__main__":
    raise SystemExit(run(main))
