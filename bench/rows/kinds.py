"""Kinds of values in a row: what JSON calls them, and what types a reader takes for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Leaf:
    """A kind of single value: its name in JSON's words, and the types a reader takes for it."""

    word: str
    types: tuple[type, ...]


@dataclass(frozen=True)
class ListOf:
    """A list of values of one kind."""

    of: Kind
    word: str = "list"
    types: tuple[type, ...] = (list,)


@dataclass(frozen=True)
class MapOf:
    """An object whose names are not known beforehand."""

    of: Kind
    word: str = "object"
    types: tuple[type, ...] = (dict,)

    @property
    def inside(self) -> tuple[type, ...]:
        """The types of what it holds."""
        return self.of.types


@dataclass(frozen=True)
class Record:
    """An object of known names."""

    of: Mapping[str, Kind]
    word: str = "object"
    types: tuple[type, ...] = (dict,)

    @property
    def inside(self) -> tuple[type, ...]:
        """The types of what it holds."""
        return tuple(dict.fromkeys(each for kind in self.of.values() for each in kind.types))


Kind = Leaf | ListOf | MapOf | Record

TEXT = Leaf("text", (str,))
WHOLE = Leaf("int", (int,))
NUMBER = Leaf("number", (int, float))
"""A bool is no number, and a whole number is one."""
TRUTH = Leaf("bool", (bool,))


def numbers(*names: str) -> Record:
    """An object of numbers."""
    return Record(dict.fromkeys(names, NUMBER))
