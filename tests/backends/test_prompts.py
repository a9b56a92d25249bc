"""What a person is told of a prompt before it is drawn."""

from __future__ import annotations

import warnings

import pytest

from backends.pipeline import prompts


@pytest.mark.parametrize("weighted", ["a (red cat:1.3)", "a cat <lora:fur:0.8>", "(a:.5) cat"])
def test_weights_in_a_prompt_are_said_to_be_text_once(
    weighted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_warned", False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert prompts.check_prompts(["a cat (of 3), at 4:30", weighted]) == [
            "a cat (of 3), at 4:30",
            weighted,
        ]
        prompts.check_prompts(weighted)
    assert ["read as text" in str(each.message) for each in said] == [True]


def test_a_colon_or_a_bracket_alone_is_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts.check_prompts(["a cat (of 3), at 4:30", "(a cat)", "scale 1:2"])
