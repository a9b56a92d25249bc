"""Presets, changes to them, and what a stage's weights depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import PreconditionError
from distill.config import PRESETS, STAGES, load_config


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_presets_load(preset: str) -> None:
    config = load_config(preset)
    assert config.name == preset
    assert set(config.stages) <= set(STAGES)


def test_changes() -> None:
    config = load_config("shapes", ["student.weighting=sds", "student.lambda=1.5", "data.pool=9"])
    assert config.student.weighting == "sds"
    assert config.student.lambda_ == 1.5
    assert config.data.pool == 9


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("student.weighting=best", "not a choice"),
        ("student.wait=1", "unknown key"),
        ("student.batch=many", "wrong type"),
        ("student.batch=1.5", "wrong type"),
        ("student.pretrained=1", "wrong type"),
        ("student.batch", "no value"),
        ('stages=["dinner"]', "no stage"),
    ],
)
def test_wrong_changes_are_named(change: str, what: str) -> None:
    with pytest.raises(PreconditionError, match=what):
        load_config("shapes", [change])


def test_unknown_presets_and_files(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="no preset"):
        load_config("nothing")
    bad = tmp_path / "bad.toml"
    bad.write_text("stages = [")
    with pytest.raises(PreconditionError, match="not valid TOML"):
        load_config(str(bad))
    bad.write_text("[data]\nsize = 64\n")
    with pytest.raises(PreconditionError, match="incomplete"):
        load_config(str(bad))


def test_a_stage_depends_on_itself_and_those_before() -> None:
    base = load_config("shapes")
    for section, changed in (
        ("tiny-autoencoder", {"tiny-autoencoder"}),
        ("student", {"student", "tiny-autoencoder"}),
        ("teacher", {"teacher", "student", "tiny-autoencoder"}),
        ("features", {"features", "student", "tiny-autoencoder"}),
        ("autoencoder", {"autoencoder", "tiny-autoencoder", "teacher", "student"}),
    ):
        other = load_config("shapes", [f"{section}.iterations=3"])
        assert {s for s in STAGES if base.stage_hash(s) != other.stage_hash(s)} == changed


def test_what_is_not_trained_changes_no_hash() -> None:
    base, other = load_config("shapes"), load_config("shapes", ["evaluate-captions=3"])
    assert [base.stage_hash(s) for s in STAGES] == [other.stage_hash(s) for s in STAGES]
