"""The comparison on the CPU: it sees bad scales, and what the shipped model makes of good ones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from backends.check.gate import GATES
from backends.check.scales_parity import compare, report
from backends.commands.calibrate import record
from backends.ort import OrtBackend
from backends.quantised.scales import disk_need, memory_need
from core.errors import PreconditionError
from core.files import ROOT
from export.__main__ import main as export_main
from export.bundle import Bundle
from export.quantize.calibration import Calibration
from export.quantize.modelopt import make_scales, modelopt_version
from export.quantize.qdq import (
    SCALES,
    SCHEMES,
    read_scales,
    scheme_of,
    write_scales,
)

STANDIN = ROOT / "tests" / "doubles" / "modelopt_standin"
PLAIN = {"graph": "canonical", "threads": "1"}


def recorded(bundle: Bundle, path: Path, **asked: object) -> Calibration:
    return record(bundle, OrtBackend(PLAIN), path, say=lambda line: None, **asked)  # type: ignore[arg-type]


def test_bad_scales_are_seen(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """modelopt is its double here. Ranges a twentieth of the right ones cut nearly everything."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(STANDIN)
    monkeypatch.setattr("backends.check.scales_parity.IMAGES", 1)
    found = recorded(
        tiny_bundle,
        tmp_path / "c.safetensors",
        prompts=["a fox"],
        steps=1,
        seed=0,
        random_weights=True,
    )
    make_scales(tiny_bundle.parts["unet"].graph, "qdq-int8", found.path, tmp_path)
    good = compare(tiny_bundle, tmp_path / SCALES, found.origin, threads="1")
    layers, facts = read_scales(tmp_path / SCALES)
    cut = {name: replace(one, activation=one.activation / 20) for name, one in layers.items()}
    write_scales(tmp_path / SCALES, cut, facts)
    bad = compare(tiny_bundle, tmp_path / SCALES, found.origin, threads="1")
    gate = GATES["int8"].relative_error
    assert good["unet"]["relative_error"] < gate < bad["unet"]["relative_error"]
    assert good["images"][0]["psnr_db"] > bad["images"][0]["psnr_db"]
    assert good["images"][0]["seed"] == 1  # 0 was recorded
    assert "1 images of 1 steps PSNR" in report(good)
    assert not list(Path(tmp_path).glob(".scales-*"))


def test_the_needs_of_a_calibration_grow_with_the_weights() -> None:
    assert 80e9 < memory_need(5_135_000_000) < 100e9
    assert 45e9 < disk_need(5_135_000_000) < 60e9


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_the_shipped_teacher_in_8_bits(precision: str, tmp_path: Path) -> None:
    """Calibrated by nvidia-modelopt itself on recorded tensors; skipped where it is missing."""
    try:
        modelopt_version()
    except PreconditionError as error:
        pytest.skip(f"{error.what}; {error.next}")
    argv = ["--model", str(ROOT / "models" / "shapes-teacher"), "--out", str(tmp_path / "bundle")]
    assert export_main([*argv, "--no-parity"]) == 0
    bundle = Bundle.open(tmp_path / "bundle")
    captions = [
        "a large red circle on the left of a black background",
        "a small blue star above a large white square on a gray background",
    ]
    found = recorded(
        bundle, tmp_path / "c.safetensors", prompts=captions, steps=20, guidance=3.0, kept=4
    )
    assert found.samples == 2 * 4 * 2
    code = (
        "import sys; from pathlib import Path; from export.quantize.modelopt import make_scales;"
        " make_scales(*map(Path, sys.argv[1:2]), sys.argv[2], *map(Path, sys.argv[3:]))"
    )
    scheme = scheme_of(precision).name
    words = [str(bundle.parts["unet"].graph), scheme, str(found.path), str(tmp_path)]
    subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=True)
    compared = compare(bundle, tmp_path / SCALES, found.origin, threads="1")
    print(report(compared))
    assert compared["left"] == 0
    assert compared["layers"] == 66
    assert 1e-2 < compared["unet"]["relative_error"] < 5e-2
    assert min(image["psnr_db"] for image in compared["images"]) > 35
    assert {scheme_of(p).name for p in ("fp8", "int8")} == set(SCHEMES)
