"""A fleet in threads of this process: a test double of an engine, whose machines are this one.

Calls are real, and so are the workers that they start. A machine can be told to die in the middle
of a call, and to be of another revision.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

from bench.fleet.protocol import Call, LostError, Machine

BEAT_S = 0.2
END = object()


class FleetDouble:
    """See `bench.fleet.protocol.Fleet`.

    Attributes:
        dies: machine -> how many rows it still gives before it is gone.
        wraps: machine -> what its calls are put through, such as another revision's answers.
        alone: machine -> how many calls ran there at once, at most.
    """

    address = "double"

    def __init__(self, *names: str, **labels: str) -> None:
        self.all = [Machine(name, name, {"name": name} | labels, "a double") for name in names]
        self.locks = {name: threading.Lock() for name in names}
        self.dies: dict[str, int] = {}
        self.wraps: dict[str, Callable[[Call], Call]] = {}
        self.alone = dict.fromkeys(names, 0)
        self.busy = dict.fromkeys(names, 0)
        self.titles: list[tuple[str, str]] = []

    def machines(self) -> list[Machine]:
        return [each for each in self.all if self.dies.get(each.name, 1) > 0]

    def submit(self, machine: Machine, call: Call, title: str) -> Any:
        self.titles.append((machine.name, title))
        return machine, self.wraps.get(machine.name, lambda same: same)(call)

    def results(self, handle: Any) -> Generator[Any, None, None]:
        machine, call = handle
        name = machine.name
        given: queue.Queue[Any] = queue.Queue()
        ended = threading.Event()

        def work() -> None:
            with self.locks[name]:
                self.busy[name] += 1
                self.alone[name] = max(self.alone[name], self.busy[name])
                stream = call()
                try:
                    while not ended.is_set():
                        given.put((next(stream, END), None))
                except Exception as error:
                    given.put((END, error))
                finally:
                    stream.close()  # type: ignore[attr-defined]
                    self.busy[name] -= 1

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                try:
                    message, error = given.get(timeout=BEAT_S)
                except queue.Empty:
                    yield None
                    continue
                if error is not None:
                    raise error
                if message is END:
                    return
                if name in self.dies and isinstance(message, tuple):
                    if self.dies[name] <= 0:
                        raise LostError(f"{name} is gone", "a double of a power cut", "--resume")
                    self.dies[name] -= 1
                yield message
        finally:
            ended.set()

    def close(self) -> None:
        pass
