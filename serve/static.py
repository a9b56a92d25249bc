"""A folder of `addbench export web` over HTTP, with the headers that its page wants."""

from __future__ import annotations

import mimetypes
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import EXIT_OK, AddbenchError, PreconditionError
from core.files import read_json
from export.bundle import MANIFEST
from export.web.site import ISOLATION, KIND
from serve.server import Door, Listener

HEADERS = {
    **ISOLATION,
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval' blob:;"
    " worker-src 'self' blob:; img-src 'self' blob:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; object-src 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
COMPRESSION = 5
"""gzip's level: the runtime becomes a quarter; more takes seconds and saves little."""


class WithHeaders:
    """Puts HEADERS on every response of `inner`."""

    def __init__(self, inner: ASGIApp) -> None:
        self.inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.inner(scope, receive, sending)


def static_app(folder: Path) -> ASGIApp:
    """The ASGI application of a folder.

    Raises:
        PreconditionError: it is none of `addbench export web`.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, AddbenchError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise PreconditionError(
            f"{folder} is no folder of `addbench export web`",
            f"it has no {MANIFEST} of one",
            "make one: addbench export web shapes-turbo build/web",
        )
    for suffix in (".mjs", ".js"):
        mimetypes.add_type("text/javascript", suffix)
    mimetypes.add_type("application/wasm", ".wasm")
    inner = Starlette(routes=[Mount("/", StaticFiles(directory=folder, html=True))])
    return WithHeaders(GZipMiddleware(inner, compresslevel=COMPRESSION))


def serve_static(folder: Path, listener: Listener) -> int:
    """Serve a folder until a signal comes."""
    app = static_app(folder)
    if listener.token:
        raise PreconditionError(
            "--static takes no --token", "a folder's files are for whoever reaches the address",
            "leave the token out, or put a reverse proxy before it",
        )  # fmt: skip
    listening = listener.bind()
    port = listening.getsockname()[1]
    print(f"{folder}: http://{listener.shown}:{port}/", flush=True)
    if not listener.loopback:
        print("  browsers give threads and WebGPU to https and to localhost alone", flush=True)
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, lifespan="off", http=Door
    )
    uvicorn.Server(config).run(sockets=[listening])
    return EXIT_OK
