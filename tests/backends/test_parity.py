"""Parity must be able to fail: wrong graphs, overflowing activations, missed gates."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends.check.gate import GATES, ImageDistance, gate_for, image_distance
from backends.check.parity import FP16_MAX, verdict
from backends.check.watch import Watch
from backends.load import load_pipeline
from core.errors import AddbenchError
from export.bundle import Bundle


@pytest.fixture
def record(tiny_bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tiny_bundle.path / "parity.json").read_text())
    return copy.deepcopy(found)


def test_the_record_of_the_shared_bundle(record: dict[str, Any], tiny_bundle: Bundle) -> None:
    assert verdict(record) is None
    assert record["ok"] is True
    assert record["bundle_hash"] == tiny_bundle.hash
    assert (record["storage"], record["precision"]) == ("fp16", "fp32")
    assert set(record["parts"]) == set(tiny_bundle.parts)
    assert set(record["images"]) == {f"{d}-{s}" for d in ("vae", "taesd") for s in (1, 2, 4)}
    for found in record["parts"].values():
        assert found["largest_values"], "the FP32 run watched every op"
        assert min(found["relative_error"].values()) > 0, "FP16 weights are never exact"


def failure(record: dict[str, Any]) -> AddbenchError:
    found = verdict(record)
    assert found is not None
    return found


def test_a_part_beyond_its_gate_fails(record: dict[str, Any]) -> None:
    record["parts"]["unet"]["ok"] = False
    assert "does not match torch FP32" in failure(record).what


def test_an_image_beyond_its_gate_fails(record: dict[str, Any]) -> None:
    record["images"]["vae-2"]["ok"] = False
    assert "image vae-2" in failure(record).why


@pytest.mark.parametrize("value", [FP16_MAX / 2 + 1, float("inf"), float("nan")])
def test_overflow_names_part_and_op(record: dict[str, Any], value: float) -> None:
    record["parts"]["vae_decoder"]["largest_values"][0] = {
        "module": "up_blocks.3.resnets.0.conv2",
        "op": "aten::convolution",
        "largest": value,
    }
    what = failure(record).what
    assert "vae_decoder overflows FP16" in what
    assert "aten::convolution in up_blocks.3.resnets.0.conv2" in what
    record["fp16_limit"] = None  # an FP32 bundle has no such limit
    assert verdict(record) is None


def test_the_watch_sees_values_that_never_leave_the_part() -> None:
    class Cancels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4, bias=False)
            torch.nn.init.constant_(self.inner.weight, 3e4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 1e-6

    module = Cancels()
    watch = Watch()
    watch.attach(module)
    with watch, torch.inference_mode():
        out = module(torch.ones(1, 4))
    assert float(out.max()) < 1
    worst = watch.report()[0]
    assert worst["module"] == "inner"
    assert worst["largest"] == pytest.approx(1.2e5)


@given(st.integers(0, 255), st.integers(1, 40))
def test_image_distance_falls_with_the_difference(level: int, change: int) -> None:
    image = np.full((16, 16, 3), level, np.uint8)
    image[::2] = 255 - level
    moved = np.clip(image.astype(int) + change, 0, 255).astype(np.uint8)
    assert image_distance(image, image) == ImageDistance(100.0, 1.0)
    if not np.array_equal(moved, image):
        assert image_distance(moved, image).psnr_db < 52  # one level off everywhere


def test_the_gate_is_that_of_the_coarser_dtype() -> None:
    assert gate_for("fp32", "fp32", "hub") == gate_for("fp16", "fp32", "random") == GATES["fp32"]
    for weights in ("hub", "random"):
        assert gate_for("fp32", "fp16", weights) == GATES["fp16"]
    assert gate_for("fp16", "fp32", "hub") == GATES["fp16"]
    inverted = np.arange(48, dtype=np.uint8).reshape(4, 4, 3).repeat(4, 0).repeat(4, 1)
    assert not image_distance(255 - inverted, inverted).passes(GATES["fp16"])


def test_parity_on_record_is_not_run_again(tiny_bundle: Bundle, tmp_path: Path) -> None:
    from backends.check.parity import check

    said: list[str] = []
    check(tiny_bundle, "ort", say=said.append)
    assert len(said) == 1
    assert "on record" in said[0]


def test_parity_of_other_compiler_code_is_run_again(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backends import base
    from backends.check import parity

    monkeypatch.setattr(base, "code_hash", lambda *modules: "another")
    monkeypatch.setattr(parity, "walk", lambda *job: pytest.fail("walks", pytrace=False))
    with pytest.raises(pytest.fail.Exception, match="walks"):
        parity.check(tiny_bundle, "ort", say=lambda line: None)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_another_prompt_seed_or_step_count_does_not_pass(tiny_bundle: Bundle, steps: int) -> None:
    references = tiny_bundle.references()
    assert references is not None
    gate = gate_for("fp16", "fp32", "random")
    with load_pipeline(str(tiny_bundle.path), "ort", "taesd") as pipeline:
        right = references.images["taesd", steps]
        for prompt, seed, count in (
            ("something else", references.seed, steps),
            (references.prompt, references.seed + 1, steps),
            (references.prompt, references.seed, steps + 1),
        ):
            image = pipeline([prompt], steps=count, seed=seed).images[0]
            assert not image_distance(image, right).passes(gate), (prompt, seed, count)
