"""What is said of licences holds for what the code can load and what ships."""

from __future__ import annotations

import tomllib

import pytest

from core.files import ROOT
from export.models import MODELS

NOTICE = (ROOT / "NOTICE").read_text()


def test_the_project_says_its_licence_as_packages_do() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert all((ROOT / name).is_file() for name in project["license-files"])
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_notice_names_all_that_a_model_downloads(model: object) -> None:
    sources = [getattr(model, name) for name in ("checkpoint", "unet", "vae", "taesd")]
    for source in filter(None, sources):
        assert "/".join(source.split("/")[:2]) in NOTICE


def test_notice_names_all_that_ships() -> None:
    shipped = {model.folder for model in MODELS.values() if model.folder}
    assert shipped == {folder for folder in shipped if folder in NOTICE}
    assert {model.licence.split(",")[0] for model in MODELS.values() if model.folder} == {
        "Apache-2.0"
    }
