"""The calibration file: what it holds, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from core.errors import PreconditionError
from export.bundle import Bundle
from export.quantize.calibration import Calibration, CalibrationOrigin, join, save

ORIGIN = CalibrationOrigin(
    "tiny-sdxl", "hub", "fp16", "0" * 64, ("a fox", "a hen"), (0, 1), 4, "Euler", 3.0, 2, "ort", {}
)


def recorded(path: Path, samples: int = 3, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "sample": torch.randn(samples, 4, 8, 8, generator=generator).half(),
        "timestep": torch.rand(samples, generator=generator),
    }
    save(path, ORIGIN, tensors)
    return path


def test_what_was_recorded_comes_back_sample_by_sample(tmp_path: Path) -> None:
    parts = [recorded(tmp_path / f"{n}.safetensors", samples=n + 1, seed=n) for n in range(3)]
    join(tmp_path / "all.safetensors", ORIGIN, parts)
    found = Calibration.open(tmp_path / "all.safetensors")
    assert (found.origin, found.samples) == (ORIGIN, 6)
    feeds = list(found.feeds())
    assert [feed["sample"].shape for feed in feeds] == [(1, 4, 8, 8)] * 6
    assert feeds[0]["sample"].dtype == np.float16
    assert feeds[0]["timestep"].shape == (1,)
    apart = [feed for part in parts for feed in Calibration.open(part).feeds()]
    for one, other in zip(feeds, apart, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    same = [Calibration.open(recorded(tmp_path / n)).hash for n in ("a", "b")]
    other = Calibration.open(recorded(tmp_path / "c", seed=1)).hash
    assert same[0] == same[1] != other
    assert replace(ORIGIN, steps=5).hash != ORIGIN.hash


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError) as caught:
        Calibration.open(tmp_path / "none.safetensors")
    assert "there is no calibration file" in caught.value.what
    assert "addbench calibrate" in caught.value.next


@pytest.mark.parametrize("bytes_left", [0, 7, 100, -1])
def test_a_file_that_was_cut_is_refused(bytes_left: int, tmp_path: Path) -> None:
    path = recorded(tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(PreconditionError, match="cannot be read") as caught:
        Calibration.open(path)
    assert "cut short" in caught.value.why
    assert "--force" in caught.value.next


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(PreconditionError, match="not a calibration file"):
        Calibration.open(tmp_path / "other.safetensors")


def test_a_file_of_another_model_is_refused(tmp_path: Path, tiny_bundle: Bundle) -> None:
    found = Calibration.open(recorded(tmp_path / "other.safetensors"))
    with pytest.raises(PreconditionError, match=f"not of {tiny_bundle.path.name}") as caught:
        found.require(tiny_bundle)
    assert "tiny-sdxl-hub-fp16" in caught.value.why
    assert f"--model {tiny_bundle.path}" in caught.value.next
