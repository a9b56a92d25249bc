"""`/live`: a picture for every keystroke, over one WebSocket.

A message is an envelope with `id`, `prompt` and what else `serve.fields.LIVE` has (a text message:
the JSON alone); the answer an envelope with the same id and the picture's file. A connection has
one slot in and one slot out: in each of them the newest wins, so nothing ever queues, and what was
sent last is always drawn. Idle costs nothing.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from starlette.websockets import WebSocket, WebSocketDisconnect

from core.errors import AddbenchError
from serve.brief import FORMATS, Drawing, Format, GoneError, Ticket
from serve.envelope import EnvelopeError, pack, read_object, unpack
from serve.errors import ApiError, api_error, draining
from serve.fields import choice, read_live

if TYPE_CHECKING:
    from serve.app import Application

MOST_CONNECTIONS = 64
LARGEST_MESSAGE = 8 << 20
BAD_DATA, TRY_LATER = 1007, 1013


class Connection:
    """One client: what is to be sent to it, the newest of each kind."""

    def __init__(self, socket: WebSocket, app: Application, format: Format) -> None:
        self.socket, self.app, self.format = socket, app, format
        self.status: bytes | None = None
        self.answer: bytes | None = None
        self.skipped = 0
        self.news = asyncio.Event()

    def tell_status(self) -> None:
        engine = self.app.engine
        told = {"status": self.app.status, "stage": engine.stage, "progress": engine.share}
        self.status = pack(told)
        self.news.set()

    def put_answer(self, message: bytes) -> None:
        if self.answer is not None:  # the client has not read the one before
            self.skipped += 1
            self.app.metrics.replaced.inc()
        self.answer = message
        self.news.set()

    def refuse(self, number: object, error: AddbenchError) -> None:
        known = api_error(error)
        told = {"what": known.what, "why": known.why, "next": known.next, "code": known.code}
        if known.param is not None:
            told["param"] = known.param
        self.put_answer(pack({"id": number, "error": told}))

    # ---- in

    def take(self, message: dict[str, Any]) -> None:
        """Put what a client sent in its slot.

        Raises:
            EnvelopeError: it is no envelope, and the connection is to be closed.
        """
        if (text := message.get("text")) is not None:
            header, body = read_object(text), b""
        else:
            header, body = unpack(message["bytes"])
        number = header.get("id")
        number = number if isinstance(number, int) and abs(number) <= 2**53 else None
        try:
            if self.app.draining:
                raise draining()
            brief = read_live(header, body, self.app.model, self.format)
        except ApiError as error:
            self.refuse(number, error)
            return
        ticket = self.app.engine.ticket(brief)
        ticket.result.add_done_callback(partial(self.done, number, ticket))
        self.app.engine.waiting.put(self, ticket)
        self.app.engine.cancel_stale(self)

    def done(self, number: int | None, ticket: Ticket, result: asyncio.Future[Drawing]) -> None:
        error = result.exception()
        if isinstance(error, GoneError):
            self.skipped += 1
        elif isinstance(error, AddbenchError):
            self.refuse(number, error)
        elif error is None:
            picture = result.result()
            server = 1e3 * (self.app.engine.now() - ticket.arrived)
            header = {
                "id": number,
                "format": picture.format,
                "skipped": self.skipped,
                "batch": picture.batch,
                "ms": {**picture.ms, "server": round(server, 3)},
                **picture.notes,
            }
            self.put_answer(pack(header, picture.data))
            self.skipped = 0

    # ---- out

    async def send(self) -> None:
        """Send what is newest, whenever the client reads."""
        while True:
            await self.news.wait()
            self.news.clear()
            for name in ("status", "answer"):
                message = getattr(self, name)
                if message is not None:
                    setattr(self, name, None)
                    await self.socket.send_bytes(message)


class Live:
    """All live connections."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.connections: set[Connection] = set()

    def tell_status(self) -> None:
        for connection in self.connections:
            connection.tell_status()

    async def serve(self, socket: WebSocket) -> None:
        """One connection, from its handshake to its end."""
        await socket.accept()
        if (refusal := self._refusal(socket)) is not None:
            told = {"what": refusal.what, "why": refusal.why, "next": refusal.next}
            await socket.send_bytes(pack({"id": None, "error": told}))
            await socket.close(TRY_LATER, refusal.what[:100])
            return
        connection = Connection(
            socket, self.app, cast(Format, socket.query_params.get("format", "jpeg"))
        )
        self.connections.add(connection)
        self.app.metrics.connections.inc()
        connection.tell_status()
        sending = asyncio.create_task(connection.send())
        try:
            while True:
                message = await socket.receive()
                if message["type"] == "websocket.disconnect":
                    break
                try:
                    connection.take(dict(message))
                except EnvelopeError as error:
                    await socket.close(BAD_DATA, f"{error.what}: {error.why}"[:120])
                    break
        except WebSocketDisconnect:
            pass
        finally:
            self.connections.discard(connection)
            self.app.metrics.connections.dec()
            sending.cancel()
            await asyncio.wait([sending])
            sending.cancelled() or sending.exception()
            self.app.engine.leave(connection)

    def _refusal(self, socket: WebSocket) -> ApiError | None:
        if self.app.draining:
            return draining()
        try:
            choice("format", socket.query_params.get("format", "jpeg"), tuple(FORMATS))
        except ApiError as error:
            return error
        if len(self.connections) >= MOST_CONNECTIONS:
            return ApiError(
                "there are too many live connections", f"{MOST_CONNECTIONS} are open, the most",
                "try again when somebody has left",
            )  # fmt: skip
        return None
