"""What waits to be drawn: a bounded queue of API requests, and one slot for each live connection.

In a slot the newest wins. Workers take from both in turns, connections round robin, and join
what may be drawn in one batch. Runs in the event loop: no locks.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence

from serve.brief import GoneError, Ticket
from serve.errors import queue_full, too_late


class Waiting:
    """Tickets that wait.

    Args:
        limit: pictures that the queue holds.
        deadline_s: what has waited for longer is dropped before it costs anything.
        window_s: how long a batch that is not full waits for more.
        service_s: seconds that a picture takes at present, for Retry-After.
        on_replaced: called when a newer brief takes the place of one.
    """

    def __init__(
        self,
        limit: int,
        deadline_s: float,
        window_s: float = 0.0,
        service_s: Callable[[], float] = lambda: 0.0,
        on_replaced: Callable[[], None] = lambda: None,
    ) -> None:
        self.limit, self.deadline_s, self.window_s = limit, deadline_s, window_s
        self.service_s, self.on_replaced = service_s, on_replaced
        self.queue: deque[Ticket] = deque()
        self.slots: OrderedDict[Hashable, Ticket] = OrderedDict()
        self.busy: set[Hashable] = set()
        """Connections with a picture in work: their next one waits, so that ids stay in order."""
        self._live_next = False
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self.queue) + len(self.slots)

    # ---- in

    def admit(self, tickets: Sequence[Ticket]) -> None:
        """Queue the pictures of one request, all or none.

        Raises:
            ApiError: there is no room (429).
        """
        self.forget_gone()
        if len(self.queue) + len(tickets) > self.limit:
            wait_s = (len(self.queue) + len(tickets)) * self.service_s()
            raise queue_full(len(self.queue), self.limit, wait_s)
        self.queue.extend(tickets)
        self._news.set()

    def put(self, connection: Hashable, ticket: Ticket) -> None:
        """Put a connection's newest brief in its slot; what lay there is replaced. A connection
        keeps its place in the round."""
        old = self.slots.get(connection)
        if old is not None and old.open:
            old.fail(GoneError())
            self.on_replaced()
        self.slots[connection] = ticket
        self._news.set()

    def put_back(self, tickets: Sequence[tuple[Hashable | None, Ticket]]) -> None:
        """Return live tickets whose worker died, where nothing newer waits in their slot."""
        for connection, ticket in tickets:
            if connection is not None and ticket.open:
                if connection in self.slots:
                    ticket.fail(GoneError())
                else:
                    self.slots[connection] = ticket
        self._news.set()

    def leave(self, connection: Hashable) -> None:
        """Drop what a connection has waiting: it is gone."""
        ticket = self.slots.pop(connection, None)
        if ticket is not None:
            ticket.fail(GoneError())

    def finished(self, connections: Sequence[Hashable]) -> None:
        """The pictures of these connections are drawn: their next ones may be."""
        self.busy.difference_update(connections)
        self._news.set()

    def fail_all(self, error: Exception) -> None:
        for ticket in (*self.queue, *self.slots.values()):
            ticket.fail(error)
        self.queue.clear()
        self.slots.clear()

    # ---- out

    async def take(self, sizes: Sequence[int]) -> list[tuple[Hashable | None, Ticket]]:
        """The next batch, with the connection of each live ticket; waits until there is one.

        Args:
            sizes: how many pictures a batch may have, ascending; the first is 1.
        """
        loop = asyncio.get_running_loop()
        while True:
            self.forget_gone()
            if next(self._candidates(), None):
                if self.window_s and self._joinable() < sizes[-1]:
                    await asyncio.sleep(self.window_s)
                if batch := self._pick(sizes, loop.time()):
                    return batch
                continue
            self._news.clear()
            await self._news.wait()

    def expire(self, now: float) -> None:
        """Fail what has waited past the deadline, whether a worker is there or not."""
        while self.queue and now - self.queue[0].arrived > self.deadline_s:
            self.queue.popleft().fail(too_late(self.deadline_s))

    def forget_gone(self) -> None:
        """Take out what nobody waits for any more."""
        if any(not ticket.open for ticket in self.queue):
            self.queue = deque(ticket for ticket in self.queue if ticket.open)
        for connection in [key for key, ticket in self.slots.items() if not ticket.open]:
            del self.slots[connection]

    def _candidates(self) -> Iterator[tuple[Hashable | None, Ticket]]:
        """Tickets that may be drawn now, in turn: of the queue, of the connections."""
        queued: list[tuple[Hashable | None, Ticket]] = [(None, ticket) for ticket in self.queue]
        live = [(key, ticket) for key, ticket in self.slots.items() if key not in self.busy]
        first, second = (live, queued) if self._live_next else (queued, live)
        for index in range(max(len(first), len(second))):
            yield from first[index : index + 1]
            yield from second[index : index + 1]

    def _joinable(self) -> int:
        candidates = list(self._candidates())
        return sum(ticket.brief.kind == candidates[0][1].brief.kind for _, ticket in candidates)

    def _pick(self, sizes: Sequence[int], now: float) -> list[tuple[Hashable | None, Ticket]]:
        self.expire(now)
        candidates = list(self._candidates())
        if not candidates:
            return []
        kind = candidates[0][1].brief.kind
        alike = [entry for entry in candidates if entry[1].brief.kind == kind]
        size = max(size for size in sizes if size <= len(alike))
        batch = alike[:size]
        self._live_next = batch[0][0] is None
        for connection, ticket in batch:
            if connection is None:
                self.queue.remove(ticket)
            else:
                del self.slots[connection]
                self.busy.add(connection)
        return batch
