"""Values that a person passes in Python, checked as the command line checks its texts."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex, TypeGuard

from core.errors import PreconditionError


def refuse(name: str, value: object, why: str, next: str) -> NoReturn:
    """Refuse a value in three parts."""
    raise PreconditionError(f"{name}={value!r} is not understood", why, next)


def path_text(name: str, value: object) -> str:
    """A name or a path as text."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        refuse(name, value, "it is a name, or a path as text or pathlib.Path", f"pass {name}='...'")
    return str(Path(value)) if isinstance(value, os.PathLike) else value


def several(name: str, value: object) -> tuple[Any, ...]:
    """A lone value as a sequence of one; distinct values, in their order."""
    alone = isinstance(value, str | bytes | float | SupportsIndex | os.PathLike)
    if not alone and not isinstance(value, Iterable):
        refuse(name, value, "it is neither a value nor a sequence of them", f"pass {name}=[...]")
    values: tuple[Any, ...] = (value,) if alone else tuple(value)  # type: ignore[arg-type]
    if len(set(values)) != len(values):
        refuse(name, value, "each cell is measured once a round", "name each value once")
    return values


def is_count(value: object) -> TypeGuard[SupportsIndex]:
    """Whether this is a whole number of at least 1, of Python or of numpy."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return False
    return operator.index(value) >= 1


def count(name: str, value: object) -> int:
    """A whole number of at least 1."""
    if not is_count(value):
        refuse(name, value, "it is a whole number of at least 1", f"pass {name}=1")
    return operator.index(value)


def counts(name: str, value: object) -> tuple[int, ...]:
    """Distinct whole numbers of at least 1."""
    values = several(name, value)
    if not all(map(is_count, values)):
        refuse(name, value, "it holds whole numbers of at least 1", f"pass {name}=1 or [1, 2, 4]")
    return tuple(map(operator.index, values))


def shares(name: str, value: object) -> tuple[float, ...]:
    """Distinct numbers above 0 and at most 1."""
    values = several(name, value)
    for each in values:
        if isinstance(each, bool) or not isinstance(each, int | float) or not 0 < each <= 1:
            refuse(name, value, "it holds numbers above 0 and at most 1", f"pass {name}=0.5")
    return tuple(map(float, values))


def texts(name: str, value: object, *, empty: bool = False) -> tuple[str, ...]:
    """Distinct words; `empty`: "" is one of them."""
    values = several(name, value)
    if any(not isinstance(each, str) or not (each or empty) for each in values):
        refuse(name, value, "it holds words", f"pass {name}='...' or a list of them")
    return values


def switches(name: str, value: object) -> tuple[bool, ...]:
    """Off, on or both."""
    values = several(name, value)
    if any(type(each) is not bool for each in values):
        refuse(name, value, "it is off, on or both", f"pass {name}=True or [False, True]")
    return values


def finite(name: str, value: object) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        refuse(name, value, "it is a finite number", f"pass {name}=7.5")
    return float(value)


def pixels(value: object) -> tuple[int, int]:
    """`512` or (width, height)."""
    sides = (value, value) if is_count(value) else value
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(map(is_count, sides)):
        refuse("size", value, "it is a number of pixels, or width and height", "pass size=512")
    width, height = map(operator.index, sides)
    return width, height
