"""The house itself: imports flow one way, files stay small, names and docstrings stand alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from core.files import ROOT

ROOMS = ["core", "distill", "export", "backends", "serve", "bench", "addbench"]
"""Left to right; a room imports none to its right."""
BENCH = ["rows", "machine", "limits", "verdict", "show", "run", "fleet", "commands"]
"""The same inside bench; harness/ and gpu/ stand beside them, and nothing below run/ uses them."""
PLACED = {"bench.worker": "run", "bench.sweep": "commands"}
"""Modules of bench whose path is a promise, and the room in which they count."""


@cache
def modules() -> Mapping[str, Path]:
    """Every module of the rooms by its name."""
    named = {}
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            named[".".join(parts).removesuffix(".__init__")] = file
    return named


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(node: ast.AST) -> Iterator[str]:
    """Modules of the rooms that are imported below `node`, in functions too, not for types only."""
    for child in ast.iter_child_nodes(node):
        if for_types_only(child):
            continue
        if isinstance(child, ast.ImportFrom) and child.module:
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield whole if whole in modules() else child.module
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        yield from imported(child)


@cache
def graph() -> Mapping[str, set[str]]:
    """Module -> the modules of the rooms that it imports."""
    return {
        name: {other for other in imported(tree(file)) if other in modules() and other != name}
        for name, file in modules().items()
    }


def room_in_bench(module: str) -> int | None:
    parts = module.split(".")
    room = PLACED.get(module, parts[1] if parts[0] == "bench" and len(parts) > 1 else "")
    return BENCH.index(room) if room in BENCH else None


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_one_way(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    names = [name for name in graph() if name.split(".")[0] == room]
    assert names
    for name in names:
        wrong = {other for other in graph()[name] if other.split(".")[0] not in allowed}
        assert not wrong, f"{name} imports {wrong}"


def test_imports_flow_one_way_inside_bench() -> None:
    climbs = {
        (name, other)
        for name, others in graph().items()
        for other in others
        if (here := room_in_bench(name)) is not None
        and (there := room_in_bench(other)) is not None
        and there > here
    }
    assert not climbs


def test_no_imports_in_a_circle() -> None:
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(f"in a circle: {' -> '.join(error.args[1])}")


def test_files_stay_small() -> None:
    long = {
        name: lines
        for name, file in modules().items()
        if (lines := len(file.read_text().splitlines())) > 700
    }
    assert not long, f"these ask to be split: {long}"


@pytest.mark.parametrize("room", ["core", "export", "backends", "serve", "bench", "addbench"])
def test_importing_a_room_imports_nothing_heavy(room: str) -> None:
    code = f"import sys, {room}; sys.exit(bool({{'torch', 'onnx', 'pandas'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- names and words


def test_a_class_name_stands_for_one_thing() -> None:
    homes = defaultdict(list)
    for name, file in modules().items():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    twice = {name: where for name, where in homes.items() if len(where) > 1}
    assert not twice, twice


GENITIVE = re.compile(r"(Of|As|From|For|By|In|At|With|Whose|Per) ")


def described(file: Path) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module's functions, classes and values."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, ast.get_docstring(node) or ""
        body = getattr(node, "body", None)
        for value, text in pairwise(body) if isinstance(body, list) else ():
            if (
                isinstance(value, ast.Assign | ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                yield ast.unparse(value).split("=")[0], str(text.value.value)


@pytest.mark.parametrize("room", ROOMS)
def test_a_docstring_stands_alone(room: str) -> None:
    bare = [
        f"{file.relative_to(ROOT)} {name}: {text.splitlines()[0]}"
        for file in sorted((ROOT / room).rglob("*.py"))
        for name, text in described(file)
        if GENITIVE.match(text)
    ]
    assert not bare, "\n".join(bare)
