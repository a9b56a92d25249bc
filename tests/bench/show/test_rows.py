"""A run's rows for other programs: the same values come back, and no cell stands for another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made import cell, make_run, row

from bench.commands.show import main as show
from bench.rows.fields import COLUMNS
from bench.rows.store import HEADER, ROWS, Run
from bench.show import export as rows
from core.cli import run as shell
from core.errors import PreconditionError
from core.files import ROOT

STAGES = ("stages_ms", "stages_samples_ms")


@pytest.fixture
def made(tmp_path: Path) -> Run:
    """Two rounds of two cells, a failed one, and everything that a row can nest."""
    nested = {
        "artifacts": {"unet": "00ff"},
        "roofline": {"text": {"tflops": 1.0, "gb_per_s": 2.0, "floor_ms": 3.0, "fraction": 0.5}},
        "image_check": {"status": "ok", "psnr_db": 100, "ssim": 1.0},
        "stages_samples_ms": {
            "text": [1.0],
            "unet": [[2.0, 3.0]],
            "decode": [1.0],
            "rest": [0.5],
            "load": [0.1],
        },
        "flags": ["disturbed"],
    }
    error = {"type": "Oom", "what": "memory is full", "why": "", "next": "close something"}
    made_rows = [
        row(cell(), [10.0, 12.0], round_=0, **nested),
        row(cell(), [14.0, 14.0], round_=1),
        row(cell(steps=2, options="threads=2"), [30.0], round_=0),
        row(cell(steps=4), [], round_=0, status="oom", error=error),
    ]
    return make_run(tmp_path / "runs", made_rows, rounds=2)


def convert(target: Run, form: str, out: Path) -> int:
    return shell(show, [str(target.path), "--as", form, "--out", str(out)])


def test_parquet_gives_the_same_rows_back(made: Run, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet` is not installed")
    out = tmp_path / "rows.parquet"
    assert convert(made, "parquet", out) == 0
    found = pq.read_table(out)
    assert tuple(found.column_names) == COLUMNS
    rows = found.to_pylist(maps_as_pydicts="strict")
    for row_, stages in ((each, each[name]) for each in rows for name in STAGES if each[name]):
        if not row_["encoder"]:  # a row from text alone says nothing of a stage that it lacks
            assert stages.pop("encode") is None
    assert rows == made.rows()
    assert json.loads(found.schema.metadata[b"header"]) == made.header.as_json()
    assert str(found.schema.field("p90_ms").type) == "double"  # null in every row


def test_every_column_has_a_type_of_its_own(made: Run) -> None:
    pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    assert tuple(rows.schema(made.header).names) == COLUMNS


def test_a_value_of_another_type_is_named(made: Run, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    text = (made.path / ROWS).read_text()
    (made.path / ROWS).write_text(text.replace('"nfe": 1', '"nfe": "one"', 1))
    assert convert(made, "parquet", tmp_path / "rows.parquet") == 4
    assert not (tmp_path / "rows.parquet").exists()


def test_without_pyarrow_the_error_names_it(
    made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PreconditionError, match="pip install pyarrow"):
        rows.parquet(made)


def test_smaller_is_better(made: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert convert(made, "github", out) == 0
    found = json.loads(out.read_text())
    assert [entry["value"] for entry in found] == [12.5, 30.0]
    assert all(set(entry) <= {"name", "unit", "value", "range", "extra"} for entry in found)
    assert all({"name", "unit", "value"} <= set(entry) for entry in found)
    assert {entry["unit"] for entry in found} == {"ms"}
    assert found[0]["range"] == "± 2.12"  # between the rounds: 11 and 14
    assert "range" not in found[1]  # one sample has no spread
    assert "options threads=2" in found[1]["name"]
    for word in ("weights random", "storage fp16", "precision fp32", "size 64x64"):
        assert word in found[0]["name"]
    assert "provenance measured" in found[0]["extra"]
    assert "disturbed" in found[0]["extra"]
    assert "left out: null taesd batch 1 steps 4: oom" in capsys.readouterr().err


def test_a_series_never_joins_two_provenances(tmp_path: Path) -> None:
    both = [row(cell(), [10.0] * 3), row(cell(), [99.0] * 3, round_=1, provenance="modelled")]
    found = json.loads(rows.smaller_is_better(make_run(tmp_path, both, rounds=2)))
    assert [entry["value"] for entry in found] == [10.0, 99.0]
    assert found[1]["name"] == f"{found[0]['name']} (modelled)"


def test_a_run_without_an_ok_cell_has_no_figure(tmp_path: Path) -> None:
    failed = make_run(tmp_path, [row(cell(), [], status="crashed")])
    assert convert(failed, "github", tmp_path / "out.json") == 2
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("form", ["parquet", "github"])
@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", 2),
        ('{"schema": 1, "torn', 2),
        ('{"schema": 1}\n', 4),
        ('{"schema": 2}\n', 4),
        ("no json\n{}\n", 4),
    ],
)
def test_a_bad_run_writes_nothing(
    made: Run, tmp_path: Path, form: str, content: str, code: int
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    (made.path / ROWS).write_text(content)
    out = tmp_path / "out"
    out.write_text("as before")
    assert convert(made, form, out) == code
    assert out.read_text() == "as before"


@pytest.mark.parametrize("name", [HEADER, ROWS, "."])
def test_what_was_measured_is_not_overwritten(made: Run, name: str) -> None:
    before = (made.path / ROWS).read_bytes()
    assert convert(made, "github", made.path / name) == 2
    assert (made.path / ROWS).read_bytes() == before


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\n"
        "from bench.commands import gallery, publish, show\n"
        "for module in (gallery, publish, show):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        module.main(['--help'])\n"
        "sys.exit(bool({'torch', 'onnx', 'pandas', 'matplotlib', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
