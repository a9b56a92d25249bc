"""A sweep over the machines of a fleet, from the driver's side: a run for each machine.

The driver asks every machine what the request comes to there, refuses what does not fit before
anything is written, then lets one `Runner` a machine measure, all at once. It alone writes rows.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bench.fleet import node
from bench.fleet.protocol import Call, Fleet, LostError, Machine
from bench.limits.floors import measured_again
from bench.rows.cell import Cell
from bench.rows.store import Run, create_run
from bench.run import spawn
from bench.run.estimate import past, survey, with_rounds
from bench.run.orders import round_by_round
from bench.run.plan import Plan
from bench.run.progress import Display
from bench.run.request import Request
from bench.run.resume import reopen
from bench.run.runner import Runner, Seat, Side, sigterm_as_ctrl_c
from core.amounts import count_text
from core.cli import image_size
from core.errors import AddbenchError, PreconditionError
from export.bundle import Bundle, find_bundle

Answer = TypeVar("Answer")


@dataclass
class Outpost:
    """A machine of the fleet as this sweep uses it."""

    fleet: Fleet
    machine: Machine
    stop: threading.Event
    """Set where all machines are to end what they do."""
    seat: Seat = field(default_factory=Seat)

    def ask(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """The result of a function on the machine."""
        title = f"{function.__name__} for a sweep"
        (result,) = self.stream(partial(node.once, function, *arguments), title, None)
        return result

    def stream(self, call: Call, title: str, deadline: float | None) -> Iterator[Any]:
        """What a call on the machine yields, as it comes.

        Raises:
            spawn.BudgetSpentError: `deadline` (monotonic) has come; the call has been ended.
            KeyboardInterrupt: the sweep is being interrupted.
        """
        with closing(self.fleet.results(self.fleet.submit(self.machine, call, title))) as stream:
            for message in stream:
                if message is not None:
                    yield message
                if self.stop.is_set():
                    raise KeyboardInterrupt
                if deadline is not None and time.monotonic() >= deadline:
                    raise spawn.BudgetSpentError

    def sit(self) -> node.CodeState:
        """Learn where the machine's workers run; the revision of its checkout."""
        revision = self.ask(node.revision)
        home = self.ask(node.home)
        self.seat = Seat(
            interpreter=home.interpreter,
            root=home.root,
            commit=revision.commit,
            results=self.results,
            look_again=partial(self.ask, measured_again),
        )
        return revision

    def results(
        self, job: spawn.Job, limits: spawn.Limits, view: spawn.View
    ) -> Generator[tuple[Cell, spawn.Result], None, None]:
        """Measure a group on the machine: `spawn.results` there, its log beside ours."""
        view.loading(job.cells, job.round)
        call = partial(node.measured, job, limits.timeout_s)
        title = f"{job.log.parent.parent.name} {job.log.stem}"
        for message in self.stream(call, title, limits.deadline):
            if isinstance(message, node.LogEnd):
                job.log.parent.mkdir(parents=True, exist_ok=True)
                with job.log.open("a") as log:
                    log.write(message.text)
            else:
                yield message


@dataclass(frozen=True)
class Part:
    """What became of one machine's part of a sweep.

    Attributes:
        spent: whether the budget ended before it was done.
        fault: why the rest of it is missing; None where it was measured.
    """

    machine: Machine
    run: Run
    spent: bool = False
    fault: AddbenchError | None = None


class Drive:
    """A sweep's hold of its machines. Nothing is asked of them before the first method.

    Args:
        machines: those that the sweep is over.
    """

    def __init__(self, fleet: Fleet, machines: Sequence[Machine]) -> None:
        self.stop = threading.Event()
        self.posts = [Outpost(fleet, machine, self.stop) for machine in machines]

    # ---- what is refused

    def plans(self, request: Request) -> list[Plan]:
        """What a request comes to on every machine; nothing is written.

        Raises:
            PreconditionError: a machine has another revision, bundle, or cannot measure it; each
                is named.
        """
        bundle = find_bundle(request.model, request.weights, request.dtype, request.size)
        self.require_revision()
        asked = self.all("finding out what is there", lambda post: post.ask(
            node.planned, request, bundle))  # fmt: skip
        modelled = [each.key for plan in asked for each in plan.candidates if each.modelled]
        if modelled:
            raise PreconditionError(
                f"--backend {modelled[0]} is modelled, and --fleet measures",
                "a model of a card needs no machine",
                "drop one of them",
            )
        return asked

    def rests(
        self, runs: Sequence[Run], model: str | None = None, *, retry_failed: bool
    ) -> list[Plan]:
        """What is left of a machine's run each, in the order of the machines.

        Args:
            model: where the bundle lies here, if not where its name says.
        """
        bundle = bundle_of(runs[0], model)
        self.require_revision()
        by_post = {id(post): run for post, run in zip(self.posts, runs, strict=True)}

        def rest(post: Outpost) -> Plan:
            run = by_post[id(post)]
            there = post.ask(node.reopened, run.header, bundle)
            return reopen(run, {}, retry_failed=retry_failed, there=there)

        return self.all("finding out what is there", rest)

    def require_revision(self) -> None:
        """Refuse machines whose checkout is not this one's revision."""
        ours = node.revision()

        def check(post: Outpost) -> None:
            theirs = post.sit()
            if theirs != ours:
                raise PreconditionError(
                    "its checkout is of another revision",
                    f"it has {theirs.text}; here it is {ours.text}",
                    "check out the same revision there, and start its node again",
                )

        self.all("comparing revisions", check)

    def all(self, doing: str, work: Callable[[Outpost], Answer]) -> list[Answer]:
        """The results of `work` for all machines at once, in their order.

        Raises:
            PreconditionError: it was refused or failed on some; each with what is wrong there.
        """
        print(f"{doing} on {', '.join(post.machine.name for post in self.posts)}", flush=True)
        faults: dict[str, AddbenchError] = {}
        answers = []
        for post, future in zip(self.posts, self.at_once(work), strict=True):
            error = future.exception()
            if error is None:
                answers.append(future.result())
            elif isinstance(error, AddbenchError):
                faults[post.machine.name] = error
            elif isinstance(error, ModuleNotFoundError | AttributeError | TypeError):
                faults[post.machine.name] = not_understood(error)
            else:
                raise error
        if faults:
            raise PreconditionError(
                f"{', '.join(faults)} cannot take part",
                "; ".join(f"{name}: {each.what}: {each.why}" for name, each in faults.items()),
                "; ".join(f"{name}: {each.next}" for name, each in faults.items())
                + "; or choose the others with --on",
            )
        return answers

    def at_once(self, work: Callable[[Outpost], Answer]) -> list[Future[Answer]]:
        """`work` for all machines in threads; an interrupt ends what they all do first."""
        with ThreadPoolExecutor(len(self.posts)) as pool, sigterm_as_ctrl_c():
            futures = [pool.submit(work, post) for post in self.posts]
            try:
                wait(futures)
            except KeyboardInterrupt:
                self.stop.set()
                wait(futures)
                raise
        return futures

    # ---- what is measured

    def sweep(
        self,
        plans: Sequence[Plan],
        runs: Path,
        command: Sequence[str],
        resumed: Sequence[Run] = (),
        *,
        timeout_s: float,
        budget_s: float | None = None,
        ceilings: bool = True,
    ) -> list[Part]:
        """Measure a plan on each machine, all at once, in a run each.

        Args:
            runs: the folder that new runs are made in.
            command: what was typed, for the headers.
            resumed: the runs whose rest the plans are; none for new ones.

        Raises:
            KeyboardInterrupt: the workers have been ended everywhere, and all rows are kept.
        """
        name = secrets.token_hex(4)
        deadline = None if budget_s is None else time.monotonic() + budget_s
        plan_of = {id(post): plan for post, plan in zip(self.posts, plans, strict=True)}
        run_of = {id(post): run for post, run in zip(self.posts, resumed, strict=False)}

        def part(post: Outpost) -> Part:
            plan, run = plan_of[id(post)], run_of.get(id(post))
            fault: AddbenchError | None = None
            if run is None:
                try:
                    if ceilings:
                        print(f"{post.machine.name}: measuring its ceilings", flush=True)
                        plan = replace(plan, roofline=post.ask(survey, plan))
                except LostError as error:  # a run without a row, for --resume
                    fault = error
                plan = with_rounds(plan, past(runs, plan))
                about = {"sweep": name, "machine": post.machine.name,
                         "labels": dict(post.machine.labels)}  # fmt: skip
                commit = post.seat.commit or {}
                run = create_run(runs, plan.header(command, fleet=about, **commit))
            display = Display(len(plan.work), plan.method.rounds, post.machine.name)
            display.say(f"run {run.name}: {count_text(len(plan.work), 'cell')}, in {run.path}")
            side, spent = Side(plan, run, seat=post.seat), False
            left_s = None if deadline is None else deadline - time.monotonic()
            if fault is None:
                with Runner([side], display, timeout_s=timeout_s, budget_s=left_s) as runner:
                    try:
                        spent = runner.measure(round_by_round(plan.work))
                    except AddbenchError as error:
                        fault = error
            if fault is not None:
                display.say(f"lost: {fault.what}: {fault.why}")
            return Part(post.machine, side.run, spent, fault)

        return [future.result() for future in self.at_once(part)]


def not_understood(error: BaseException) -> AddbenchError:
    """The refusal of a machine whose checkout does not know what it is asked."""
    return PreconditionError(
        "its checkout does not know what it is asked",
        f"{type(error).__name__}: {error}",
        "check out the same revision there, and start its node again",
    )


def bundle_of(run: Run, model: str | None) -> Bundle:
    """The driver's copy of the bundle that a run is of; machines look for one of equal content."""
    began: Mapping[str, Any] = run.header.bundle
    size = image_size(run.plan[0].size)
    bundle = find_bundle(model or began["name"], began["weights"], began["dtype"], size)
    if bundle.hash != began["hash"]:
        raise PreconditionError(
            f"run {run.name} cannot be resumed",
            f"its bundle's hash was {began['hash'][:12]} and is {bundle.hash[:12]}",
            "start a new run, or name the folder of that bundle: --model PATH",
        )
    return bundle
