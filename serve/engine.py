"""The workers from the server's side: start, feed, bury, start anew. Runs in the event loop.

A worker that dies costs the pictures in work: an API request is answered with the obituary, a live
one is drawn again by the next worker unless something newer waits in its slot, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import AddbenchError, PreconditionError
from core.files import ROOT
from core.process import end_group, obituary, oom_kills
from serve.brief import Drawing, GoneError, Ticket
from serve.envelope import UINT32, frame, unpack
from serve.errors import ApiError
from serve.metrics import STAGES, Metrics
from serve.waiting import Waiting

GRACE_S = 5.0
"""What a worker that closed its socket may still take to end by itself."""
BACK_OFF_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Pauses before a worker is started anew, by how often it died in a row."""
STEADY_S = 60.0
"""A worker that was ready for so long did not die in a row."""
MOST_BYTES = 1 << 28
"""The longest message of a worker."""

Entry = tuple[Hashable | None, Ticket]
"""A ticket with the live connection that it is of, or None."""


class WorkerDiedError(AddbenchError):
    """A worker ended with pictures in work."""


class LoadError(AddbenchError):
    """No worker could be started: the server ends with what the first one said."""

    def __init__(self, error: Mapping[str, Any], exit_code: int) -> None:
        super().__init__(error["what"], error["why"], error["next"])
        self.exit_code = exit_code


@dataclass(frozen=True)
class Post:
    """A worker that is to be kept running: its name, what it loads, where its stderr goes."""

    name: str
    job: Mapping[str, Any]
    log: Path
    command: Sequence[str] = (sys.executable, "-m", "serve.worker")


@dataclass
class InWork:
    """Pictures that a worker has."""

    entries: list[Entry]
    sent: float
    watchdog: asyncio.TimerHandle
    drawn: bool = False

    @property
    def wanted(self) -> bool:
        return any(ticket.open for _, ticket in self.entries)


@dataclass
class Life:
    """One worker process, from its start to its end."""

    process: subprocess.Popen[bytes]
    writer: asyncio.StreamWriter
    oom_kills: int
    batches: dict[int, InWork] = field(default_factory=dict)
    ready_at: float | None = None
    refusal: dict[str, Any] | None = None


class Attendant:
    """Keeps one worker running and busy."""

    def __init__(self, post: Post, engine: Engine) -> None:
        self.post, self.engine = post, engine
        self.state = "loading"
        self.stage = "starting"
        self.share: float | None = None
        """How much of its loading is done, 0 to 1; None where that is not known."""
        self.deaths = 0
        self.facts: dict[str, Any] = {}
        self.life: Life | None = None
        self._numbers = itertools.count()
        self._free = asyncio.Event()

    async def run(self) -> None:
        """Start the worker, again and again, until the engine closes."""
        in_a_row = 0
        while not self.engine.is_closed():
            ready_at, error = await self._one_life()
            lived = 0.0 if ready_at is None else self.engine.now() - ready_at
            if self.engine.is_closed():
                return
            if not self.facts:  # it was never ready
                raise error
            self.deaths += 1
            self.engine.metrics.restarts.inc()
            self.engine.say(f"{self.post.name}: {error.what} ({error.next}); it is started anew")
            in_a_row = 1 if lived > STEADY_S else in_a_row + 1
            self.state = "loading"
            self.stage, self.share = f"started anew after this: {error.what}", None
            self.engine.on_change(self)
            await asyncio.sleep(BACK_OFF_S[min(in_a_row, len(BACK_OFF_S)) - 1])

    # ---- a life

    async def _one_life(self) -> tuple[float | None, AddbenchError]:
        """Run a worker until it ends: when it was ready, and what it died of."""
        try:
            life = await self._start()
        except OSError as failure:  # no memory for another process, most likely
            words = ("the worker could not be started", str(failure), "free memory on this machine")
            return None, WorkerDiedError(*words)
        try:
            error = await self._live(life)
            return life.ready_at, error
        finally:
            self.life = None
            life.writer.close()
            end_group(life.process)

    async def _start(self) -> Life:
        ours, theirs = socket.socketpair()
        post, before = self.post, oom_kills()
        job = {**post.job, "parent": os.getpid()}
        post.log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, post.log.open("ab") as log:
            process = subprocess.Popen(
                [*post.command, str(theirs.fileno()), json.dumps(job)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                pass_fds=(theirs.fileno(),),
                process_group=0,
            )
        self.reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self.life = Life(process, writer, before)
        return self.life

    async def _live(self, life: Life) -> AddbenchError:
        """Pass messages until the worker ends; what it died of."""
        feeder: asyncio.Task[None] | None = None
        try:
            while (message := await self._next()) is not None:
                self._handle(life, *message)
                if life.ready_at is not None and feeder is None:
                    feeder = asyncio.create_task(self._feed(life))
        finally:
            if feeder is not None:
                feeder.cancel()
            self.state = "loading"
            for batch in life.batches.values():
                batch.watchdog.cancel()
        if life.refusal is not None:
            code = PreconditionError.exit_code if not life.refusal["again"] else 4
            error: AddbenchError = LoadError(life.refusal["error"], code)
        else:
            status = await asyncio.to_thread(end_group, life.process, GRACE_S)
            words = obituary(status, life.oom_kills, str(self.post.log))["error"]
            error = WorkerDiedError(words["what"], words["why"], words["next"])
        self._bury(life, error)
        return error

    async def _next(self) -> tuple[dict[str, Any], bytes] | None:
        """The worker's next message; None at its end, or where what it says is no message."""
        try:
            (length,) = UINT32.unpack(await self.reader.readexactly(UINT32.size))
            if length > MOST_BYTES:
                return None
            return unpack(await self.reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError, PreconditionError):
            return None

    def _handle(self, life: Life, message: dict[str, Any], body: bytes) -> None:
        event = message.pop("event")
        if event == "loading":
            self.stage, self.share = message["stage"], message["share"]
            self.engine.on_change(self)
        elif event == "refused":
            life.refusal = message
        elif event == "ready":
            self.facts = message
            self.state, self.stage, self.share = "ready", "", None
            life.ready_at = self.engine.now()
            self._free.set()
            self.engine.on_change(self)
        elif event == "drawn":
            self._drawn(life.batches[message["id"]])
        elif event == "done":
            batch = self._end(life, message["id"])
            self._deliver(batch, message, body)
            self._release(batch)
        elif event == "failed":
            batch = self._end(life, message["id"])
            error = message["error"]
            for _, ticket in batch.entries:
                ticket.fail(_as_error(error) if error else GoneError())
            self._release(batch)

    async def _feed(self, life: Life) -> None:
        """Send a batch whenever the worker has drawn the last one."""
        while True:
            await self._free.wait()
            entries = await self.engine.waiting.take(self.facts["sizes"])
            self._send(life, entries)
            with contextlib.suppress(ConnectionError):  # its end is seen where it is read from
                await life.writer.drain()

    def _send(self, life: Life, entries: list[Entry]) -> None:
        now, number = self.engine.now(), next(self._numbers)
        brief = entries[0][1].brief
        for _, ticket in entries:
            ticket.started = now
            ticket.tries += 1
        watchdog = asyncio.get_running_loop().call_later(self.engine.timeout_s, self._overdue, life)
        life.batches[number] = InWork(entries, now, watchdog)
        briefs = [ticket.brief for _, ticket in entries]
        order = {
            "do": "draw",
            "id": number,
            "steps": brief.steps,
            "decoder": brief.decoder,
            "strength": brief.strength,
            "pictures": [
                {"prompt": b.prompt, "seed": b.seed, "format": b.format, "bytes": len(b.picture)}
                for b in briefs
            ],
        }
        self._free.clear()
        self.engine.metrics.batch.observe(len(entries))
        self.engine.metrics.in_work.inc(len(entries))
        life.writer.write(frame(order, b"".join(b.picture for b in briefs)))

    def _overdue(self, life: Life) -> None:
        self.engine.say(f"{self.post.name}: no answer within {self.engine.timeout_s:g} s, killed")
        life.process.kill()

    def _drawn(self, batch: InWork) -> None:
        if not batch.drawn:
            batch.drawn = True
            self.engine.took(self.engine.now() - batch.sent, len(batch.entries))
            self._free.set()

    def _end(self, life: Life, number: int) -> InWork:
        batch = life.batches.pop(number)
        batch.watchdog.cancel()
        self._drawn(batch)
        return batch

    def _deliver(self, batch: InWork, message: Mapping[str, Any], body: bytes) -> None:
        metrics, start = self.engine.metrics, 0
        for (connection, ticket), answer in zip(batch.entries, message["pictures"], strict=True):
            self.engine.spared.discard(connection)
            data = body[start : start + answer["bytes"]]
            start += len(data)
            if "error" in answer:
                ticket.fail(_as_error(answer["error"]))
                continue
            ms = {"queue": 1e3 * (ticket.started - ticket.arrived), **message["ms"]}
            ms = {name: round(value, 3) for name, value in ms.items()}
            metrics.images.inc()
            for stage in STAGES:
                if stage in ms:
                    metrics.stages.labels(stage).observe(ms[stage] / 1e3)
            if ticket.open:
                picture = Drawing(
                    data, ticket.brief.format, ms, answer["notes"], len(batch.entries)
                )
                ticket.result.set_result(picture)

    def _release(self, batch: InWork) -> None:
        self.engine.metrics.in_work.dec(len(batch.entries))
        self.engine.waiting.finished([key for key, _ in batch.entries if key is not None])

    def _bury(self, life: Life, error: AddbenchError) -> None:
        """Answer what was in work; live requests that were tried once go back to their slots."""
        again: list[Entry] = []
        for batch in life.batches.values():
            self._release(batch)
            for connection, ticket in batch.entries:
                if connection is not None and ticket.tries < 2 and not self.engine.is_closed():
                    ticket.started = 0.0
                    again.append((connection, ticket))
                else:
                    ticket.fail(_died(error))
        life.batches.clear()
        self.engine.waiting.put_back(again)

    def cancel(self, ticket: Ticket) -> None:
        """Tell the worker where nobody waits for any picture of this ticket's batch."""
        if self.life is None:
            return
        for number, batch in self.life.batches.items():
            mine = any(ticket is other for _, other in batch.entries)
            if mine and not batch.wanted and not batch.drawn:
                self.life.writer.write(frame({"do": "cancel", "id": number}))


class Engine:
    """All workers, and what waits for them.

    Args:
        timeout_s: a worker that gives no picture for so long is killed.
        stops_stale: whether a live picture in work is stopped when a newer one is asked for.
        say: where a line for the person at the terminal goes.
    """

    def __init__(
        self,
        posts: Sequence[Post],
        *,
        metrics: Metrics,
        queue: int,
        deadline_s: float = 30.0,
        window_s: float = 0.0,
        timeout_s: float = 600.0,
        stops_stale: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.metrics, self.timeout_s, self.say = metrics, timeout_s, say
        self.stops_stale = stops_stale
        self.spared: set[Hashable | None] = set()
        """Live connections whose last picture was stopped: their next one is finished."""
        self._closed = False
        self.service_s = 0.0
        self.waiting = Waiting(
            queue, deadline_s, window_s, lambda: self.service_s, metrics.replaced.inc
        )
        metrics.depth.set_function(lambda: len(self.waiting))
        self.attendants = [Attendant(post, self) for post in posts]
        self.on_change: Callable[[Attendant], None] = lambda _: None
        """Called when a worker's state or stage is another."""

    def is_closed(self) -> bool:
        return self._closed

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def ready(self) -> bool:
        return any(attendant.state == "ready" for attendant in self.attendants)

    @property
    def stage(self) -> str:
        """What the workers that are not ready are doing."""
        return "; ".join(
            attendant.stage for attendant in self.attendants if attendant.state != "ready"
        )

    @property
    def share(self) -> float | None:
        """How much of its loading the worker has done that has done the least; None where that is
        not known."""
        shares = [a.share for a in self.attendants if a.state != "ready"]
        known = [share for share in shares if share is not None]
        return min(known) if shares and len(known) == len(shares) else None

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is in work."""
        lives = [attendant.life for attendant in self.attendants if attendant.life]
        return not len(self.waiting) and not any(life.batches for life in lives)

    async def run(self) -> None:
        """Keep the workers running until `close`.

        Raises:
            AddbenchError: none could be started.
        """
        tasks = [asyncio.create_task(attendant.run()) for attendant in self.attendants]
        ticking = asyncio.create_task(self._expire())
        try:
            await asyncio.gather(*tasks)
        finally:
            self.close()
            ticking.cancel()
            await asyncio.wait(tasks)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            self.waiting.expire(self.now())

    def took(self, seconds: float, pictures: int) -> None:
        """Keep a running mean of what a picture takes, over all workers."""
        ready = max(1, sum(attendant.state == "ready" for attendant in self.attendants))
        each = seconds / pictures / ready
        self.service_s = each if not self.service_s else 0.9 * self.service_s + 0.1 * each

    def ticket(self, brief: Any) -> Ticket:
        loop = asyncio.get_running_loop()
        return Ticket(brief, loop.create_future(), loop.time())

    def abandon(self, tickets: Sequence[Ticket]) -> None:
        """Give up tickets whose client left: what waits is dropped, what is in work is cancelled
        where nobody else waits for it."""
        for ticket in tickets:
            if ticket.open:
                self.metrics.cancelled.labels("in work" if ticket.started else "waiting").inc()
                ticket.fail(GoneError())
                for attendant in self.attendants:
                    attendant.cancel(ticket)
        self.waiting.forget_gone()

    def cancel_stale(self, connection: Hashable) -> None:
        """Stop the picture that a live connection has in work, since something newer waits: where
        it is drawn for nobody else, and never twice in a row, so that there is always progress."""
        if not self.stops_stale or connection in self.spared:
            return
        for attendant in self.attendants:
            for batch in attendant.life.batches.values() if attendant.life else ():
                if len(batch.entries) == 1 and batch.entries[0][0] is connection:
                    ticket = batch.entries[0][1]
                    if ticket.open and not batch.drawn:
                        self.spared.add(connection)
                        self.metrics.cancelled.labels("stale").inc()
                        ticket.fail(GoneError())
                        attendant.cancel(ticket)

    def leave(self, connection: Hashable) -> None:
        """Drop what a live connection has waiting or in work: it is gone."""
        entries = [
            ticket
            for attendant in self.attendants
            if attendant.life is not None
            for batch in attendant.life.batches.values()
            for key, ticket in batch.entries
            if key is connection
        ]
        waiting = self.waiting.slots.get(connection)
        self.abandon([*entries, *([waiting] if waiting else [])])
        self.waiting.leave(connection)
        self.spared.discard(connection)

    def close(self) -> None:
        """End the workers: each ends when its socket closes."""
        self._closed = True
        self.waiting.fail_all(GoneError())
        for attendant in self.attendants:
            if attendant.life is not None:
                attendant.life.writer.close()


def _as_error(error: Mapping[str, Any]) -> AddbenchError:
    kind = PreconditionError if error.get("mine") else AddbenchError
    return kind(error["what"], error["why"], error["next"])


def _died(error: AddbenchError) -> ApiError:
    return ApiError(
        error.what, error.why, error.next, status=500, code="worker_died",
        headers={"Retry-After": "1"},
    )  # fmt: skip
