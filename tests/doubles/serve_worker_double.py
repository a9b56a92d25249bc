"""A worker of `serve` without a model: a test double of all that computes.

The picture is made of the hash of prompt, seed, steps and decoder, so that a client can tell
whether it was given its own. Prompts that begin with `die`, `fail`, `refuse`, `hang` and `nan` do
so. The job says `draw_ms` (of a call, each picture after the first adds a quarter), `load_ms`,
`sizes`, `side` in pixels, and `load`: "refuse" or "crash".
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from numpy.typing import NDArray

from core.errors import AddbenchError, PreconditionError
from serve.worker import main

if TYPE_CHECKING:
    from serve.artist import Progress

SIDE = 8


def expected(
    prompt: str,
    seed: int,
    steps: int = 1,
    decoder: str = "vae",
    side: int = SIDE,
    picture: bytes = b"",
    strength: float | None = None,
) -> NDArray[np.uint8]:
    """The picture of a brief."""
    key = f"{prompt}|{seed}|{steps}|{decoder}".encode("utf-8", "surrogatepass")
    key += picture + str(strength).encode()
    data = hashlib.shake_128(key).digest(side * side * 3)
    return np.frombuffer(data, np.uint8).reshape(side, side, 3)


class Scripted:
    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job

    def facts(self) -> dict[str, Any]:
        return {"sizes": self.job["sizes"], "remarks": []}

    def draw(
        self, order: Mapping[str, Any], files: list[bytes], check: Callable[[], None]
    ) -> tuple[list[NDArray[np.uint8] | AddbenchError], list[dict[str, Any]], dict[str, float]]:
        check()
        pictures = order["pictures"]
        assert len(pictures) in self.job["sizes"]
        prompts = [picture["prompt"] for picture in pictures]
        for prompt in prompts:
            if prompt.startswith("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if prompt.startswith("hang"):
                time.sleep(1e6)
            if prompt.startswith("fail"):
                raise AddbenchError("the double failed", "it was told so", "tell it nothing")
            if prompt.startswith("raise"):
                raise ValueError(f"a library quotes {prompt}")
        ms = self.job["draw_ms"] * (1 + (len(pictures) - 1) / 4)
        until = time.monotonic() + ms / 1e3
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.005))
            check()
        images: list[NDArray[np.uint8] | AddbenchError] = [
            PreconditionError("this one is refused", "it was told so", "tell it nothing")
            if picture["prompt"].startswith("refuse")
            else expected(
                picture["prompt"],
                picture["seed"],
                order["steps"],
                order["decoder"],
                self.job["side"],
                file,
                order["strength"],
            )
            for picture, file in zip(pictures, files, strict=True)
        ]
        notes = [{"tokens": len(prompt.split()) + 2} for prompt in prompts]
        return images, notes, {"text": 0.1, "unet": ms, "total": ms}


def load(job: Mapping[str, Any], progress: Progress) -> Scripted:
    progress("the double loads", share=0.0)
    time.sleep(job["load_ms"] / 2e3)
    progress("the double loads, part 2 of 2", share=0.5)
    time.sleep(job["load_ms"] / 2e3)
    if job["load"] == "refuse":
        raise PreconditionError("the double does not load", "it was told so", "tell it nothing")
    if job["load"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return Scripted(job)


if __name__ == "__main__":
    raise SystemExit(main(load))
