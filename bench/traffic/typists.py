"""People who type into `/live`, scripted: from key to picture, by the client's clock."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.traffic.figures import percentile
from core.errors import AddbenchError
from serve.envelope import pack, unpack

SEED = 5
LAST_S = 60.0
"""What the picture of the last text may take before it counts as lost."""


@dataclass
class Typist:
    """One of them: what was pressed when, and what came back."""

    number: int
    pressed: dict[int, float] = field(default_factory=dict)
    taken_ms: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    errors: int = 0


async def typing(typist: Typist, url: str, lines: Sequence[str], keys: int, gap_s: float) -> None:
    """Type captions one after the other, a key at a time, with exponential gaps."""
    from websockets.asyncio.client import connect

    rng = random.Random(f"{SEED} {typist.number}")
    text, line = "", ""
    async with connect(url, max_size=None, compression=None) as socket:
        done = asyncio.Event()

        async def reading() -> None:
            async for message in socket:
                assert isinstance(message, bytes)
                header, _ = unpack(message)
                if "status" in header:
                    continue
                now, number = time.perf_counter(), header["id"]
                typist.ids.append(number)
                if "error" in header:
                    typist.errors += 1
                else:
                    typist.taken_ms.append(1e3 * (now - typist.pressed[number]))
                    ms = header["ms"]
                    if "total" in ms:
                        typist.server_ms.append(ms["server"] - ms["queue"] - ms["total"])
                if number == keys:
                    done.set()
                    return

        reader = asyncio.create_task(reading())
        for number in range(1, keys + 1):
            if text == line:
                text, line = "", lines[rng.randrange(len(lines))]
            text = line[: len(text) + 1]
            typist.pressed[number] = time.perf_counter()
            await socket.send(pack({"id": number, "prompt": text, "seed": typist.number}))
            if number < keys:
                await asyncio.sleep(rng.expovariate(1 / gap_s))
        with contextlib.suppress(TimeoutError):  # it counts as lost
            await asyncio.wait_for(done.wait(), LAST_S)
        reader.cancel()


def type_all(
    server: str, lines: Sequence[str], typists: int, keys: int, gap_s: float
) -> dict[str, Any]:
    """Figures of so many typists at once.

    Raises:
        AddbenchError: not one picture came.
    """
    url = server.replace("http", "ws", 1).rstrip("/") + "/live"
    crowd = [Typist(number) for number in range(typists)]

    async def all_of_them() -> None:
        await asyncio.gather(*(typing(typist, url, lines, keys, gap_s) for typist in crowd))

    started = time.perf_counter()
    asyncio.run(all_of_them())
    taken = sorted(ms for typist in crowd for ms in typist.taken_ms)
    own = sorted(ms for typist in crowd for ms in typist.server_ms)
    if not taken:
        raise AddbenchError("no picture came", f"{typists} typists were answered with errors or not"
                            " at all", "look at what the server printed")  # fmt: skip
    seconds = time.perf_counter() - started
    last_drawn = sum(typist.ids[-1:] == [keys] for typist in crowd)
    in_order = all(typist.ids == sorted(set(typist.ids)) for typist in crowd)
    return {
        "scenario": "typists",
        "typists": typists,
        "keys": keys * typists,
        "gap_ms": 1e3 * gap_s,
        "seconds": round(seconds, 3),
        "pictures": len(taken),
        "per_second": round(len(taken) / seconds, 4),
        "p50_ms": round(percentile(taken, 0.5), 3),
        "p95_ms": round(percentile(taken, 0.95), 3),
        "server_ms": round(percentile(own, 0.5), 3) if own else None,
        "last_drawn": last_drawn,
        "in_order": in_order,
        "ok": last_drawn == typists and in_order,
        "failed": typists - last_drawn,
        "errors": sum(typist.errors for typist in crowd),
        "samples_ms": [round(ms, 3) for ms in taken],
    }
