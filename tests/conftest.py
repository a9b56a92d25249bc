"""Fixtures that every room shares."""

from __future__ import annotations

import hashlib
import os
import signal
from importlib.metadata import version
from pathlib import Path

import pytest
import warm
from clones import make_clone
from hypothesis import is_hypothesis_test, settings

from core.files import ROOT
from export.__main__ import main as export_main
from export.bundle import Bundle

# A shell's background jobs ignore Ctrl-C, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests in parallel: a core each, that their threads do not wait for one another's.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {allowed[int(worker.removeprefix("gw")) % len(allowed)]})

warm.install()

# A deadline would judge the machine, not the code: first calls import libraries.
settings.register_profile("addbench", deadline=None)
settings.load_profile("addbench")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A third of the examples of every property where slow tests are left out."""
    if config.option.markexpr != "not slow":
        return
    for item in items:
        if (test := getattr(item, "obj", None)) and is_hypothesis_test(test):
            own = getattr(test, "_hypothesis_internal_use_settings", settings())
            test = getattr(test, "__func__", test)
            fewer = max(5, own.max_examples // 3)
            test._hypothesis_internal_use_settings = settings(own, max_examples=fewer)


def _key(folder: Path) -> str:
    """What a bundle of the checkpoint or architecture in `folder` depends on."""
    digest = hashlib.sha256()
    code = ("export/*.py", "export/source/*.py", "export/lower/*.py",
            # The parity record and the reference images come from these.
            "backends/pipeline/*.py", "backends/check/*.py", "backends/torch.py",
            "backends/ort.py")  # fmt: skip
    files = [file for pattern in code for file in sorted(ROOT.glob(pattern))]
    own = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors"))
    for file in [*files, *own]:
        digest.update(file.read_bytes())
    for package in ("torch", "diffusers", "transformers", "onnx", "onnxscript"):
        digest.update(version(package).encode())
    return digest.hexdigest()[:12]


def _kept(model: str, weights: str, folder: Path) -> Bundle:
    """A bundle with FP16 weights, exported once and kept below build/test."""
    root = Path(os.environ.get("ADDBENCH_TEST_BUNDLES") or ROOT / "build" / "test")
    target = root / f"{model}-{weights}-fp16-{_key(folder)}"
    asked = ["--model", model, "--weights", weights, "--dtype", "fp16"]
    assert export_main([*asked, "--out", str(target)]) == 0
    return Bundle.open(target)


@pytest.fixture(scope="session")
def tiny_bundle() -> Bundle:
    """tiny-sdxl with random weights: what is fast to run and need not draw anything."""
    return _kept("tiny-sdxl", "random", ROOT / "export" / "architectures" / "tiny-sdxl")


@pytest.fixture(scope="session")
def shapes_bundle() -> Bundle:
    """shapes-turbo as it ships."""
    return _kept("shapes-turbo", "folder", ROOT / "models" / "shapes-turbo")


@pytest.fixture(scope="session")
def clone(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle, shapes_bundle: Bundle
) -> Path:
    """A copy of the checkout to type commands in: nothing reaches the running environment."""
    folder = tmp_path_factory.mktemp("clone")
    make_clone(folder, tiny_bundle, shapes_bundle)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _bundles_side_by_side(request: pytest.FixtureRequest) -> None:
    """Export the two in two of the parallel workers, before both wait for the same one."""
    names = {"gw0": "tiny_bundle", "gw1": "shapes_bundle"}
    if name := names.get(os.environ.get("PYTEST_XDIST_WORKER", "")):
        request.getfixturevalue(name)
