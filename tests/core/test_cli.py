"""Exit codes and messages: what a shell and a person see."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.cli import Parser, int_list, run, word_list
from core.errors import AddbenchError, PreconditionError
from core.files import ROOT


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (AddbenchError("it broke", "a cause", "do this"), 4, "next: do this"),
        (PreconditionError("no device", "a cause", "buy one"), 2, "why:  a cause"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("x"), 1, "a bug in addbench"),
    ],
)
def test_what_is_raised_decides_the_exit_code(
    raised: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str] | None) -> int:
        raise raised

    assert run(main) == code
    assert words in capsys.readouterr().err


def test_a_warning_of_ours_is_one_line_and_a_library_s_keeps_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def main(argv: Sequence[str] | None) -> int:
        said = warnings.formatwarning
        ours = str(ROOT / "backends" / "pipeline" / "pipeline.py")
        assert said(UserWarning("no fox"), UserWarning, ours, 7) == "warning: no fox\n"
        other = str(ROOT / ".venv" / "lib" / "site-packages" / "x.py")
        assert "x.py:7: UserWarning: no fox" in said(UserWarning("no fox"), UserWarning, other, 7)
        return 0

    assert run(main) == 0


def test_a_usage_error_is_ours() -> None:
    parser = Parser(prog="x")
    parser.add_argument("--number", type=int)
    with pytest.raises(PreconditionError, match="invalid int value"):
        parser.parse_args(["--number", "many"])


@pytest.mark.parametrize("arguments", [["\udcff"], ["--out", "x/\udcff.html"], ["--out=\ud800"]])
def test_an_argument_that_is_no_text_is_a_usage_error(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = Parser(prog="x")
    parser.add_argument("word", nargs="?")
    parser.add_argument("--out", type=Path)
    with pytest.raises(PreconditionError, match=r"'[^']*\\ud.*' is not valid text") as caught:
        parser.parse_args(arguments)
    str(caught.value).encode()
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(PreconditionError, match="is not valid text"):
        parser.parse_args()


@given(st.lists(st.integers(1, 1000), min_size=1, unique=True))
def test_int_list_reads_what_was_written(values: list[int]) -> None:
    assert int_list(",".join(map(str, values))) == values


@pytest.mark.parametrize("text", ["", "0", "1,,2", "1,1", "a", "-1", "1.5"])
def test_bad_int_lists_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        int_list(text)


@pytest.mark.parametrize("text", ["", "a,", "a,a"])
def test_bad_word_lists_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        word_list(text)
