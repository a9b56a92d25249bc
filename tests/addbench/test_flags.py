"""A flag means the same in every verb that has it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from addbench.verbs import VERBS
from core.cli import PRECISIONS, RUNS, duration
from core.table import FORMATS


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)
        else:
            yield action


def having(flag: str) -> list[tuple[str, argparse.Action]]:
    """(verb, what it makes of the flag) of every verb that has and shows it."""
    return [
        (name, action)
        for name, verb in VERBS.items()
        for action in actions(verb.load().parser())
        if flag in action.option_strings and action.help != argparse.SUPPRESS
    ]


def test_runs_is_where_runs_are() -> None:
    verbs = having("--runs")
    assert {"sweep", "compare", "show", "publish"} <= {name for name, _ in verbs}
    assert all(action.default == RUNS for _, action in verbs)


def test_out_is_what_is_written() -> None:
    assert all(action.default != RUNS for _, action in having("--out"))


def test_a_budget_has_a_unit() -> None:
    verbs = having("--budget")
    assert {"sweep", "ab", "versus", "gpu-check", "choose"} == {name for name, _ in verbs}
    for _, action in verbs:
        assert callable(action.type)
        read = [action.type(text) for text in ("90s", "30m", "1h", "1h30m")]
        assert read == [90, 1800, 3600, 5400]


@pytest.mark.parametrize("text", ["90", "", "m", "1h30", "-5s", "0s", "1d", "90 s"])
def test_a_time_without_its_unit_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="with its unit"):
        duration(text)


def test_formats_and_precisions_are_of_one_list() -> None:
    for _, action in having("--format"):
        assert set(action.choices or ()) <= set(FORMATS)
        assert action.default == "table"
    for name, action in having("--precision"):
        # Training decides by the device where it is not told.
        extra = {"auto"} if name in ("train", "ablate") else set()
        assert set(action.choices or PRECISIONS) <= set(PRECISIONS) | extra


def test_a_model_is_named_with_its_flag() -> None:
    positional = {
        name
        for name, verb in VERBS.items()
        for action in actions(verb.load().parser())
        if not action.option_strings and action.dest == "model"
    }
    assert positional == {"evaluate"}, "a trained folder, not a model of the list"
