"""What a picture is to be, the picture, and the ticket that it waits with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from core.errors import AddbenchError

Format = Literal["png", "jpeg", "webp"]
FORMATS: dict[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""File formats of a picture, with their media types."""


@dataclass(frozen=True)
class Brief:
    """What one picture is to be.

    Attributes:
        picture: the file of a picture to start from; b"" for none.
        strength: how much of that picture is redrawn.
    """

    prompt: str
    seed: int
    steps: int
    decoder: str
    format: Format
    strength: float | None = None
    picture: bytes = b""

    @property
    def kind(self) -> tuple[object, ...]:
        """What briefs must have in common to be drawn in one batch."""
        return self.steps, self.decoder, self.strength, bool(self.picture)


@dataclass(frozen=True)
class Drawing:
    """A drawn picture, as a file.

    Attributes:
        ms: milliseconds by stage: queue, text, unet, decode, rest, encode.
        notes: what the client should know of it: tokens, words that the model does not know.
    """

    data: bytes
    format: Format
    ms: dict[str, float]
    notes: Mapping[str, Any]
    batch: int = 1


class GoneError(AddbenchError):
    """The client left, or a newer brief took the place of this one: nobody waits for it."""

    def __init__(self) -> None:
        super().__init__("nobody waits for this picture any more")


@dataclass(eq=False)
class Ticket:
    """A brief on its way through the server.

    Attributes:
        result: its picture or its error.
        arrived: when, by the loop's clock.
        tries: how often a worker was given it.
    """

    brief: Brief
    result: asyncio.Future[Drawing]
    arrived: float
    tries: int = 0
    started: float = field(default=0.0)

    @property
    def open(self) -> bool:
        """Whether somebody still waits for it."""
        return not self.result.done()

    def fail(self, error: Exception) -> None:
        if self.open:
            self.result.set_exception(error)
            self.result.exception()  # seen: a client that has left is no warning in the log
