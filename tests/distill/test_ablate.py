"""The ablation's verdicts: who agrees with the paper, from rows made up here."""

from __future__ import annotations

from typing import Any

from distill.ablate import CHOICES, DEFAULT, directions, markdown


def row(group: str, choice: str, following: float, fid: float, seed: int = 0) -> dict[str, Any]:
    return {"group": group, "choice": choice, "seed": seed, "iterations": 400, "captions": 200,
            "all@1": following, "all@4": following, "fid_shapes@1": fid}  # fmt: skip


def test_a_worse_choice_agrees_where_the_paper_has_it_worse() -> None:
    rows = [
        row(DEFAULT.group, DEFAULT.name, 0.80, 1.0),
        row("student", "random", 0.10, 30.0),
        row("loss", "distillation only", 0.85, 0.5),
        row("weighting", "sds", 0.81, 1.005),
    ]
    found = {found["choice"]: found for found in directions(rows)}
    assert found["random"]["following_agrees"] is True
    assert found["random"]["fid_agrees"] is True
    assert found["distillation only"]["following_agrees"] is False
    assert found["distillation only"]["fid_agrees"] is False
    assert found["sds"]["following_agrees"] is None  # a point apart is a tie
    assert found["sds"]["fid_agrees"] is None


def test_seeds_are_averaged_and_the_table_has_every_choice_that_ran() -> None:
    rows = [
        row(DEFAULT.group, DEFAULT.name, 0.7, 1.0),
        row(DEFAULT.group, DEFAULT.name, 0.9, 2.0, seed=1),
        row("student", "random", 0.1, 30.0),
        row("student", "random", 0.2, 30.0, seed=1),
    ]
    text = markdown(rows)
    assert "per choice and seed (2)" in text
    assert "| default | default | 0.800 | 0.800 | 1.50 | 20.6 | 0.319 | - | - |" in text
    assert "| student | random | 0.150 | 0.150 | 30.00 | 293.6 | 0.065 | agrees | agrees |" in text
    assert len(text.splitlines()) == 6


def test_the_choices_are_the_papers_table() -> None:
    """Table 1's rows but those that a single feature network and a single pair cannot give."""
    assert {choice.group for choice in CHOICES} == {
        "default", "conditioning", "student", "loss", "weighting", "teacher steps",
    }  # fmt: skip
