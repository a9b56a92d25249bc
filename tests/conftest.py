"""Fixtures that every room shares."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

from core.files import ROOT
from export.__main__ import main as export_main
from export.bundle import Bundle

# A deadline would judge the machine, not the code: first calls import libraries.
settings.register_profile("addbench", deadline=None)
settings.load_profile("addbench")


def _tiny_key() -> str:
    """What the content of the tiny bundle depends on."""
    digest = hashlib.sha256()
    names = ("build", "checkpoint", "graphs", "models", "parts", "random_weights", "reader",
             "tokenizer")  # fmt: skip
    files = [ROOT / "export" / f"{name}.py" for name in names]
    # The parity record and the reference images come from these.
    judges = ("conditioning", "parity", "pipeline", "recipe", "torch", "watch", "ort")
    files += [ROOT / "backends" / f"{name}.py" for name in judges]
    for file in [
        *files,
        *sorted((ROOT / "export" / "architectures" / "tiny-sdxl").rglob("*.json")),
    ]:
        digest.update(file.read_bytes())
    for package in ("torch", "diffusers", "transformers", "onnx", "onnxscript"):
        digest.update(version(package).encode())
    return digest.hexdigest()[:12]


@pytest.fixture(scope="session")
def tiny_bundle() -> Bundle:
    """tiny-sdxl with random FP16 weights, exported once and kept below build/test."""
    root = Path(os.environ.get("ADDBENCH_TEST_BUNDLES") or ROOT / "build" / "test")
    target = root / f"tiny-sdxl-random-fp16-{_tiny_key()}"
    argv = ["--model", "tiny-sdxl", "--weights", "random", "--dtype", "fp16", "--out", str(target)]
    if importlib.util.find_spec("backends.parity") is None:
        argv.append("--no-parity")
    assert export_main(argv) == 0
    return Bundle.open(target)
