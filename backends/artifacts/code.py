"""Which of the project's own code decides what a compile gives: the hash of it is in every key."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from core.files import ROOT, sha256_file, sha256_json

COMPILERS = ("backends", "export.lower", "export.quantize", "export.web")
"""Rooms and folders that change what is compiled."""
SHARED = ("backends.base", "backends.registry", "backends.artifacts", "backends.pipeline",
          "backends.check", "backends.commands", "backends.modelled")  # fmt: skip
"""What all backends have in common, and what runs after a compile: no artifact depends on it."""


@cache
def code_hash(*modules: str, root: Path = ROOT) -> str:
    """The hash of `modules` and all that they import of COMPILERS, directly or not."""
    files = sorted(compiler_files(*modules, root=root))
    return sha256_json([sha256_file(file) for file in files])


def compiler_files(*modules: str, root: Path = ROOT) -> set[Path]:
    """The files of `modules` and of what they import of COMPILERS, inside functions too; not what
    is imported for the sake of types."""
    files: dict[str, Path] = {}
    todo = list(modules)
    while todo:
        module = todo.pop()
        file = _file(module, root)
        if module in files or file is None:
            continue
        files[module] = file
        todo += [
            name
            for name in [module.rpartition(".")[0], *_imports(ast.parse(file.read_text()))]
            if _is_in(name, COMPILERS) and not _is_in(name, SHARED)
        ]
    return set(files.values())


def _is_in(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def _file(module: str, root: Path) -> Path | None:
    path = root / module.replace(".", "/")
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _imports(node: ast.AST) -> Iterator[str]:
    """The modules that the code below `node` imports: `from a import b` is a, and a.b if that is
    one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.ImportFrom) and child.module:
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        yield from _imports(child)
