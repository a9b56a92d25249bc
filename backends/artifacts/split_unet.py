"""The UNet as two artifacts: what backends share that compile its graph whole or in halves.

`export/lower/context.py` cuts the graph; the pipeline runs CONTEXT_PART, the half of the
prompt alone, once a prompt, and the other at every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from backends.base import Option
from export.models import CONTEXT_PART

if TYPE_CHECKING:
    from export.bundle import Bundle

HALVES = (CONTEXT_PART, "unet")
OPTION = Option(
    "inline",
    "cross-attention's keys and values, which depend on the prompt alone: inline, in every"
    " UNet evaluation; split, once a prompt, in a graph of their own",
    choices=("inline", "split"),
)


def with_context(parts: Iterable[str], context: str) -> tuple[str, ...]:
    """`parts` in the order in which a pipeline runs them, the UNet in its halves where `context`
    splits it."""
    split = context == "split"
    return tuple(
        name for part in parts for name in (HALVES if split and part == "unet" else (part,))
    )


def form_of(part: str, context: str) -> Literal["inline", "input", "output"]:
    """`Profile.context` of `part`."""
    if part == CONTEXT_PART:
        return "output"
    return "input" if part == "unet" and context == "split" else "inline"


def stored_bytes(bundle: Bundle, part: str, context: str) -> int:
    """Return the bytes of the weights that the graph of `part` holds, as the bundle stores them."""
    from export.lower.context import weight_bytes

    info, form = bundle.source(part), form_of(part, context)
    return info.weight_bytes if form == "inline" else weight_bytes(info.graph, form)
