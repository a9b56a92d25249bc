"""The queue and the slots, by their rules."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.brief import Brief, GoneError, Ticket
from serve.errors import ApiError
from serve.waiting import Waiting


def ticket(prompt: str, steps: int = 1, arrived: float | None = None) -> Ticket:
    loop = asyncio.get_running_loop()
    brief = Brief(prompt, 0, steps, "vae", "png")
    return Ticket(brief, loop.create_future(), loop.time() if arrived is None else arrived)


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 4), st.integers(1, 2)),
        st.tuples(st.just("admit"), st.integers(1, 3), st.integers(1, 2)),
        st.tuples(st.just("leave"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("take"), st.just(0), st.just(0)),
        st.tuples(st.just("finish"), st.integers(0, 4), st.just(0)),
    ),
    max_size=60,
)


@given(MOVES)
def test_nothing_is_lost_and_nothing_is_drawn_twice(moves: list[tuple[str, int, int]]) -> None:
    async def play() -> None:
        waiting = Waiting(limit=5, deadline_s=1e9)
        newest: dict[int, Ticket] = {}
        admitted: list[Ticket] = []
        taken: list[Ticket] = []
        busy: set[int] = set()
        for number, (move, which, steps) in enumerate(moves):
            if move == "put":
                newest[which] = ticket(f"live {number}", steps)
                waiting.put(which, newest[which])
            elif move == "admit":
                tickets = [ticket(f"api {number}", steps) for _ in range(which)]
                if len(waiting.queue) + which > 5:
                    with pytest.raises(ApiError):
                        waiting.admit(tickets)
                else:
                    waiting.admit(tickets)
                    admitted += tickets
            elif move == "leave":
                waiting.leave(which)
                newest.pop(which, None)
            elif move == "take":
                free = [key for key in waiting.slots if key not in busy]
                if not waiting.queue and not free:
                    continue
                batch = await asyncio.wait_for(waiting.take([1, 2, 4]), 1)
                assert len(batch) in (1, 2, 4)
                assert len({entry.brief.kind for _, entry in batch}) == 1
                for connection, entry in batch:
                    assert entry.open
                    assert entry not in taken
                    if connection is not None:
                        assert connection not in busy
                        assert entry is newest[connection]  # type: ignore[index]
                        busy.add(connection)  # type: ignore[arg-type]
                    taken.append(entry)
            else:
                waiting.finished([which])
                busy.discard(which)
            assert len(waiting.slots) <= 5
        queued = [entry for entry in admitted if entry not in taken]
        assert list(waiting.queue) == queued  # in order of arrival
        for connection, entry in newest.items():
            assert entry in taken or waiting.slots[connection] is entry

    asyncio.run(play())


def test_connections_take_turns_however_fast_one_types() -> None:
    async def play() -> None:
        waiting = Waiting(limit=5, deadline_s=1e9)
        order = []
        for name in "abc":
            waiting.put(name, ticket(name))
        for _ in range(6):
            waiting.put("a", ticket("a again"))
            ((connection, _),) = await waiting.take([1])
            order.append(connection)
            waiting.finished([connection])
            waiting.put(connection, ticket("more"))
        assert order == ["a", "b", "c", "a", "b", "c"]

    asyncio.run(play())


def test_what_has_waited_too_long_is_failed_and_not_taken() -> None:
    async def play() -> None:
        waiting = Waiting(limit=5, deadline_s=1.0)
        old, new = ticket("old", arrived=-10.0), ticket("new")
        waiting.admit([old, new])
        assert await waiting.take([1]) == [(None, new)]
        error = old.result.exception()
        assert isinstance(error, ApiError)
        assert error.status == 504

    asyncio.run(play())


def test_what_comes_back_from_a_dead_worker_gives_way_to_what_is_newer() -> None:
    async def play() -> None:
        waiting = Waiting(limit=5, deadline_s=1e9)
        old, alone, new = ticket("old"), ticket("alone"), ticket("new")
        waiting.put("a", new)
        waiting.put_back([("a", old), ("b", alone)])
        assert isinstance(old.result.exception(), GoneError)
        assert (waiting.slots["a"], waiting.slots["b"]) == (new, alone)

    asyncio.run(play())


def test_a_window_waits_for_more() -> None:
    async def play() -> None:
        waiting = Waiting(limit=5, deadline_s=1e9, window_s=0.05)
        waiting.admit([ticket("one")])
        taking = asyncio.create_task(waiting.take([1, 2]))
        await asyncio.sleep(0.01)
        waiting.admit([ticket("two")])
        assert len(await taking) == 2

    asyncio.run(play())
