"""What a fleet is to a sweep: machines, a call on one of them, and what the call gives."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from core.errors import AddbenchError, PreconditionError

Call = Callable[[], Iterator[Any]]
"""What runs on a machine: a function of this checkout with its arguments, which both sides
import. What it yields comes to the driver as it is made."""


@dataclass(frozen=True)
class Machine:
    """A machine of a fleet that measures.

    Attributes:
        name: what tables and headers call it.
        id: what the engine calls it.
        labels: what its owner says of it, and what the engine found.
        hardware: what the engine knows of it.
        running: what it measures now or next, for whom.
    """

    name: str
    id: str
    labels: Mapping[str, str]
    hardware: str = ""
    running: tuple[str, ...] = ()

    @property
    def labels_text(self) -> str:
        """Its labels as a selector takes them."""
        return ",".join(f"{key}={value}" for key, value in sorted(self.labels.items()))


class LostError(AddbenchError):
    """A machine, or the process on it that measures, is gone; what was measured is kept."""


class Fleet(Protocol):
    """An engine that runs calls on machines. Its methods may be called from several threads.

    Attributes:
        address: as `--fleet` takes it.
    """

    address: str

    def machines(self) -> list[Machine]:
        """Those that measure and are there now."""

    def submit(self, machine: Machine, call: Call, title: str) -> Any:
        """Have `call` run on a machine, once nothing else is measured there; a handle of it.

        Args:
            title: what others read that ask what is running.
        """

    def results(self, handle: Any) -> Generator[Any, None, None]:
        """What the call yields, as it comes, and None about once a second meanwhile. Closing it
        ends the call and every process that it started.

        Raises:
            LostError: the machine is gone.
            Exception: what the call raised.
        """

    def close(self) -> None:
        """Let go of the engine; it stays as it was."""


def named(machines: Iterable[Machine]) -> str:
    """Machines and their labels, for a message."""
    return "; ".join(f"{each.name} ({each.labels_text or 'no labels'})" for each in machines)


def select(machines: Sequence[Machine], selector: str | None) -> list[Machine]:
    """The machines that a selector fits: `key=value|value,key=value`; None for all of them.

    Raises:
        PreconditionError: it is none, fits none of them, or two that it fits have one name; the
            labels that there are.
    """
    if not machines:
        raise PreconditionError(
            "the fleet has no machine that measures",
            "none of its nodes offers what a measurement takes",
            "start one: RAY_worker_niceness=0 ray start --address=HEAD:6379"
            """ --resources='{"addbench": 1}' --labels=addbench/device=NAME (docs/fleet.md)""",
        )
    wanted: list[tuple[str, list[str]]] = []
    for word in selector.split(",") if selector is not None else ():
        key, equals, values = word.strip().partition("=")
        if not key or not equals or not all(values.split("|")):
            raise PreconditionError(
                f"{word!r} in --on is no label",
                "a selector is key=value, with | between values and , between keys",
                f"there are: {named(machines)}",
            )
        wanted.append((key, values.split("|")))
    fitting = [
        each for each in machines if all(each.labels.get(key) in values for key, values in wanted)
    ]
    if not fitting:
        raise PreconditionError(
            f"--on {selector} fits no machine",
            f"there are: {named(machines)}",
            "choose among their labels, or leave --on out for all of them",
        )
    names = [each.name for each in fitting]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PreconditionError(
            f"{names.count(twice)} machines are called {twice}",
            "a table has a column for each, and --resume finds each by its name",
            f"start them with labels of their own, such as --labels=addbench/name={twice}-1, or"
            " choose one with --on",
        )
    return fitting
