"""One server process, from its address to its end: SIGTERM finishes what there is."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from core.errors import EXIT_OK, PreconditionError
from core.files import build_root
from serve.app import LOOPBACK, Application
from serve.engine import Post
from serve.live import LARGEST_MESSAGE
from serve.model import ServedModel

LOGS = "serve"
"""Folder below the build folder: what the workers wrote."""
UNSENT = 1 << 15
"""Bytes that the system holds for a client that does not read: what is kept back in here can
still be replaced by something newer."""

MOST_OPEN = 800
"""Connections at once, live ones among them: the usual limit of a process is 1024 files."""
HEAD_S = 10.0
"""What the head of a request may take to come."""


@dataclass(frozen=True)
class Listener:
    """Where a server is reached, and the token that opens it ("": none)."""

    host: str
    port: int
    token: str = ""

    def bind(self) -> socket.socket:
        """The listening socket.

        Raises:
            PreconditionError: the address is taken, or none of this machine's.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        # By its protocol asyncio knows connections of it as TCP's, and sends without waiting for
        # what was sent before: a body that does costs 40 ms behind its head.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # connections have it of their listener
                bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
            bound.bind((self.host, self.port))
            bound.listen(2048)
        except OSError as error:
            bound.close()
            raise PreconditionError(
                f"{self.host}:{self.port} cannot be listened on", error.strerror or str(error),
                "end what listens there, or take another port: --port 0 is any that is free",
            ) from error  # fmt: skip
        return bound

    @property
    def shown(self) -> str:
        """The host as an address has it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def loopback(self) -> bool:
        return self.host in LOOPBACK or self.host.startswith("127.")


class Door(H11Protocol):
    """An HTTP connection, of which there are so many at most, and whose request has a time to
    come: one that dribbles the head of a request keeps its place for no longer."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_OPEN:
            self.turn_away(503, f"{MOST_OPEN} connections are open, the most; try again later")
        else:
            self.wait_for_head()

    def wait_for_head(self) -> None:
        """Give the next request its time to come."""
        self.timer = self.loop.call_later(HEAD_S, self.late)

    def late(self) -> None:
        self.timer = None
        if self.cycle is None or self.cycle.response_complete:  # else a request is being answered
            self.turn_away(408, f"the head of a request has {HEAD_S:g} s; send it at once")

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.timer is not None and self.cycle is not before:  # a head has come
            self.timer.cancel()
            self.timer = None

    def handle_websocket_upgrade(self, event: Any) -> None:
        self.forget()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.forget()
        self.wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.forget()
        super().connection_lost(exc)

    def forget(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def turn_away(self, status: int, why: str) -> None:
        """Say why in one line, and close."""
        body = json.dumps({"error": {"message": why, "type": "server_error", "code": None}})
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"
        )
        self.transport.write((head + body).encode())
        self.transport.close()


class Uvicorn(uvicorn.Server):
    """uvicorn, which on the first signal finishes what it has, and on the second one ends."""

    def __init__(self, app: Application, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,  # it would show tokens
                lifespan="off",
                http=Door,
                ws="websockets-sansio",
                ws_max_size=LARGEST_MESSAGE,
                ws_per_message_deflate=False,  # pictures are compressed
                timeout_graceful_shutdown=2,
                server_header=False,
            )
        )
        self.app, self.drain_s = app, drain_s
        self.signal = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.signal:
            self.should_exit = self.force_exit = True
        elif self._loop is not None:
            self.signal = sig
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        async def drained() -> None:
            self.app.say("shutting down: what is waiting is drawn, nothing new is taken")
            await self.app.drain(self.drain_s)
            self.should_exit = True

        if self._draining is None:
            self._draining = asyncio.create_task(drained())


async def run(app: Application, server: Uvicorn, listening: socket.socket) -> None:
    """Serve until a signal, or until no worker can be started.

    Raises:
        AddbenchError: none could.
    """
    engine = asyncio.create_task(app.engine.run())
    serving = asyncio.create_task(server.serve([listening]))
    await asyncio.wait((engine, serving), return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    app.engine.close()
    await engine


def serve(
    model: ServedModel,
    jobs: Mapping[str, Mapping[str, Any]],
    listener: Listener,
    *,
    drain_s: float = 30.0,
    **limits: Any,
) -> int:
    """Serve a model until a signal comes.

    Args:
        jobs: what each worker loads, by its backend.
        limits: of `Application`: queue, deadline_s, window_s, timeout_s, stops_stale.
    """

    def say(line: str) -> None:
        print(line, flush=True)

    listening = listener.bind()
    port = listening.getsockname()[1]
    posts = []
    for number, (name, job) in enumerate(jobs.items()):
        log = build_root() / LOGS / f"worker-{port}-{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        posts.append(Post(name, job, log))
    names = (*LOOPBACK, listener.host) if listener.loopback else ()
    app = Application(model, posts, hosts=names, token=listener.token, say=say, **limits)
    say(f"{model.name} on {', '.join(jobs)}: http://{listener.shown}:{port}/  (loading)")
    if not listener.loopback and not listener.token:
        say(
            "  it stands open: whoever reaches this address can draw. --token closes it; the"
            " connection is not encrypted, which is a reverse proxy's business"
        )
    server = Uvicorn(app, drain_s)
    asyncio.run(run(app, server, listening))
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt
    return EXIT_OK
