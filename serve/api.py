"""`/v1/images/generations` and `/v1/models`: what OpenAI's client libraries speak."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from core.errors import AddbenchError
from serve.brief import FORMATS, Drawing, Ticket
from serve.envelope import EnvelopeError, read_object
from serve.errors import ApiError, api_error
from serve.fields import EDIT, Generation, from_form, no_such_field, read_generation

if TYPE_CHECKING:
    from serve.app import Application

LARGEST_JSON = 1 << 20
LARGEST_PICTURE = 8 << 20
DISCARDED = 1 << 26
"""Bytes of a body that is too large which are still read, so that its sender hears why."""
BODY_S = 60.0
"""Seconds that a body may take to arrive."""


class ImagesApi:
    """The endpoints that draw."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def models(self, _: Request) -> Response:
        model = self.app.model
        entry = {
            "id": model.name,
            "object": "model",
            "created": self.app.created,
            "owned_by": "addbench",
            "size": model.size,
            "steps": model.steps,
            "decoders": list(model.decoders),
            "licence": model.licence,
            "weights": model.weights,
            "bundle": model.hash,
            "workers": [
                {"backend": attendant.post.name, "state": attendant.state, **attendant.facts}
                for attendant in self.app.engine.attendants
            ],
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def generations(self, request: Request) -> Response:
        if (kind := content_type(request)) != "application/json":
            raise unsupported_media(kind, "application/json")
        self.app.require_open()
        try:
            body = read_object(await read_body(request, LARGEST_JSON, "a request"))
        except EnvelopeError as error:
            raise ApiError(
                "the body is not a JSON object", error.why, 'send {"prompt": "a red circle"}',
                code="invalid_json",
            ) from error  # fmt: skip
        return await self.draw(request, read_generation(body, self.app.model))

    async def edits(self, request: Request) -> Response:
        if (kind := content_type(request)) != "multipart/form-data":
            raise unsupported_media(kind, "multipart/form-data")
        self.app.require_ready()
        if not self.app.model.pictures:
            raise ApiError(
                f"{self.app.model.name} does not start from a picture",
                "its bundle has no encoder of pictures, or its backend cannot run one",
                "export it again, or use a backend as ort", status=404, code="not_supported",
            )  # fmt: skip
        body = await read_body(request, LARGEST_PICTURE + LARGEST_JSON, "a picture with its fields")
        fields, picture = await read_form(request, body)
        return await self.draw(request, read_generation(fields, self.app.model, picture))

    async def draw(self, request: Request, generation: Generation) -> Response:
        """Queue the pictures, wait for all of them, answer; where the client leaves, drop them."""
        self.app.require_ready()
        tickets = [self.app.engine.ticket(brief) for brief in generation.briefs]
        self.app.engine.waiting.admit(tickets)
        pictures = await self._all(request, tickets)
        headers = {"Server-Timing": server_timing(pictures)}
        if generation.as_file:
            return Response(
                pictures[0].data, media_type=FORMATS[pictures[0].format], headers=headers
            )
        data = [
            {
                "b64_json": base64.b64encode(picture.data).decode(),
                "seed": brief.seed,
                **picture.notes,
            }
            for brief, picture in zip(generation.briefs, pictures, strict=True)
        ]
        brief = generation.briefs[0]
        answer = {
            "created": int(time.time()),
            "data": data,
            "output_format": brief.format,
            "size": self.app.model.size,
        }
        text = json.dumps(answer, separators=(",", ":"))
        return Response(text, media_type="application/json", headers=headers)

    async def _all(self, request: Request, tickets: Sequence[Ticket]) -> list[Drawing]:
        """The pictures of all tickets.

        Raises:
            ClientDisconnect: the client left before.
        """
        results = [ticket.result for ticket in tickets]
        drawn = asyncio.create_task(asyncio.wait(results, return_when=asyncio.FIRST_EXCEPTION))
        leaving = asyncio.create_task(left(request))
        try:
            await asyncio.wait((drawn, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not drawn.done():
                raise ClientDisconnect
            for result in results:
                if result.done() and (error := result.exception()) is not None:
                    raise error
            return [result.result() for result in results]
        except AddbenchError as error:
            raise api_error(error) from error
        finally:
            leaving.cancel()
            drawn.cancel()
            self.app.engine.abandon(tickets)  # those that are done are left alone


async def left(request: Request) -> None:
    """Return when the client has closed its connection. The body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_form(request: Request, body: bytes) -> tuple[dict[str, Any], bytes]:
    """The fields of a form, and the file of its picture.

    Raises:
        ApiError: it is no form, has no picture or several, or one that is too large.
    """

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield body

    def refused(what: str, why: str, next: str, param: str | None = "image") -> ApiError:
        return ApiError(what, why, next, param=param)

    fields: dict[str, Any] = {}
    files: list[bytes] = []
    try:
        form = await MultiPartParser(request.headers, pieces(), max_files=2, max_fields=32).parse()
    except (MultiPartException, ValueError, KeyError, AssertionError) as error:
        raise refused(
            "the form cannot be read", "it is damaged, or has too many parts",
            "send multipart/form-data with image and prompt", None,
        ) from error  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in ("image", "image[]"):
                    no_such_field(name, ("image", *EDIT))
                files.append(await value.read())
            elif name in fields:
                raise refused(f"{name[:40]} stands twice", "a field has one value", "send it once",
                              name[:40])  # fmt: skip
            else:
                fields[name] = from_form(name, value)
    if len(files) != 1 or not files[0]:
        raise refused(f"the form has {len(files)} pictures" if files else "there is no picture",
                      "one is redrawn", "send the file as image")  # fmt: skip
    if len(files[0]) > LARGEST_PICTURE:
        raise too_large(LARGEST_PICTURE, "a picture")
    return fields, files[0]


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def unsupported_media(kind: str, wanted: str) -> ApiError:
    return ApiError(
        f"a body of type {kind[:60] or 'nothing'} is not understood", f"this endpoint reads"
        f" {wanted}", f"send it with Content-Type: {wanted}", status=415,
        code="unsupported_media_type",
    )  # fmt: skip


async def read_body(request: Request, most: int, what: str) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is larger than `most` (413), or does not arrive (408).
    """
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                size += len(piece)
                if size <= most:
                    pieces.append(piece)
                elif size > DISCARDED:
                    break
    except TimeoutError:
        raise ApiError(
            "the body did not arrive", f"it has {BODY_S:g} s", "send it at once", status=408,
            code="timeout",
        ) from None  # fmt: skip
    if size > most:
        raise too_large(most, what)
    return b"".join(pieces)


def too_large(most: int, what: str) -> ApiError:
    return ApiError(
        "the body is too large", f"{what} has at most {most / 1e6:.1f} MB", "send less",
        status=413, code="too_large",
    )  # fmt: skip


def server_timing(pictures: Sequence[Drawing]) -> str:
    """The header for the stages of the picture that took longest."""
    slowest: Mapping[str, Any] = max((picture.ms for picture in pictures), key=sum_of)
    return ", ".join(f"{name};dur={ms:g}" for name, ms in slowest.items())


def sum_of(ms: Mapping[str, float]) -> float:
    return ms.get("queue", 0.0) + ms.get("total", 0.0)
