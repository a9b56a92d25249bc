"""The child process that draws: envelopes over a socket, a length before each.

    python -m serve.worker FD JOB      the socket's descriptor, and what to load, as JSON

From the server: `{"do": "draw", "id", "steps", "decoder", "strength", "pictures": [{"prompt",
"seed", "format", "bytes"}, ...]}` with the files to start from behind it; `{"do": "cancel", "id"}`.
To the server, each with an `event`:
    loading  stage, share     what is being done before the first picture, and how far that is
    ready    ...              batch sizes, and what the model says of itself
    refused  error            it cannot be loaded, and trying again would not help
    drawn    id               the next batch may be sent: this one's files are being written
    done     id, ms, pictures {"bytes", "notes"} or {"error"} each, with the files behind it
    failed   id, error        of the whole batch
The main thread draws, another one listens (so that a batch can be cancelled), a third encodes.
Prompts never reach stderr, which is the worker's log.
"""

from __future__ import annotations

import io
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from core.errors import AddbenchError, PreconditionError
from core.process import die_with_parent
from serve.envelope import frame, receive_frame

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from serve.artist import Progress

SAVED: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 3},
    "jpeg": {"quality": 92, "subsampling": 0},
    "webp": {"quality": 92, "method": 1},
}
"""How a picture is written, by format: a few milliseconds at 512 px."""


class CancelledError(Exception):
    """The server wants this batch no more."""


class Drawer(Protocol):
    """What a worker draws with; `serve.artist.Artist`, or a test double."""

    def facts(self) -> dict[str, Any]:
        """What `ready` says: `sizes`, the batches that may be asked for, and more."""

    def draw(
        self, order: Mapping[str, Any], files: list[bytes], check: Callable[[], None]
    ) -> tuple[list[NDArray[np.uint8] | AddbenchError], list[dict[str, Any]], dict[str, float]]:
        """Pictures or errors, notes for each, and milliseconds by stage.

        Args:
            check: called between stages; it raises where the batch was cancelled.
        """


Tell = Callable[..., None]
Load = Callable[[Mapping[str, Any], "Progress"], Drawer]


class Studio:
    """One worker's loop."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.orders: queue.SimpleQueue[tuple[dict[str, Any], bytes] | None] = queue.SimpleQueue()
        self.cancelled: set[int] = set()
        self.encoding = ThreadPoolExecutor(1)
        self._sending = threading.Lock()

    def tell(self, event: str, body: bytes = b"", **fields: Any) -> None:
        with self._sending:
            self.stream.sendall(frame({"event": event, **fields}, body))

    def tell_loading(self, stage: str, share: float | None = None) -> None:
        self.tell("loading", stage=stage, share=share)

    def listen(self) -> None:
        """Take what the server sends until it closes the socket."""
        while (message := receive_frame(self.stream)) is not None:
            if message[0]["do"] == "cancel":
                self.cancelled.add(message[0]["id"])
            else:
                self.orders.put(message)
        self.orders.put(None)

    def run(self, job: Mapping[str, Any], load: Load) -> int:
        try:
            artist = load(job, self.tell_loading)
            facts = artist.facts()
        except Exception as error:
            log(error)
            again = not isinstance(error, PreconditionError)
            self.tell("refused", error=as_dict(error), again=again)
            return 0
        self.tell("ready", **facts)
        threading.Thread(target=self.listen, daemon=True).start()
        while (message := self.orders.get()) is not None:
            self.draw(artist, *message)
        self.encoding.shutdown()
        return 0

    def draw(self, artist: Drawer, order: Mapping[str, Any], body: bytes) -> None:
        number = order["id"]

        def check() -> None:
            if number in self.cancelled:
                raise CancelledError

        files, start = [], 0
        for picture in order["pictures"]:
            files.append(body[start : start + picture["bytes"]])
            start += picture["bytes"]
        try:
            images, notes, ms = artist.draw(order, files, check)
        except CancelledError:
            self.tell("failed", id=number, error=None)
        except Exception as error:  # any library may raise anything: it becomes the batch's answer
            log(error)
            self.tell("failed", id=number, error=as_dict(error))
        else:
            self.tell("drawn", id=number)
            self.encoding.submit(self.send, order, images, notes, ms)
        self.cancelled.discard(number)

    def send(
        self,
        order: Mapping[str, Any],
        images: list[NDArray[np.uint8] | AddbenchError],
        notes: list[dict[str, Any]],
        ms: dict[str, float],
    ) -> None:
        """Write the pictures' files and send them."""
        try:
            started, files, pictures = time.perf_counter(), [], []
            for picture, image, note in zip(order["pictures"], images, notes, strict=True):
                if isinstance(image, AddbenchError):
                    pictures.append({"error": as_dict(image), "bytes": 0})
                    continue
                files.append(encoded(image, picture["format"]))
                pictures.append({"bytes": len(files[-1]), "notes": note})
            ms = ms | {"encode": 1e3 * (time.perf_counter() - started)}
        except Exception as error:
            log(error)
            self.tell("failed", id=order["id"], error=as_dict(error))
        else:
            self.tell("done", b"".join(files), id=order["id"], pictures=pictures, ms=ms)


def encoded(image: NDArray[np.uint8], format: str) -> bytes:
    """The file of a picture."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format, **SAVED[format])
    return file.getvalue()


def as_dict(error: BaseException) -> dict[str, Any]:
    """An error as the server passes it on; `mine`: it is the caller's."""
    if isinstance(error, AddbenchError):
        return error.as_dict() | {"mine": isinstance(error, PreconditionError)}
    return {
        "type": type(error).__name__,
        "what": f"drawing failed with {type(error).__name__}",
        "why": "a library raised it",
        "next": "its traceback is in the worker's log",
        "mine": False,
    }


def log(error: BaseException) -> None:
    """Write to the log where an error came from; its own text may hold a prompt and is left out."""
    if not isinstance(error, PreconditionError):
        traceback.print_tb(error.__traceback__)
        print(type(error).__name__, file=sys.stderr, flush=True)


def load_artist(job: Mapping[str, Any], progress: Progress) -> Drawer:
    from serve.artist import load

    return load(job, progress)


def main(load: Load = load_artist) -> int:
    descriptor, job = int(sys.argv[1]), json.loads(sys.argv[2])
    die_with_parent(job["parent"])
    os.dup2(2, 1)  # what libraries print goes to the log
    return Studio(socket.socket(fileno=descriptor)).run(job, load)


if __name__ == "__main__":
    raise SystemExit(main())
