"""docs/contributing.md, followed to the letter in a copy of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from addbench.verbs import VERBS
from core.files import ROOT
from export.bundle import Bundle

PAGE = (ROOT / "docs" / "contributing.md").read_text()
ROOMS = ("addbench", "core", "distill", "export", "backends", "bench", "tests")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def follow(text: str, copy: Path) -> None:
    """Write the files and add the lines that a section shows."""
    for block in blocks(text, "python"):
        path, _, content = block.removeprefix("# ").partition("\n")
        (copy / path).write_text(content)
    for block in blocks(text, "diff"):
        head, *lines = block.splitlines()
        file = copy / head.removeprefix("--- ")
        before = "".join(f"{line[1:]}\n" for line in lines if line[0] == " ")
        after = "".join(f"{line[1:]}\n" for line in lines)
        whole = file.read_text()
        assert whole.count(before) == 1, f"{head}: the line above the new one is not there"
        file.write_text(whole.replace(before, after))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The rooms and the tests, where lines may be added."""
    folder = tmp_path / "checkout"
    for room in ROOMS:
        leave = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
        shutil.copytree(ROOT / room, folder / room, ignore=leave)
    for name in ("pyproject.toml", "results/README.md", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def python(copy: Path, *words: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"} | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_column_is_one_line(copy: Path, tiny_bundle: Bundle) -> None:
    follow(section("A column of the rows"), copy)
    said = python(
        copy, "-c",
        "from bench.rows.fields import COLUMNS, OLDER, __file__ as here\n"
        "from bench.show.schema import schema_text\n"
        "print(here, COLUMNS.index('load_avg_after') - COLUMNS.index('load_avg'),"
        " OLDER['load_avg_after'], '| `load_avg_after` | number |' in schema_text())",
    )  # fmt: skip
    assert said.split() == [str(copy / "bench" / "rows" / "fields.py"), "1", "None", "True"]
    runs = copy / "runs"
    python(copy, "-m", "bench.sweep", "--model", str(tiny_bundle.path), "--backend", "null",
           "--steps", "1", "--decoder", "taesd", "--quick", "--out", str(runs))  # fmt: skip
    rows = python(
        copy, "-c",
        "from pathlib import Path\nfrom bench.rows.store import open_run\n"
        f"(row,) = open_run('latest', Path({str(runs)!r})).rows()\n"
        "print(row['status'], row['load_avg_after'] > 0)",
    )  # fmt: skip
    assert rows.split() == ["ok", "True"]


def test_a_backend_is_one_file_and_one_line(copy: Path, tiny_bundle: Bundle) -> None:
    pytest.importorskip("onnxruntime")
    follow(section("A backend"), copy)
    listed = python(copy, "-m", "addbench", "backends")
    assert re.search(r"^plain +usable", listed, re.MULTILINE)
    python(copy, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(copy),
           "tests/backends/test_contract.py", "-k", "plain and images",
           ADDBENCH_TEST_BUNDLES=str(tiny_bundle.path.parent),
           PYTEST_XDIST_WORKER="")  # fmt: skip


def test_the_verb_on_the_page_is_the_verb() -> None:
    text = section("A verb")
    code, line = blocks(text, "python")
    path, _, content = code.removeprefix("# ").partition("\n")
    file = (ROOT / path).read_text()
    assert content.split("    ...")[0].rstrip() in file
    assert line.strip() in (ROOT / "addbench" / "verbs.py").read_text()
    assert VERBS["verify"].module == "export.verify"
