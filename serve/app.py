"""The server put together: routes, who may enter, errors, and how it starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import AddbenchError
from serve.api import ImagesApi
from serve.engine import Attendant, Engine, Post
from serve.errors import ApiError, api_error, draining, loading
from serve.live import Live
from serve.metrics import Metrics
from serve.model import ServedModel
from serve.pages import COOKIE, Pages

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/health", "/health/live")
"""What answers without the token."""
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Application:
    """The ASGI application, over an engine that its owner runs.

    Args:
        hosts: names by which the server may be called; () for any.
        token: what every request must carry; "" for none.
    """

    def __init__(
        self,
        model: ServedModel,
        posts: Sequence[Post],
        *,
        queue: int = 16,
        deadline_s: float = 30.0,
        window_s: float = 0.0,
        timeout_s: float = 600.0,
        stops_stale: bool = False,
        hosts: Sequence[str] = (),
        token: str = "",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.say = model, say
        self.created = int(time.time())
        self.draining = False
        self.answering = 0
        """HTTP requests that are being answered."""
        self.metrics = Metrics()
        self.engine = Engine(
            posts, metrics=self.metrics, queue=queue, deadline_s=deadline_s, window_s=window_s,
            timeout_s=timeout_s, stops_stale=stops_stale, say=say,
        )  # fmt: skip
        self.engine.on_change = self._changed
        for post in posts:
            self.metrics.model.labels(model.name, post.name, model.size, model.hash).set(1)
        self.live = Live(self)
        images, pages = ImagesApi(self), Pages(self, token)
        routes: list[Route | WebSocketRoute] = [
            Route("/health", self.health, methods=["GET"]),
            Route("/health/live", self.alive, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
            Route("/v1/models", images.models, methods=["GET"]),
            Route("/v1/images/generations", images.generations, methods=["POST"]),
            Route("/v1/images/edits", images.edits, methods=["POST"]),
            WebSocketRoute("/live", self.live.serve),
            Route("/", pages.file, methods=["GET"]),
            Route("/page.json", pages.facts, methods=["GET"]),
            *(Route(f"/{name}", pages.file, methods=["GET"]) for name in pages.files),
        ]
        self.paths = {route.path for route in routes}
        inner = Starlette(
            routes=routes,
            exception_handlers={
                ApiError: _api_error,
                HTTPException: _http_error,
                ClientDisconnect: _nobody,
                Exception: _bug,
            },
        )
        self.asgi: ASGIApp = Guard(inner, self, hosts, token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.asgi(scope, receive, send)

    # ---- state

    @property
    def status(self) -> str:
        if self.draining:
            return "draining"
        return "ready" if self.engine.ready else "loading"

    def require_open(self) -> None:
        """Refuse what is new while the server shuts down."""
        if self.draining:
            raise draining()

    def require_ready(self) -> None:
        """Refuse while the model was never ready; a worker that is started anew is waited for."""
        self.require_open()
        if not any(attendant.facts for attendant in self.engine.attendants):
            raise loading(self.engine.stage)

    def _changed(self, attendant: Attendant) -> None:
        if attendant.state == "ready":
            decoders = tuple(attendant.facts.get("decoders", self.model.decoders))
            shared = tuple(name for name in self.model.decoders if name in decoders)
            pairs = tuple((steps, share) for steps, share in attendant.facts.get("pairs", ()))
            self.model = replace(
                self.model,
                decoders=shared or self.model.decoders,
                pictures=self.model.pictures and attendant.facts.get("pictures", True),
                pairs=pairs or self.model.pairs,
            )
            for remark in attendant.facts.get("remarks", ()):
                self.say(f"{attendant.post.name}: {remark}")
            sizes = ", ".join(map(str, attendant.facts["sizes"]))
            self.say(f"{attendant.post.name} is ready; batches of {sizes}")
        self.live.tell_status()

    async def drain(self, seconds: float) -> None:
        """Take nothing new, and return when what there is was answered, or the time is over."""
        self.draining = True
        self.live.tell_status()
        until = self.engine.now() + seconds
        while (self.answering or not self.engine.idle) and self.engine.now() < until:
            await asyncio.sleep(0.02)

    # ---- small endpoints

    async def health(self, _: Request) -> Response:
        body: dict[str, Any] = {"status": self.status, "model": self.model.name}
        if self.engine.stage:
            body |= {"stage": self.engine.stage, "progress": self.engine.share}
        ready = self.status == "ready"
        return JSONResponse(body, 200 if ready else 503, None if ready else {"Retry-After": "1"})

    async def alive(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def show_metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


class Guard:
    """Stands before every route: who may enter, the request's id, its metrics, what went wrong.

    Not one of Starlette's BaseHTTPMiddleware: behind those a client that leaves is not seen.
    """

    def __init__(self, inner: ASGIApp, app: Application, hosts: Sequence[str], token: str) -> None:
        self.inner, self.app, self.hosts, self.token = inner, app, hosts, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        refusal = self.refusal(scope, headers)
        if scope["type"] == "websocket":
            if refusal is not None:
                await _json(refusal)(scope, receive, send)  # HTTP, as the handshake's answer
            else:
                await self.inner(scope, receive, send)
            return
        app, started, code = self.app, time.perf_counter(), 499
        endpoint = scope["path"] if scope["path"] in app.paths else "other"

        async def sending(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        app.answering += 1
        try:
            if refusal is not None:
                await _json(refusal)(scope, receive, sending)
            else:
                await self.inner(scope, receive, sending)
        except Exception as error:  # it was answered by `_bug`
            traceback.print_tb(error.__traceback__)  # its own text may hold a prompt
            print(f"{type(error).__name__} in {endpoint}", file=sys.stderr, flush=True)
        finally:
            app.answering -= 1
            app.metrics.requests.labels(endpoint, str(code)).inc()
            app.metrics.seconds.labels(endpoint).observe(time.perf_counter() - started)

    def refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Why this request may not enter; None where it may."""
        host = headers.get("host", "")
        if self.hosts and hostname(f"//{host}") not in self.hosts:
            return ApiError(
                f"this server is not called {host[:60]!r}",
                "a page of another site may have given its name to this address",
                f"call it {self.hosts[0]}, or start it with --host", status=403, code="wrong_host",
            )  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and netloc(origin) != host:
            return ApiError(
                "a page of another origin may not use this server",
                f"{origin[:60]} is not http://{host[:60]}", f"open http://{host[:60]}/",
                status=403, code="wrong_origin",
            )  # fmt: skip
        if self.token and scope["path"] not in OPEN and not self.has_token(scope, headers):
            return ApiError(
                "the token is missing or wrong", "this server was started with --token",
                "send it as Authorization: Bearer TOKEN", status=401, code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return None

    def has_token(self, scope: Scope, headers: Headers) -> bool:
        """Whether a request carries the token: in its header, in the page's cookie, or once in
        the page's address."""
        request = HTTPConnection(scope)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        candidates = [request.cookies.get(COOKIE, "")]
        if scheme.lower() == "bearer":
            candidates.append(given.strip())
        if scope["path"] == "/":
            candidates.append(request.query_params.get("token", ""))
        return any(hmac.compare_digest(text.encode(), self.token) for text in candidates)


def hostname(url: str) -> str | None:
    with contextlib.suppress(ValueError):  # brackets that do not close
        return urlsplit(url).hostname
    return None


def netloc(url: str) -> str | None:
    with contextlib.suppress(ValueError):
        return urlsplit(url).netloc
    return None


def _json(error: ApiError) -> Response:
    return JSONResponse(error.as_json(), error.status, error.headers)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, AddbenchError)
    return _json(api_error(error))


async def _nobody(_: Request, __: Exception) -> Response:
    """What is sent where nobody is left to read it; the code is for the metrics."""
    return Response(status_code=499)


async def _bug(_: Request, __: Exception) -> Response:
    why, next = "this is a bug in addbench", "the server's terminal says where"
    return _json(ApiError("the server failed", why, next, status=500, code="internal_error"))


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses: no such path, or not by this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        what, next = "this path does not take that method", "use the other of GET and POST"
    else:
        what, next = (
            "there is nothing at this path",
            "GET / is the page, GET /v1/models says what is drawn",
        )
    status, headers = error.status_code, error.headers
    why = "the server has no such endpoint"
    return _json(ApiError(what, why, next, status=status, code="not_found", headers=headers))
