"""Whose code is in an artifact's key: the backend's own, all of it, and no more than compiles."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from backends.artifacts.code import code_hash, compiler_files
from backends.registry import BACKENDS, CARDS
from core.files import ROOT

OWN = {
    "ort": ["backends/onnxrt/operators.py", "backends/onnxrt/session.py",
            "backends/quantised/schemes.py", "backends/quantised/recording.py",
            "export/quantize/rewrite.py", "export/lower/linear.py"],
    "openvino": ["export/lower/attention.py"],
    "trt": ["backends/tensorrt/build.py", "backends/tensorrt/request.py",
            "backends/quantised/scales.py", "export/quantize/qdq.py"],
    "cuda": ["backends/nvidia/gpu.py"],
    "qaic": ["backends/cloud_ai/presets.py", "backends/cloud_ai/spec.py",
             "backends/cloud_ai/compiler.py"],
    "web": ["export/web/site.py", "export/web/runtime.py", "export/web/schedule.py"],
    "torch": ["backends/pytorch/selfattention.py"],
}  # fmt: skip
"""Modules that decide what the compiler of a backend gives, wherever in it they are imported."""


def module(name: str) -> str:
    return BACKENDS[name].partition(":")[0]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    for room in ("backends", "export"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize("name", BACKENDS)
def test_another_byte_of_its_own_code_is_another_key(name: str, copy: Path) -> None:
    own = [f"{module(name).replace('.', '/')}.py", *OWN.get(name, [])]
    files = {str(file.relative_to(copy)) for file in compiler_files(module(name), root=copy)}
    assert files >= set(own)
    before = code_hash(module(name), root=copy)
    for file in own:
        code_hash.cache_clear()
        text = (copy / file).read_text()
        (copy / file).write_text(f"{text}#")
        assert code_hash(module(name), root=copy) != before, file
        (copy / file).write_text(text)
    code_hash.cache_clear()
    assert code_hash(module(name), root=copy) == before


def test_what_runs_after_a_compile_is_in_no_key(copy: Path) -> None:
    for place in [*BACKENDS.values(), *CARDS.values()]:
        files = compiler_files(place.partition(":")[0], root=copy)
        folders = {str(file.relative_to(copy).parent) for file in files}
        assert not folders & {"backends/pipeline", "backends/artifacts", "backends/commands"}, place
        assert copy / "backends" / "base.py" not in files
        assert not any(folder.startswith(("bench", "export/source")) for folder in folders)


def test_a_backend_shares_no_code_that_it_does_not_use(copy: Path) -> None:
    for name in ("openvino", "cuda", "qnn"):
        files = compiler_files(module(name), root=copy)
        assert copy / "backends" / "ort.py" not in files, name
