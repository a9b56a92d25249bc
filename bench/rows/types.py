"""The check of rows that are read: every column's type, as `bench.rows.fields` has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from bench.rows.fields import COLUMNS, FIELDS, LEAST
from bench.rows.kinds import MapOf, Record

NESTED = {
    field.name: field.kind.inside for field in FIELDS if isinstance(field.kind, MapOf | Record)
}
"""Objects, and the types of what they hold; null besides."""
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false",
         list: "a list", dict: "an object", type(None): "null"}  # fmt: skip


class Types:
    """The check of many rows: what was right once is known by its types alone."""

    def __init__(self) -> None:
        self.values = itemgetter(*COLUMNS)
        self.objects = itemgetter(*NESTED)
        self.known: set[tuple[Any, ...]] = set()
        self.known_inside: set[tuple[Any, ...]] = set()

    def wrong(self, row: Mapping[str, Any]) -> str | None:
        """What is wrong with a row that has every column; None for nothing."""
        found = tuple(map(type, self.values(row)))
        if found not in self.known:
            for field, kind in zip(FIELDS, found, strict=True):
                if kind not in field.types:
                    return mistyped(field.name, kind, field.types)
            self.known.add(found)
        for column, least in LEAST.items():
            if row[column] < least:
                return f"its {column} is {row[column]}, less than {least}"
        if row["flags"] and set(map(type, row["flags"])) != {str}:
            return "its flags are no list of words"
        inside = tuple([
            tuple(map(type, each.values())) if each else () for each in self.objects(row)
        ])  # fmt: skip
        if inside not in self.known_inside:
            for column, types in NESTED.items():
                for name, value in (row[column] or {}).items():
                    if value is not None and type(value) not in types:
                        return mistyped(f"{column}.{name}", type(value), types)
            self.known_inside.add(inside)
        return None


def mistyped(what: str, kind: type, types: Sequence[type]) -> str:
    wanted = [WORDS[each] for each in types if each is not int or float not in types]
    return f"its {what} is {WORDS[kind]} and should be {' or '.join(wanted)}"
