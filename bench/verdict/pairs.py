"""The pairs that people quote, as `addbench versus` compares them."""

from __future__ import annotations

from dataclasses import dataclass


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
