"""The house itself: imports flow one way, nothing heavy at import, no machine's paths inside."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from core.files import ROOT

ROOMS = ["core", "distill", "export", "backends", "bench"]
"""Left to right; a room imports none to its right."""


def imported_rooms(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
    return found & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_one_way(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        wrong = imported_rooms(file) - allowed
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_files_stay_small() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for room in ROOMS
        for file in (ROOT / room).rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 450
    }
    assert not long, f"these ask to be split: {long}"


@pytest.mark.parametrize("room", ["core", "export", "backends", "bench"])
def test_importing_a_room_imports_nothing_heavy(room: str) -> None:
    code = f"import sys, {room}; sys.exit(bool({{'torch', 'onnx', 'pandas'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
