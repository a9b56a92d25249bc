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
        "backends.commands.image", "an origami pig on fire", "--model", str(tiny_bundle.path),
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
        (["backends.commands.image", "x", "--out", "x.gif"], 2, "not a PNG"),
        (["backends.commands.image", "x", "--steps", "0"], 2, "less than 1"),
        (["backends.commands.image", "x", "--backend", "tpu"], 2, "no backend called"),
        (["backends.commands.image", "x", "--model", "no-such"], 2, "next:"),
        (["backends.commands.image", "x", "--decoder", "gan"], 2, "next:"),
        (["backends", "compile", "--batch", "0"], 2, "at least 1"),
        (["backends", "cache", "prune", "--max-gb", "-1"], 2, "negative"),
        (["backends", "parity", "/no/such/place"], 2, "next:"),
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


@pytest.mark.parametrize(
    "module",
    ["backends", "backends.commands.image", "backends.commands.calibrate", "export", "bench.sweep"],
)
def test_help_is_quick_and_imports_nothing_heavy(module: str) -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: code = end.code\n"
        "names = {'torch', 'diffusers', 'onnx', 'onnxruntime', 'pandas', 'numpy'}\n"
        "heavy = names & set(sys.modules)\n"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
