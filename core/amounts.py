"""Amounts as people read them: sizes in the unit that has digits for them, counted nouns."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """`640 bytes`, `12 kB`, `34 MB`, `6.4 GB`: decimal units, never 0.0 of one."""
    if count < 1e3:
        return count_text(int(count), "byte")
    for unit, size in (("kB", 1e3), ("MB", 1e6)):
        if round(count / size) < 1000:
            return f"{count / size:.0f} {unit}"
    return f"{count / 1e9:.1f} GB"


def count_text(count: int, noun: str, several: str = "") -> str:
    """`1 cell`, `12 cells`; `several` where the plural is no `s` more."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"
