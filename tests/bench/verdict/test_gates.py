"""The counted gates on the default model, and the workflow that runs them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.commands import gates as command
from bench.commands.gates import main
from bench.verdict import gates
from bench.verdict.gates import differences
from core.cli import run as shell
from core.files import ROOT
from export.bundle import Bundle


@pytest.fixture(scope="module")
def found(shapes_bundle: Bundle) -> dict[str, Any]:
    return gates.facts(shapes_bundle)


def test_the_golden_file_holds(found: dict[str, Any]) -> None:
    golden = json.loads(command.GOLDEN.read_text())
    assert differences(golden, found) == [], f"if it is meant: {command.UPDATE}"


def test_what_is_counted(found: dict[str, Any]) -> None:
    assert found["nfe"]["taesd"] == {"1": 1, "2": 2, "4": 4}
    assert found["ops"]["unet"]["Conv"] > 1
    assert found["bytes"]["bundle"] > found["bytes"]["unet weights"] > 0
    assert all(found["parity"]["parts"].values())
    assert "median_ms" in found["rows"]["columns"]


def test_every_difference_is_named(found: dict[str, Any]) -> None:
    other = copy.deepcopy(found)
    other["nfe"]["vae"]["2"] = 3
    del other["ops"]["unet"]["Conv"]
    other["ops"]["unet"]["Einsum"] = 1
    other["rows"]["columns"][0:2] = other["rows"]["columns"][1::-1]
    other["rows"]["flags"].append("lucky")
    assert differences(found, other) == [
        "nfe.vae.2: 2 -> 3",
        f"ops.unet.Conv: gone, was {found['ops']['unet']['Conv']}",
        "ops.unet.Einsum: new, 1",
        "rows.columns: the order differs",
        "rows.flags: lucky is new",
    ]
    assert differences(found, found) == []


def test_update_then_check(
    shapes_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = tmp_path / "gates.json"
    usual = ["--model", str(shapes_bundle.path), "--golden", str(golden)]
    assert shell(main, ["--check", *usual]) == 2
    assert command.UPDATE in capsys.readouterr().err
    assert shell(main, ["--update", *usual]) == 0
    assert shell(main, usual) == 0
    golden.write_text(golden.read_text().replace('"1": 1', '"1": 2'))
    before = golden.read_bytes()
    assert shell(main, ["--check", *usual]) == 4
    assert golden.read_bytes() == before
    assert "2 -> 1" in capsys.readouterr().out
    golden.write_text("{")
    assert shell(main, usual) == 4


def test_the_workflow_fits_the_published_schema() -> None:
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert files
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    for schema in ("vendor.github-workflows", "custom.github-workflows-require-timeout"):
        done = subprocess.run([*checker, schema, *map(str, files)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_calls_no_gate_through_make() -> None:
    text = (ROOT / ".github" / "workflows" / "regression-gate.yml").read_text()
    for verb in ("addbench ab", "addbench gates"):
        line = next(each for each in text.splitlines() if verb in each)
        assert "make" not in line
        assert "python -m" in line
