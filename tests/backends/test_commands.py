"""The commands of this room, as a user types them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from core.files import ROOT
from export.bundle import Bundle


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_listing_says_what_can_be_used() -> None:
    done = command("backends")
    assert done.returncode == 0, done.stderr
    for name in ("ort", "torch", "null"):
        assert name in done.stdout


def test_generate_writes_a_png_that_says_what_made_it(tiny_bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "pig.png"
    done = command(
        "addbench", "image", "an origami pig on fire", "--model", str(tiny_bundle.path),
        "--backend", "ort", "--steps", "2", "--seed", "7", "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "UNet" in done.stdout
    image = Image.open(out)
    assert image.size == tiny_bundle.size
    facts = {k: image.text[k] for k in ("prompt", "seed", "steps", "model", "backend")}
    assert facts == {
        "prompt": "an origami pig on fire",
        "seed": "7",
        "steps": "2",
        "model": "tiny-sdxl",
        "backend": "ort",
    }
    assert "onnxruntime" in image.text["versions"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["addbench", "image", "x", "--out", "x.gif"], 2, "not a PNG"),
        (["addbench", "image", "x", "--steps", "0"], 2, "less than 1"),
        (["addbench", "image", "x", "--backend", "tpu"], 2, "no backend called"),
        (["addbench", "image", "x", "--model", "no-such"], 2, "next:"),
        (["addbench", "image", "x", "--decoder", "gan"], 2, "next:"),
        (["backends", "compile", "--batch", "0"], 2, "at least 1"),
        (["addbench", "cache", "prune", "--max-gb", "-1"], 2, "negative"),
        (["addbench", "parity", "--model", "/no/such/place"], 2, "next:"),
        (["backends", "dance"], 2, "invalid choice"),
    ],
)
def test_mistakes_are_answered(
    words: list[str], code: int, message: str, tiny_bundle: Bundle
) -> None:
    if "--decoder" in words:
        words = [*words, "--model", str(tiny_bundle.path)]
    done = command(*words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
