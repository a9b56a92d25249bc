"""Locked recipes: written, read again, refused where edited, followed by every command."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.commands.image import main as image_main
from backends.load import load_pipeline
from backends.locked import LockedRecipe
from bench.sweep import main as sweep_main
from core.cli import run as shell
from core.errors import PreconditionError
from core.machine import this_machine
from export.bundle import Bundle


def recipe_for(of: Bundle, **more: Any) -> LockedRecipe:
    recipe = LockedRecipe(
        model=str(of.path), weights=of.weights, dtype=of.dtype, size="64x64",
        backend="null:unet_ms=3", decoder="taesd", steps=2, batch=1,
        scheduler=of.scheduler_name, guidance=0.0, guidance_mode="none", low_memory=False,
        bundle=of.hash,
        measured={"machine": this_machine(), "place": "here", "run": "a run", "rounds": 5,
                  "provenance": "measured"},
        figures={"latency": [1.0, 0.9, 1.1]}, wanted={"within": "latency<=4000ms",
                                                      "best": "images/s"},
    )  # fmt: skip
    return replace(recipe, **more)


@pytest.fixture
def saved(tiny_bundle: Bundle, tmp_path: Path) -> Callable[..., Path]:
    def save(**more: Any) -> Path:
        recipe_for(tiny_bundle, **more).write(tmp_path / "recipe.toml")
        return tmp_path / "recipe.toml"

    return save


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@given(TEXTS, st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 10**6))
def test_a_recipe_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float, steps: int
) -> None:
    recipe = LockedRecipe(
        text, text, "fp16", "64x64", text, "vae", steps, 1, text, number, "batch", True, text,
        {"place": text}, {"latency": [number, number, number]}, {"within": text},
    )  # fmt: skip
    file = tmp_path_factory.getbasetemp() / "any.toml"
    recipe.write(file)
    assert LockedRecipe.read(file) == recipe


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace("steps\" = 2", "steps\" = 1"), "edited"),
        (lambda text: text.replace("schema = 1", "schema = 2"), "schema"),
        (lambda text: text[: len(text) // 2], "no TOML|tables|edited"),
        (lambda text: text.replace("[figures]", "[figure]"), "tables"),
        (lambda text: text + "\n[more]\n", "tables"),
        (lambda _: "schema = 1\n", "tables"),
        (lambda _: "", "schema"),
    ],
)  # fmt: skip
def test_an_edited_recipe_is_refused(
    saved: Callable[..., Path], change: Callable[[str], str], why: str
) -> None:
    file = saved()
    text = change(file.read_text())
    assert text != file.read_text()
    file.write_text(text)
    with pytest.raises(PreconditionError, match=why) as refused:
        LockedRecipe.read(file)
    assert "addbench choose" in refused.value.next


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="cannot be read"):
        LockedRecipe.read(tmp_path / "none.toml")
    assert shell(image_main, ["a star", "--recipe", str(tmp_path / "none.toml")]) == 2
    assert os.listdir(tmp_path) == []


def test_load_pipeline_follows_it(saved: Callable[..., Path], recwarn: Any) -> None:
    with load_pipeline(recipe=saved()) as pipe:
        assert (pipe.backend.name, pipe.decoder) == ("null", "taesd")
        assert pipe.backend.options["unet_ms"] == 3.0
    assert not [each for each in recwarn if "recipe" in str(each.message)]
    with pytest.raises(PreconditionError, match="beside a recipe"):
        load_pipeline("tiny-sdxl", recipe=saved())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"bundle": "another"}, "bundle was another"),
        ({"measured": {"machine": "f" * 12, "place": "A CPU", "run": "r", "rounds": 1,
                       "provenance": "measured"}}, "measured on A CPU"),
        ({"measured": {"machine": "ai100", "place": "ai100", "run": "r", "rounds": 1,
                       "provenance": "modelled"}}, "are modelled"),
    ],
)  # fmt: skip
def test_elsewhere_it_warns(saved: Callable[..., Path], more: dict[str, Any], said: str) -> None:
    with pytest.warns(UserWarning, match=said), load_pipeline(recipe=saved(**more)):
        pass


def test_image_follows_it(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "x.png")]
    assert shell(image_main, ["a star", "--recipe", str(saved(bundle="another")), *out]) == 0
    told = capsys.readouterr()
    assert "2 steps" in told.out
    assert "null:unet_ms=3, taesd" in told.out
    assert "bundle was another" in told.err
    assert shell(image_main, ["a star", "--recipe", str(saved()), "--steps", "1", *out]) == 2
    assert "--steps beside a recipe" in capsys.readouterr().err


def test_sweep_follows_it(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = ["--runs", str(tmp_path / "runs"), "--dry-run"]
    assert shell(sweep_main, ["--recipe", str(saved()), *runs]) == 0
    assert "null:unet_ms=3 taesd batch 1 steps 2" in capsys.readouterr().out
    assert shell(sweep_main, ["--recipe", str(saved()), "--batch", "4", *runs]) == 2
    assert "--batch beside a recipe" in capsys.readouterr().err
