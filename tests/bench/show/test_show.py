"""`addbench show`: one verb for all that is made of a run, and nothing committed is touched."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from pathlib import Path

import pytest
from made import cell, make_run, row
from PIL import Image

from bench.commands.show import main as show
from bench.rows.names import INDEX
from bench.rows.store import PUBLISHED, Run, open_run
from core.cli import run as shell
from core.files import ROOT


@pytest.fixture
def made(tmp_path: Path) -> Run:
    rows = [
        row(cell(steps=steps, decoder=decoder), [10.0 * steps] * 3, flags=flags)
        for decoder in ("vae", "taesd")
        for steps, flags in ((1, ["disturbed", "under_sampled"]), (2, []))
    ]
    return make_run(tmp_path / "runs", rows)


def test_the_table_is_what_show_shows(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell(show, ["--runs", str(made.path.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (first, *_) = [line for line in lines if "disturbed" in line]
    assert "under_sampled, disturbed" in first
    assert first.index("disturbed") < first.index("null"), "flags come before the rest"
    assert sorted(file.name for file in made.path.iterdir()) == ["header.json", "rows.jsonl"]


@pytest.mark.parametrize("flags", [["--format", "markdown"], ["--as", "csv"], ["--as", "json"]])
def test_text_is_printed_or_written(
    flags: list[str], made: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [made.name, "--runs", str(made.path.parent), *flags]
    assert shell(show, argv) == 0
    text = capsys.readouterr().out
    if "csv" in flags:
        assert len(list(csv.DictReader(io.StringIO(text)))) == 4
    elif "json" in flags:
        cells = json.loads(text)
        assert [each["steps"] for each in cells] == [1, 2, 1, 2]
        assert cells[0]["columns"]["median (ms)"] == 10.0
    else:
        assert text.startswith(f"# Run {made.name}\n")
    assert shell(show, [*argv, "--out", str(tmp_path / "file")]) == 0
    assert (tmp_path / "file").read_text() == text


def test_several_runs_go_into_one_plot(
    made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    other = make_run(made.path.parent, [row(cell(steps=n), [7.0 * n] * 3) for n in (1, 2)])
    argv = [made.name, other.name, "--as", "plot", "--runs", str(made.path.parent)]
    assert shell(show, argv) == 0
    folder = tmp_path / "build" / "show" / f"{made.name}+{other.name}"
    assert sorted(file.name for file in folder.iterdir()) == ["plot.png", "plot.svg"]
    assert shell(show, [*argv, "--out", str(tmp_path / "one.png")]) == 0
    assert Image.open(tmp_path / "one.png").width > 500
    assert not (tmp_path / "one.png.svg").exists()
    assert not list(made.path.glob("plot*"))


@pytest.mark.parametrize("form", ["plot", "page", "roofline"])
def test_looking_at_a_published_run_changes_nothing_committed(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))

    def tree() -> str:
        command = ["git", "status", "--porcelain", "results"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout

    before = tree()
    assert shell(show, ["cpu-amx-low-memory", "--as", form]) == 0
    assert tree() == before
    assert list((tmp_path / "build" / "show" / "cpu-amx-low-memory").iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--as", "plot", "--base", "latest"], "--base does not go with --as plot"),
        (["--x", "nfe"], "--x does not go with --as table"),
        (["--as", "csv", "--format", "json"], "--format does not go with --as csv"),
        (["a", "b", "--as", "page"], "--as page shows one run"),
        (["no-such-run"], "no-such-run is not a run"),
    ],
)
def test_what_does_not_go_together_is_refused(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell(show, [*flags, "--runs", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_run_that_is_not_there_names_those_that_are(
    made: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell(show, ["cpu-zen5", "--runs", str(made.path.parent)]) == 2
    said = capsys.readouterr().err
    assert made.name in said
    assert "did you mean cpu-zen4-peers?" in said
    assert shell(show, ["cpu-zen4-peer", "--runs", str(made.path / "none")]) == 2
    said = capsys.readouterr().err
    assert "latest" not in said  # there is none
    assert ": -" not in said


def test_an_index_that_is_none_is_named(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    index = made.path.parent / INDEX
    for text, words in (
        ("a = ", "cannot be read"),
        ("a = 1", "says a = 1"),
        ('a = "x"\nb = "x"', "two names"),
        ('"A b" = "x"', "says A b"),
    ):
        index.write_text(text)
        assert shell(show, ["a", "--runs", str(made.path.parent)]) == 4
        assert words in capsys.readouterr().err
    index.write_text(f'mine = "{made.name}"\n')
    assert open_run("mine", made.path.parent).name == made.name
    assert open_run("mine", made.path.parent).label == "mine"
    assert open_run("cpu-zen4-peers").path.parent == PUBLISHED
