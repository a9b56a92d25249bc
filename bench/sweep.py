"""`addbench sweep`: plan cells, measure each in a worker, keep every row as it comes.

Exit code 0 if every planned cell has an ok row; 4 if one failed or is missing; 2 if nothing could
start; 130 after Ctrl-C. A run that ended early is finished with --resume.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from bench.rows.cell import Cell
from bench.rows.fields import OK
from bench.rows.header import Header
from bench.rows.store import RUNS, Row, RowWriter, Run, make_row
from bench.run.arguments import AXES, check_arguments, parser, settings_of, shown
from bench.run.plan import Candidate, Settings
from core.cli import run
from core.errors import EXIT_FAILED, EXIT_OK

if TYPE_CHECKING:
    from bench.run.progress import Display
    from bench.run.spawn import Limits
    from export.bundle import Bundle


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(arguments)
    check_arguments(args)
    sweep = reopened(args) if args.resume else plan_new(args, arguments)
    if args.dry_run:
        return sweep.describe()
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return sweep.run(args.timeout, args.budget, not (args.quick or args.no_roofline))
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM ends a sweep as Ctrl-C does: worker ended, terminal restored."""
    raise KeyboardInterrupt


def plan_new(args: argparse.Namespace, arguments: Sequence[str]) -> Sweep:
    from backends.registry import with_precision
    from bench.run.cardrows import bundle_for, with_devices
    from bench.run.plan import default_steps, make_cells, probe

    settings = settings_of(args)
    texts = [with_precision(text, args.precision) for text in args.backend or ["ort"]]
    candidates = probe(with_devices(texts, args.device or ()))
    bundle = bundle_for(args, candidates)
    if settings.rule.quality:
        from bench.run.quality import require_judge

        require_judge(bundle.name)
    cells = make_cells(
        bundle,
        candidates,
        batches=args.batch or AXES["batch"],
        decoders=args.decoder or AXES["decoder"],
        steps=args.steps or default_steps(bundle.model),
        schedulers=args.scheduler or (),
        guidance=args.guidance,
        guidance_modes=args.guidance_mode or (),
        low_memory=args.low_memory or [False],
    )
    from bench.machine.environment import collect, git_state, with_hardware

    header = Header(
        command=["python", "-m", "bench.sweep", *shown(arguments)],
        settings=settings.columns(),
        images=not args.no_images,
        bundle=bundle_columns(bundle),
        backends={
            candidate.key: {
                "usable": candidate.found.usable,
                "version": candidate.found.version,
                "what": candidate.found.what,
                "options": candidate.backend.effective_options() if candidate.backend else {},
            }
            for candidate in candidates
        },
        environment=with_hardware(collect(), candidates),
        **git_state(),
        plan=tuple(cells),
    )
    work = [(cell, round_) for round_ in range(settings.rounds) for cell in cells]
    return Sweep(bundle, candidates, settings, work, args.out, header)


def resume_words(target: Run) -> str:
    """The flags that go on with a run."""
    folder = target.path.parent
    out = "" if folder.resolve() == RUNS.resolve() else f" --out {folder}"
    return f"--resume {target.name}{out}"


def bundle_columns(bundle: Bundle) -> dict[str, Any]:
    return {
        "name": bundle.name,
        "weights": bundle.weights,
        "dtype": bundle.dtype,
        "licence": bundle.licence,
        "hash": bundle.hash,
    }


def reopened(args: argparse.Namespace) -> Sweep:
    from bench.run.resume import reopen

    rest = reopen(args)
    return Sweep(
        rest.bundle, rest.candidates, rest.settings, rest.work, args.out, rest.run.header, rest.run
    )


class Sweep:
    """The (cell, round) pairs to measure, and all that is needed to measure them."""

    def __init__(
        self,
        bundle: Bundle,
        candidates: Sequence[Candidate],
        settings: Settings,
        work: Sequence[tuple[Cell, int]],
        out: Path,
        header: Header,
        old: Run | None = None,
    ) -> None:
        self.bundle, self.settings, self.work = bundle, settings, list(work)
        self.candidates = {candidate.key: candidate for candidate in candidates}
        self.out, self.header, self.old = out, header, old
        self.modelled: dict[Cell, dict[str, Any]] = {}

    def by_round(self) -> list[tuple[int, list[Cell]]]:
        """Groups of cells in the order of measurement: all groups once, then the next round.

        So a drift of the machine (heat, a neighbour) meets every cell, not the last ones.
        """
        from bench.run.plan import groups

        rounds = sorted({round_ for _, round_ in self.work})
        return [
            (round_, group)
            for round_ in rounds
            for group in groups(cell for cell, other in self.work if other == round_)
        ]

    # ---- --dry-run

    def describe(self) -> int:
        from bench.run.plan import estimate, load_s, past_rows

        history = past_rows(self.out, self.header.environment["machine"])
        surveyed = None
        if any(cell not in history for cell, _ in self.work):
            surveyed = self.header.roofline or self.survey()
        total, bounds = 0.0, 0
        print(f"{len(self.work)} cells in {len(self.by_round())} processes, not measured now:")
        for round_, group in self.by_round():
            candidate = self.candidates[group[0].backend_text]
            if candidate.found.usable:
                total += load_s(group, history)
            for cell in group:
                line = f"  round {round_ + 1}  {cell}, {cell.numerics}: "
                if not candidate.found.usable:
                    print(f"{line}unavailable: {candidate.found.why or candidate.found.what}")
                    continue
                if candidate.modelled:
                    images = self.header.images
                    print(f"{line}modelled{', its images made on this CPU' * images}")
                    continue
                guess = estimate(cell, self.settings.rule, history, surveyed)
                total, bounds = total + guess.seconds, bounds + guess.bound
                least = "at least " if guess.bound else "about "
                print(f"{line}{least}{guess.seconds:.0f} s ({guess.source})")
        least = "at least" if bounds else "about"
        print(f"{least} {duration(total)} in all")
        return EXIT_OK

    # ---- the sweep itself

    def run(self, timeout_s: float, budget_s: float | None, roofline: bool) -> int:
        from bench.rows.store import create_run
        from bench.run.cardrows import figures_apart
        from bench.run.progress import Display
        from bench.run.spawn import BudgetSpentError, Limits

        deadline = None if budget_s is None else time.monotonic() + budget_s
        if self.old is None:
            self.header = replace(self.header, roofline=self.survey() if roofline else None)
        cards = [cell for cell, _ in self.work if self.candidates[cell.backend_text].modelled]
        self.modelled = figures_apart(cards, self.bundle) if cards else {}
        target = self.old or create_run(self.out, self.header)
        limits = Limits(timeout_s, deadline)
        spent = False
        print(f"run {target.name}: {len(self.work)} cells, in {target.path}", flush=True)
        with (
            RowWriter(target.path) as writer,
            Display(len(self.work), self.settings.rounds) as display,
        ):
            try:
                for round_, group in self.by_round():
                    self.measure(target, round_, group, limits, writer, display)
            except BudgetSpentError:
                spent = True
            except KeyboardInterrupt:
                display.say(
                    f"interrupted: {display.done} of {len(self.work)} cells are kept; go on with"
                    f" {resume_words(target)}"
                )
                raise
        return conclude(target, budget_s if spent else None)

    def measure(
        self,
        target: Run,
        round_: int,
        group: Sequence[Cell],
        limits: Limits,
        writer: RowWriter,
        display: Display,
    ) -> None:
        """One group of cells in one round, each row on disk before the next cell is done."""
        from bench.limits.floors import of_row
        from bench.machine.environment import git_state
        from bench.run.cardrows import figures_apart, with_image, without_worker
        from bench.run.spawn import BudgetSpentError, Job, results

        context = {"run": target.name, "bundle_hash": self.bundle.hash, **git_state()}
        surveyed = self.header.roofline
        candidate = self.candidates[group[0].backend_text]
        context["provenance"] = candidate.provenance
        if not candidate.found.usable or candidate.backend is None:
            known = {cell: unavailable(candidate) for cell in group}
        else:
            if candidate.modelled and group[0] not in self.modelled:  # not by `run`
                self.modelled |= figures_apart(group, self.bundle)
            known = without_worker(self.modelled, group, self.header.images)
        if known or candidate.backend is None:
            for cell in group:
                row = make_row(cell, round_, context, known[cell])
                writer.append(row)
                display.finished(row)
            return
        if limits.deadline is not None and time.monotonic() >= limits.deadline:
            raise BudgetSpentError
        recipe = group[0].recipe_text.replace(" ", "-")
        name = f"{candidate.key}-{group[0].decoder}-b{group[0].batch}-r{round_}"
        name += f"-{recipe}" if recipe else ""
        job = Job(
            bundle=self.bundle.path,
            backend=candidate.text,
            interpreter=candidate.backend.interpreter or Path(sys.executable),
            cells=group,
            round=round_,
            rule=self.settings.rule.of_round(round_),
            log=target.path / "logs" / f"{name.replace(':', '-').replace('/', '-')}.log",
        )
        with closing(results(job, limits, display)) as stream:
            for cell, result in stream:
                if cell in self.modelled:
                    result = with_image(self.modelled[cell], result)
                if surveyed:
                    result["roofline"] = of_row(result, cell, surveyed)
                row = make_row(cell, round_, context, result)
                writer.append(row)
                display.finished(row)

    def survey(self) -> dict[str, Any] | None:
        """The machine's ceilings and the parts' costs, or None where no cell computes here."""
        from bench.limits.floors import survey_apart

        cells = [cell for cell, _ in self.work]
        devices = ("cpu", "cuda")
        here = [cell for cell in cells if cell.backend != "null" and cell.device in devices]
        if not here:
            return None
        print("measuring this machine's ceilings", flush=True)
        return survey_apart(self.bundle.path, here)


def unavailable(candidate: Candidate) -> dict[str, Any]:
    found = candidate.found
    words = {"what": found.what, "why": found.why, "next": found.next}
    return {"status": "unavailable", "error": {"type": "UnavailableError", **words}}


def conclude(target: Run, spent_budget_s: float | None) -> int:
    """Table, plot, and the list of what is not ok; the exit code."""
    from bench.show import latency as plot
    from bench.show import table

    rows = target.rows()
    table.show(target, rows)
    files: list[Path] = []
    for what, write in (("table", table.write), ("plot", plot.write)):
        try:
            files += write(target, rows)
        except ImportError as error:  # nothing of the run hangs on it
            print(f"left out: the {what}: {error}", file=sys.stderr)
    print(f"run folder: {target.path}")
    print(f"files: rows.jsonl, header.json, {', '.join(file.name for file in files)}")
    bad = [row for row in rows if row["status"] != OK]
    missing = target.missing(rows)
    if not bad and not missing:
        return EXIT_OK
    print(f"\n{len(bad)} cells failed and {len(missing)} are missing:", file=sys.stderr)
    for row in bad:
        print_bad(row)
    for cell, round_ in missing:
        print(f"  missing: {cell}, round {round_ + 1}", file=sys.stderr)
    if spent_budget_s is not None:
        print(f"the budget of {spent_budget_s:g} s is spent", file=sys.stderr)
    retry = " --retry-failed" if bad else ""
    print(f"go on with: {resume_words(target)}{retry}", file=sys.stderr)
    return EXIT_FAILED


def print_bad(row: Row) -> None:
    error = row["error"] or {}
    print(f"  {row['status']}: {Cell.of(row)}, round {row['round'] + 1}", file=sys.stderr)
    for key in ("what", "why", "next"):
        if error.get(key):
            print(f"    {key}: {error[key]}", file=sys.stderr)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    raise SystemExit(run(main))
