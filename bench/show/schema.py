"""The tables of results/README.md that say what a row's columns are: derived from the fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from bench.rows.fields import FIELDS, FLAGS, NUMERICS, STATUSES

BLOCK = re.compile(r"(<!-- columns -->\n).*?(<!-- /columns -->)", re.DOTALL)
SECTIONS = {
    "Identity": ("identity",),
    "Cell": ("cell",),
    "Figures": ("figure",),
    "Judgement": ("judgement",),
    "Context": ("circumstance", "context"),
}
"""Heading -> the parts of the fields below it."""


def filled(page: str) -> str:
    """The page with its block of columns as the fields say."""
    return BLOCK.sub(lambda block: f"{block[1]}{schema_text()}{block[2]}", page)


def schema_text() -> str:
    """Every column, status and flag, in Markdown."""
    words = {"status": STATUSES, "flags": FLAGS}
    emulated = ", ".join(f"`{name}`" for name in NUMERICS)
    text = []
    for heading, parts in SECTIONS.items():
        mine = [field for field in FIELDS if field.part in parts]
        text += [f"### {heading}", ""]
        text += table(
            ("column", "type", "meaning"),
            (
                (f"`{field.name}`", field.kind.word, field.text.format(emulated=emulated))
                for field in mine
            ),
        )
        for name in (field.name for field in mine if field.name in words):
            text += glossary({"status": "status", "flags": "flag"}[name], words[name])
    return "\n".join(text)


def glossary(what: str, words: Mapping[str, str]) -> list[str]:
    return table((what, "meaning"), ((f"`{word}`", meaning) for word, meaning in words.items()))


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Markdown without padding: meanings are sentences, and nobody reads them as columns."""
    lines = [header, ("---",) * len(header), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
