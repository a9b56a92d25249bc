"""Rows on disk: torn, foreign and doubled ones; two writers; what is published about a machine."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import cell, make_run, row

from bench.rows.cell import Cell
from bench.rows.fields import BY_NAME, COLUMNS, FLAGS, KEY_COLUMNS, LATER, STATUSES
from bench.rows.header import HEADER, Header
from bench.rows.store import ROWS, RowWriter, last_rows, open_run, portable, read_rows, run_names
from bench.show import schema
from core.errors import AddbenchError, PreconditionError
from core.files import ROOT, json_bytes


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    run = make_run(tmp_path, [row(cell(steps=n), [1.0, 2.0, 3.0]) for n in (1, 2, 4)])
    return run.path / ROWS


def test_a_row_has_every_column_in_order() -> None:
    made = row(cell(), [1.0, 2.0, 3.0])
    assert tuple(made) == COLUMNS
    assert {"status", "provenance", "samples_ms"} <= set(made)


def test_the_readme_says_what_the_fields_say() -> None:
    page = (ROOT / "results" / "README.md").read_text()
    assert schema.filled(page) == page
    assert all(f"| `{name}` |" in page for name in (*COLUMNS, *STATUSES, *FLAGS))


def test_a_cell_is_the_key_columns_in_their_order() -> None:
    mine = dataclasses.fields(Cell)
    assert tuple(field.name for field in mine) == KEY_COLUMNS
    words = {"str": str, "int": int, "float": float, "bool": bool}
    for field in mine:
        assert words[str(field.type)] in BY_NAME[field.name].types
    usual = {each.name: each.default for each in mine if each.default is not dataclasses.MISSING}
    assert usual == LATER


NEW = '    figure("joy", NUMBER, "of the reader, 0 to 1", since="2027-01-01"),\n'
USE = """
import io, json, sys
from pathlib import Path
sys.path.insert(0, "tests/bench")
from made import cell, make_run, row
from bench.rows.store import read_rows
from bench.show import export, schema
made = make_run(Path(sys.argv[1]), [row(cell(), [1.0], joy=0.5)])
assert made.rows()[0]["joy"] == 0.5
old = made.rows()[0]
del old["joy"]
(made.path / "rows.jsonl").write_text(json.dumps(old) + chr(10))
assert made.rows()[0]["joy"] is None
(made.path / "rows.jsonl").write_text(json.dumps(old | {"joy": "much"}) + chr(10))
try:
    made.rows()
except Exception as error:
    assert "its joy is text and should be a number or null" in str(error), error
else:
    raise AssertionError("another type was taken")
assert "| `joy` | number | of the reader, 0 to 1 |" in schema.schema_text()
assert str(export.schema(made.header).field("joy").type) == "double"
"""


def test_a_new_column_is_one_line(tmp_path: Path) -> None:
    """A line in the fields, and rows, their check, parquet and the page of columns have it."""
    pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    copy = tmp_path / "checkout"
    for room in ("core", "export", "backends", "bench"):
        keep = shutil.ignore_patterns("__pycache__", "*.onnx", "*.so", "architectures")
        shutil.copytree(ROOT / room, copy / room, ignore=keep)
    shutil.copytree(ROOT / "tests" / "bench", copy / "tests" / "bench", ignore=keep)
    file = copy / "bench" / "rows" / "fields.py"
    before, mark, after = file.read_text().partition('    figure("roofline"')
    file.write_text(f"{before}{NEW}{mark}{after}")
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path / "runs")],
        cwd=copy, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@given(st.integers(1, 400))
def test_a_torn_last_line_is_left_out_wherever_it_is_torn(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), [row(cell(steps=n), [1.0]) for n in (1, 2)])
        file = run.path / ROWS
        whole = file.read_bytes()
        file.write_bytes(whole[:-cut] if cut > 1 else whole[:-1])
        kept = read_rows(file)
        # Without the newline alone the row is still whole.
        assert len(kept) == (2 if cut == 1 else 1)
        with RowWriter(run.path) as writer:
            writer.append(row(cell(steps=4), [1.0]))
        assert [one["steps"] for one in read_rows(file)] == [one["steps"] for one in kept] + [4]


def test_foreign_lines_are_named(rows_file: Path) -> None:
    lines = rows_file.read_text().splitlines()
    good = json.loads(lines[1])
    bad = {
        "not JSON": '{"schema": 1, "torn',
        "not an object": "[1]",
        "no `schema`": "{}",
        "schema is 2": json.dumps(good | {"schema": 2}),
        "lacks status": json.dumps({k: v for k, v in good.items() if k != "status"}),
        "none of": json.dumps(good | {"status": "splendid"}),
        "positive, finite": json.dumps(good | {"samples_ms": [1.0, -2.0]}),
        "NaN": json.dumps(good | {"samples_ms": [float("nan")]}),
        "no samples": json.dumps(good | {"samples_ms": []}),
    }
    for reason, line in bad.items():
        rows_file.write_text("\n".join([lines[0], line, lines[2]]) + "\n")
        with pytest.raises(AddbenchError) as raised:
            read_rows(rows_file)
        assert f"{ROWS}:2" in raised.value.what
        assert reason in raised.value.why
    rows_file.write_bytes(lines[0].encode() + b"\n\xff\xfe\n" + lines[2].encode() + b"\n")
    with pytest.raises(AddbenchError, match=f"{ROWS}:2"):
        read_rows(rows_file)


def test_a_writer_refuses_nan(tmp_path: Path) -> None:
    run = make_run(tmp_path, [row(cell(), [1.0])])
    with RowWriter(run.path) as writer, pytest.raises(ValueError, match="JSON"):
        writer.append(row(cell(), [1.0], cold_ms=float("nan")))
    assert len(read_rows(run.path / ROWS)) == 1


def test_a_later_row_takes_the_place_of_an_earlier_one() -> None:
    first = row(cell(), [1.0], status="crashed")
    again = row(cell(), [2.0])
    other = row(cell(), [3.0], round_=1)
    assert last_rows([first, other, again]) == [again, other]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    run = make_run(tmp_path, [row(cell(), [1.0])])
    with RowWriter(run.path), pytest.raises(PreconditionError, match="another sweep"):
        RowWriter(run.path)
    RowWriter(run.path).close()


def test_missing_cells_come_round_by_round(tmp_path: Path) -> None:
    rows = [row(cell(steps=n), [1.0]) for n in (1, 2)]
    run = make_run(tmp_path, rows, rounds=2)
    assert [(one.steps, round_) for one, round_ in run.missing()] == [(1, 1), (2, 1)]


def test_opening_runs(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="no run yet"):
        open_run("latest", tmp_path)
    first, second = (make_run(tmp_path, [row(cell(), [1.0])]) for _ in range(2))
    assert first.name < second.name
    assert open_run("latest", tmp_path).name == second.name
    assert open_run(first.name, tmp_path).name == first.name
    assert open_run(str(first.path), Path("/nonexistent")).name == first.name
    assert run_names(tmp_path) == [first.name, second.name]
    with pytest.raises(PreconditionError, match="is not a run"):
        open_run("nonsense", tmp_path)
    header = json.loads((first.path / "header.json").read_text())
    (first.path / "header.json").write_text(json.dumps(header | {"schema": 7}))
    with pytest.raises(PreconditionError, match="schema 7"):
        open_run(first.name, tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("round", "0", "its round is text and should be a whole number"),
        ("round", None, "its round is null"),
        ("round", -1, "its round is -1, less than 0"),
        ("steps", True, "its steps is true or false"),
        ("batch", 0, "less than 1"),
        ("options", {}, "its options is an object and should be text"),
        ("provenance", None, "provenance"),
        ("flags", "disturbed", "should be a list"),
        ("flags", [3], "no list of words"),
        ("samples_ms", [10.0, True], "samples_ms"),
        ("samples_ms", [10.0, -1.0], "samples_ms"),
        ("median_ms", 10**400, "no median"),
        ("cold_ms", "slow", "its cold_ms is text and should be a number or null"),
        ("stages_ms", 7, "stages_ms"),
        ("stages_ms", {"text": "slow"}, "its stages_ms.text is text and should be a number"),
        ("roofline", {"text": 3}, "its roofline.text is a whole number and should be an object"),
        ("image_check", [], "image_check"),
        ("schema", True, "schema is True"),
    ],
    ids=str,
)
def test_values_of_another_type_are_named(
    tmp_path: Path, column: str, value: object, words: str
) -> None:
    good = row(cell(), [1.0], round_=1)
    file = tmp_path / ROWS
    file.write_text(f"{json.dumps(good)}\n{json.dumps(good | {column: value})}\n")
    with pytest.raises(AddbenchError, match=re.escape(words)) as caught:
        read_rows(file)
    assert f"{ROWS}:2 is not a row" in caught.value.what


@pytest.mark.parametrize(
    "column", [{"device": "x\ud800"}, {"error": {"what": "\udcff"}}, {"versions": {"\ud800": "1"}}]
)
def test_a_row_that_is_no_text_is_named(tmp_path: Path, column: dict[str, object]) -> None:
    """No table, page or parquet file could hold it; a pair of halves is a character."""
    good = row(cell(), [1.0]) | {"device": "\U0001f58c"}
    file = tmp_path / ROWS
    file.write_text(f"{json.dumps(good)}\n{json.dumps(good | column)}\n")
    with pytest.raises(AddbenchError, match=f"{ROWS}:2 is not a row") as caught:
        read_rows(file)
    assert "half of a character" in str(caught.value)
    str(caught.value).encode()
    file.write_text(f"{json.dumps(good)}\n")
    assert read_rows(file) == [good]


def test_what_was_published_is_written_as_it_was_read() -> None:
    files = sorted((ROOT / "results" / "published").glob(f"*/{HEADER}"))
    assert files
    for file in files:
        assert json_bytes(Header.read(file).as_json()) == file.read_bytes(), file


def test_a_header_keeps_what_a_later_version_says_and_what_an_older_one_does_not(
    tmp_path: Path,
) -> None:
    made = make_run(tmp_path, [row(cell(), [1.0])])
    said = made.header.as_json()
    assert "roofline" not in said
    assert "versus" not in said
    assert Header.of(said | {"weather": "fine"}).as_json() == said | {"weather": "fine"}
    surveyed = said | {"roofline": None, "ab": {"side": "base"}}
    assert Header.of(surveyed).as_json() == surveyed


def test_a_header_cannot_be_changed(tmp_path: Path) -> None:
    made = make_run(tmp_path, [row(cell(), [1.0])])
    with pytest.raises(FrozenInstanceError):
        made.header.command = []  # type: ignore[misc]


def test_a_header_that_is_no_text_is_refused(tmp_path: Path) -> None:
    made = make_run(tmp_path, [row(cell(), [1.0])])
    (made.path / HEADER).write_text(json.dumps(made.header.as_json() | {"command": ["\udcff"]}))
    with pytest.raises(PreconditionError, match="is not valid text"):
        open_run(made.name, tmp_path)


def test_an_error_about_a_name_that_is_no_text_can_be_kept(tmp_path: Path) -> None:
    error = {"type": "OSError", "what": "cannot open 'a\udcff.bin'", "why": "", "next": ""}
    one = row(cell(), [], status="failed", error=error)
    (tmp_path / ROWS).write_text(json.dumps(one) + "\n")
    (kept,) = read_rows(tmp_path / ROWS)
    assert kept["error"]["what"] == r"cannot open 'a\udcff.bin'"


def test_json_that_is_too_deep_is_no_row(tmp_path: Path) -> None:
    (tmp_path / ROWS).write_text("[" * 200_000 + "\n{}\n")
    with pytest.raises(AddbenchError, match="is not a row"):
        read_rows(tmp_path / ROWS)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("run", None, "no run"),
        ("environment", None, "no environment"),
        ("environment", {"machine": "0" * 12}, "no environment.cpu"),
        ("settings", {"rounds": "5"}, "no settings.min_samples"),
        ("plan", [5], "no plan[0]"),
        ("plan", [{"model": "x"}], "no plan[0].weights"),
        ("command", "python", "no command"),
    ],
)
def test_a_header_that_lacks_something(
    tmp_path: Path, field: str, value: object, words: str
) -> None:
    made = make_run(tmp_path, [row(cell(), [1.0])])
    (made.path / HEADER).write_text(json.dumps(made.header.as_json() | {field: value}))
    with pytest.raises(PreconditionError, match=re.escape(words)):
        open_run(made.path.name, tmp_path)


def test_a_plan_of_other_types_is_none(tmp_path: Path) -> None:
    made = make_run(tmp_path, [row(cell(), [1.0])])
    plan = [made.header.plan[0].columns() | {"options": {}}]
    (made.path / HEADER).write_text(json.dumps(made.header.as_json() | {"plan": plan}))
    with pytest.raises(PreconditionError, match=re.escape("plan[0].options (text)")):
        open_run(made.name, tmp_path)


def test_portable_takes_out_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADDBENCH_BUILD", raising=False)
    assert portable(f"{ROOT}/build/x/model.onnx is gone") == "build/x/model.onnx is gone"
    assert portable(f"in {ROOT}/bench/sweep.py") == "in ./bench/sweep.py"
    assert (
        portable("cannot open '/srv/models/a-b/unet.onnx': no") == "cannot open '.../unet.onnx': no"
    )
    assert portable("images/s and/or 1/2, https://example.org/a/b") == (
        "images/s and/or 1/2, https://example.org/a/b"
    )


def test_errors_in_rows_are_portable() -> None:
    words = {"type": "E", "what": "no /var/lib/weights/x.bin", "why": "", "next": ""}
    assert row(cell(), [], status="failed", error=words)["error"]["what"] == "no .../x.bin"


def test_the_environment_names_no_one() -> None:
    from bench.machine.environment import collect
    from bench.show.publish import private

    found = collect()
    text = json.dumps(found)
    assert not list(private(found))
    assert socket.gethostname() not in text
    assert found["cores_allowed"] >= 1
    assert re.fullmatch(r"[0-9a-f]{12}", found["machine"])
