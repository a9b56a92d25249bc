"""Work in child processes: killed ones, failing ones, ones in another environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from backends.artifacts.child import compile_peak_mb, environment_for, peak_bytes, run_child
from backends.base import BackendError, OutOfMemoryError


def script(path: Path, text: str) -> Path:
    """A stand-in for an environment's python."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def call(folder: Path, python: Path) -> None:
    run_child(
        "backends.ort", {"x": 1}, folder, doing="compiling it", need_bytes=10**9,
        advice="try something else", python=python,
    )  # fmt: skip


def test_a_killed_child_is_out_of_memory(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="compiling it was killed") as error:
        call(tmp_path, script(tmp_path / "python", "kill -9 $$"))
    assert "1.0 GB" in error.value.next


def test_a_failing_child_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="exit code 3") as error:
        call(tmp_path, script(tmp_path / "python", "echo its last words >&2; exit 3"))
    assert error.value.why == "its last words"
    assert error.value.next == "try something else"
    assert compile_peak_mb(tmp_path) is None


def test_its_peak_is_kept_in_the_artifact(tmp_path: Path) -> None:
    call(tmp_path, script(tmp_path / "python", "echo '{\"peak_bytes\": 500000000}'"))
    assert compile_peak_mb(tmp_path) == 500.0


def test_a_kernel_in_user_space_tells_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """gVisor: no VmHWM in a process's status, no vmstat at all."""
    from core.process import oom_kills

    monkeypatch.setattr(Path, "read_text", lambda _: "Name:\tpython\nVmRSS:\t1000 kB\n")
    assert peak_bytes() > 1 << 20

    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert oom_kills() == 0


def test_another_environment_is_given_none_of_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere/site-packages")
    here = Path(sys.executable)
    assert environment_for(here, here)["PYTHONPATH"] == "/somewhere/site-packages"
    assert "PYTHONPATH" not in environment_for(Path("/another/bin/python"), here)
