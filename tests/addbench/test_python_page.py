"""docs/python.md: its example runs as it stands, on the model that ships."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.files import ROOT
from export.bundle import Bundle

PAGE = ROOT / "docs" / "python.md"


def test_the_example_of_the_page_runs(
    shapes_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code.count('"shapes-turbo"') == 2
    code = code.replace('"shapes-turbo"', repr(str(shapes_bundle.path)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith(("ort ", "torch "))] == [
        ["ort", "1", "ok"],
        ["ort", "2", "ok"],
        ["torch", "1", "ok"],
        ["torch", "2", "ok"],
    ]
    assert "of 4 cells" in lines[-2]
    assert re.fullmatch(r"take (ort|torch) taesd batch 1 steps 1 (True|False)", lines[-1])
    assert "backend" in (tmp_path / "recipe.toml").read_text()
    assert len(list((tmp_path / "my-runs").iterdir())) == 2
