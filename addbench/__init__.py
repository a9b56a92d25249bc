"""The front door: `addbench VERB` on a command line, and in Python `import addbench`.

    pipe = addbench.load_pipeline("shapes-turbo", backend="ort")
    images = pipe(["a red circle left of a blue square"], steps=1, seed=7).images

    base = addbench.sweep(addbench.Request("shapes-turbo", backends=["ort"], steps=[1, 2]))
    head = addbench.sweep(addbench.Request("shapes-turbo", backends=["ort"], steps=[1, 2]))
    outcome = addbench.compare(base, head)

    decision = addbench.choose(base, "latency<=4s psnr>=40dB")
    addbench.recipe_of(decision).write("recipe.toml")

What is imported here imports torch and the rest only when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.load import load_pipeline
    from bench.run.api import choose, compare, sweep
    from bench.run.request import Request, Sampling
    from bench.verdict.choosing.lock import recipe_of

__all__ = [
    "Request",
    "Sampling",
    "choose",
    "compare",
    "load_pipeline",
    "recipe_of",
    "sweep",
]

PLACES = {
    "Sampling": "bench.run.request",
    "Request": "bench.run.request",
    "choose": "bench.run.api",
    "compare": "bench.run.api",
    "load_pipeline": "backends.load",
    "recipe_of": "bench.verdict.choosing.lock",
    "sweep": "bench.run.api",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
