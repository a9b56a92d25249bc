"""A server in a thread of this process, with test doubles for workers, and clients of it."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import serve_worker_double as double
from numpy.typing import NDArray
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from core.files import ROOT
from serve.app import LOOPBACK, Application
from serve.engine import Post
from serve.envelope import pack, unpack
from serve.model import ServedModel
from serve.server import Listener, Uvicorn, run

MODEL = ServedModel("double", double.SIDE, double.SIDE, 1, (1, 2, 4), ("vae", "taesd"))
COMMAND = (sys.executable, str(ROOT / "tests" / "doubles" / "serve_worker_double.py"))
WAIT_S = 60.0
"""For what must happen at all, on however busy a machine."""


class Running:
    """A server that runs in a thread of this process."""

    def __init__(self, app: Application) -> None:
        self.app = app
        listening = Listener("127.0.0.1", 0).bind()
        self.port = listening.getsockname()[1]
        self.server = Uvicorn(app, drain_s=10.0)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(listening,), daemon=True)
        self.thread.start()

    def _run(self, listening: socket.socket) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await run(self.app, self.server, listening)

        try:
            asyncio.run(serve())
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()

    def wait_ready(self) -> Running:
        until(lambda: self.app.engine.ready or self.error is not None)
        return self

    # ---- clients

    def call(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers, and the body: JSON where it is."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        data: bytes | None = None
        if isinstance(body, bytes):
            data = body
        elif body is not None:
            data = json.dumps(body).encode()
            sent = {"Content-Type": "application/json", **sent}
        client.request(method, path, data, sent)
        response = client.getresponse()
        content = response.read()
        client.close()
        got = {name.lower(): value for name, value in response.getheaders()}
        is_json = got.get("content-type", "").startswith("application/json")
        return response.status, got, json.loads(content) if is_json else content

    def draw(self, **body: Any) -> tuple[int, dict[str, str], Any]:
        return self.call("POST", "/v1/images/generations", body)

    @contextmanager
    def live(self, query: str = "?format=png", **rest: Any) -> Iterator[Typist]:
        with connect(f"ws://127.0.0.1:{self.port}/live{query}", max_size=None, **rest) as socket:
            yield Typist(socket)

    def metric(self, name: str) -> float:
        _, _, text = self.call("GET", "/metrics")
        lines = [line for line in text.decode().splitlines() if line.startswith(f"addbench_{name}")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


class Typist:
    """A live connection."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.statuses: list[dict[str, Any]] = []

    def send(self, number: int, prompt: str, **rest: Any) -> None:
        self.socket.send(pack({"id": number, "prompt": prompt, **rest}))

    def answer(self, timeout: float = WAIT_S) -> tuple[dict[str, Any], bytes]:
        """The next answer that is no status."""
        while True:
            message = self.socket.recv(timeout)
            assert isinstance(message, bytes)
            header, body = unpack(message)
            if "status" not in header:
                return header, body
            self.statuses.append(header)

    def answers_until(self, number: int) -> list[tuple[dict[str, Any], bytes]]:
        """All answers up to that of `number`."""
        answers = [self.answer()]
        while answers[-1][0]["id"] != number:
            answers.append(self.answer())
        return answers


def until(true: Callable[[], object], seconds: float = WAIT_S) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def pixels(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def is_picture_of(file: bytes, prompt: str, seed: int, **rest: Any) -> bool:
    """Whether a PNG is the double's picture of that brief."""
    return np.array_equal(pixels(file), double.expected(prompt, seed, **rest))


def decoded(answer: Any) -> list[bytes]:
    """The files in the API's answer."""
    return [base64.b64decode(entry["b64_json"]) for entry in answer["data"]]


def serving(log: Path, *, workers: int = 1, model: ServedModel = MODEL, **given: Any) -> Running:
    """Start a server over doubles; fields of their job and limits of the server by name."""
    job = {"draw_ms": 2.0, "load_ms": 0.0, "sizes": [1, 2, 4], "load": "well", "side": 8}
    job |= {key: given.pop(key) for key in list(given) if key in job}
    posts = [Post(f"double-{n}", job, log / f"worker-{n}.log", COMMAND) for n in range(workers)]
    return Running(Application(model, posts, hosts=LOOPBACK, **given))
