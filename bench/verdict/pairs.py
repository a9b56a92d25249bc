"""What `addbench versus` compares: a cell in words, and the pairs that people quote."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.errors import PreconditionError

NOT_AXES = ("model", "rounds", "min-samples", "min-time", "max-time", "warmup", "quality", "quick",
            "no-images", "no-roofline", "timeout", "budget", "out", "resume", "retry-failed",
            "dry-run")  # fmt: skip
"""Flags of `addbench sweep` that say how to measure, or where the rows go: not what."""


@dataclass(frozen=True)
class Pair:
    """A ready-made comparison.

    Attributes:
        base, head: as `--base` and `--head` take them.
        published: ids of `data/published_figures.csv`, the ratio first, shown beside ours.
    """

    base: str
    head: str
    title: str
    published: tuple[str, ...]


PAIRS = {
    "sd15-vs-turbo": Pair(
        base="sd15 steps=20 size=512x512 decoder=vae",
        head="sdxl-turbo steps=1 size=512x512 decoder=vae",
        title="SD 1.5 at 20 steps against SDXL-Turbo at 1, 512 px",
        published=("a10g-speedup", "a10g-sd15-20step", "a10g-1img-180"),
    ),
    "sdxl-vs-turbo": Pair(
        base="sdxl-base steps=50 size=512x512 decoder=vae",
        head="sdxl-turbo steps=1,2,3,4 size=512x512 decoder=vae",
        title="SDXL at 50 steps against SDXL-Turbo at 1 to 4, 512 px (ADD paper, Fig. 5)",
        published=("steps-12x",),
    ),
}


def sweep_arguments(spec: str, usual: Mapping[str, str]) -> list[str]:
    """`MODEL key=value ...` as the arguments of `addbench sweep`; `usual` where a key is not given.

    Raises:
        PreconditionError: it names no model, a word is no `key=value`, or a key says how to
            measure instead of what.
    """
    words = shlex.split(spec)
    if not words or "=" in words[0]:
        raise PreconditionError(
            f"{spec!r} names no model",
            "the first word is a model's name or a bundle's folder, then come key=value",
            'write it like "sdxl-turbo steps=1 decoder=taesd"',
        )
    given = dict(usual)
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or not key or not value or key in NOT_AXES:
            why = (
                "both cells are measured in one way, by flags of bench.commands.versus"
                if key in NOT_AXES
                else "after the model's name every word is key=value"
            )
            raise PreconditionError(
                f"{word!r} in {spec!r} is not understood",
                why,
                "keys are the axes of `addbench sweep --help`: steps, batch, decoder, ...",
            )
        given[key] = value
    return ["--model", words[0], *flags(given)]


def flags(given: Mapping[str, str]) -> Sequence[str]:
    return [piece for key, value in given.items() for piece in (f"--{key}", value)]
