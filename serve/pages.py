"""The page's files, and what it must know of the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from distill.shapes import SHAPES
from serve.fields import LONGEST_PROMPT
from serve.model import ServedModel

if TYPE_CHECKING:
    from serve.app import Application

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css",
         ".svg": "image/svg+xml"}  # fmt: skip
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
STEP_CHOICES = (1, 2, 4, 8, 20, 50)
"""Steps that the page has buttons for, as far as the model takes them."""
COOKIE = "addbench-token"


def page_facts(model: ServedModel) -> dict[str, Any]:
    """What the page knows of the model; `tree`, `colours` and `examples` of its grammar, where it
    has one."""
    choices = [n for n in STEP_CHOICES if n in model.step_counts and n <= max(4, model.steps)]
    facts: dict[str, Any] = {
        "name": model.name,
        "width": model.width,
        "height": model.height,
        "steps": model.steps,
        "step_choices": sorted({*choices, model.steps}),
        "decoders": list(model.decoders),
        "pictures": model.pictures,
        "pairs": [list(pair) for pair in model.pairs or (model.pair,)],
        "longest": LONGEST_PROMPT,
        "sentence": "It draws while you type.",
        "tree": None,
        "examples": ["a lighthouse at dusk, oil on canvas"],
    }
    if model.judge == "shapes":
        from serve.grammar import page_grammar

        plurals = [f"{shape}s" for shape in SHAPES]
        known = f"{', '.join(plurals[:-1])} and {plurals[-1]}"
        facts |= {"sentence": f"It draws {known}, and nothing else.", **page_grammar()}
    return facts


class Pages:
    """The page, and what belongs to it."""

    def __init__(self, app: Application, token: str) -> None:
        self.app, self.token = app, token
        self.files = {file.name: file.read_bytes() for file in FOLDER.iterdir() if file.is_file()}

    async def file(self, request: Request) -> Response:
        name = request.url.path.lstrip("/") or "index.html"
        if self.token and "token" in request.query_params:
            # It opened the door; from here on it is a cookie, and in no address.
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return answer
        media_type = TYPES[Path(name).suffix]
        return Response(self.files[name], media_type=media_type, headers=HEADERS)

    async def facts(self, _: Request) -> Response:
        return JSONResponse(page_facts(self.app.model), headers={"Cache-Control": "no-cache"})
