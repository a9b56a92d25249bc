"""What a reader holds a run against: the JSON type of every column,

A column that is not named here is a number or null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

TEXT = ("row", "run", "status", "provenance", "model", "weights", "backend", "options", "device",
        "precision", "storage", "size", "decoder", "scheduler", "guidance_mode", "stages_from",
        "time_utc", "git_commit", "bundle_hash")  # fmt: skip
WHOLE = ("schema", "round", "batch", "steps", "nfe", "warmup_calls")
TRUTH = ("process_cold", "compile_cached", "git_dirty", "low_memory")
LISTS = ("samples_ms", "flags")
NUMBER = (int, float)
NESTED: dict[str, tuple[type, ...]] = {
    "artifacts": (str,),
    "versions": (str,),
    "stages_ms": NUMBER,
    "stages_samples_ms": (list,),
    "roofline": (dict,),
    "modelled": (str, dict, *NUMBER),
    "accelerator": NUMBER,
    "image_check": (str, *NUMBER),
    "quality": NUMBER,
    "error": (str,),
}
"""Objects, and the types of what they hold; null besides."""
NEVER_NULL = ("schema", "row", "run", "round", "status", "provenance", "model", "weights",
              "backend", "options", "device", "precision", "storage", "size", "batch", "decoder",
              "steps", "scheduler", "guidance", "guidance_mode", "low_memory",
              *LISTS)  # fmt: skip
LEAST = {"round": 0, "batch": 1, "steps": 1}
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false",
         list: "a list", dict: "an object", type(None): "null"}  # fmt: skip


@cache
def allowed(column: str) -> tuple[type, ...]:
    """The types that a column's value may have. A bool is no number here."""
    found: tuple[type, ...] = NUMBER
    for names, types in ((TEXT, (str,)), (WHOLE, (int,)), (TRUTH, (bool,)), (LISTS, (list,)),
                         (NESTED, (dict,))):  # fmt: skip
        if column in names:
            found = types
    return found if column in NEVER_NULL else (*found, type(None))


class Types:
    """The check of many rows: what was right once is known by its types alone."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns
        self.values = itemgetter(*columns)
        self.objects = itemgetter(*NESTED)
        self.known: set[tuple[Any, ...]] = set()
        self.known_inside: set[tuple[Any, ...]] = set()

    def wrong(self, row: Mapping[str, Any]) -> str | None:
        """What is wrong with a row that has every column; None for nothing."""
        found = tuple(map(type, self.values(row)))
        if found not in self.known:
            for column, kind in zip(self.columns, found, strict=True):
                if kind not in allowed(column):
                    return mistyped(column, kind, allowed(column))
            self.known.add(found)
        if row["round"] < 0 or row["batch"] < 1 or row["steps"] < 1:
            column, least = next(each for each in LEAST.items() if row[each[0]] < each[1])
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
