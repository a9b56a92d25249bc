"""What is built is not believed because it is there: the operators' library, and its compiler."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from backends.artifacts import cache
from backends.artifacts.cache import ArtifactCache
from backends.onnxrt import operators
from backends.registry import parse_backend

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

WRITES = """out=; while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
[ -z "$out" ] || echo 'int built;' | c++ -shared -fPIC -x c++ - -o "$out"
"""
"""A compiler that gives an empty library, at once, whatever it is told to build."""


def compiler(folder: Path, name: str, body: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / name
    script.write_text(f"#!/bin/sh\n{body}")
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    path = compiler(tmp_path, "quick", WRITES)
    monkeypatch.setenv("CXX", path)
    return path


def truncate(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:100])


def empty(library: Path) -> None:
    library.write_bytes(b"")


def unnoted(library: Path) -> None:
    library.with_suffix(".sha256").unlink()


def foreign(library: Path) -> None:
    library.with_suffix(".sha256").write_text("0" * 64)


def open_to_others(library: Path) -> None:
    library.chmod(0o666)


@needs_compiler
@pytest.mark.parametrize("damage", [truncate, empty, unnoted, foreign, open_to_others])
def test_a_library_that_is_not_what_was_built_is_built_again(damage, quick: str) -> None:
    library = operators.library()
    whole = library.read_bytes()
    stamp = library.stat().st_mtime_ns
    assert operators.library() == library
    assert library.stat().st_mtime_ns == stamp
    damage(library)
    assert not operators.is_ours(library)
    assert operators.library() == library
    assert operators.is_ours(library)
    assert len(library.read_bytes()) == len(whole)


@needs_compiler
def test_its_name_holds_what_made_it(
    quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {operators.library().name}
    monkeypatch.setenv("CXX", f"{quick} -O1")
    names.add(operators.library().name)
    version = 'case "$1" in --version) echo another; exit;; esac\n'
    monkeypatch.setenv("CXX", compiler(tmp_path, "newer", version + WRITES))
    names.add(operators.library().name)
    monkeypatch.setattr(operators, "_vectors", lambda isa: ["-msse4.2"])
    names.add(operators.library().name)
    assert len(names) == 4


def test_flags_of_ones_own_come_before_the_baseline(
    quick: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []
    monkeypatch.setenv("CXX", f"{quick} -march=native")
    monkeypatch.setattr(operators, "_build", lambda command, *rest: commands.append(command))
    operators.library()
    (command,) = commands
    last = [flag for flag in command if flag.startswith("-march")][-1]
    assert last in (*operators.BASELINE, "-march=native")
    assert not operators.BASELINE or last == operators.BASELINE[0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo no room >&2; exit 1", "ends with 1: no room"),
        ("kill -9 $$", "ends with -9"),
        ("exit 0", "writes no library"),
        ('while [ "$1" != -o ]; do shift; done; echo hello > "$2"', "writes no library"),
        (None, "is not there"),
    ],
)
def test_a_compiler_that_gives_nothing_is_none(
    body: str | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_bundle,
) -> None:
    path = compiler(tmp_path, "broken", body) if body else "no-such-compiler"
    monkeypatch.setenv("CXX", path)
    backend = parse_backend("ort")
    assert backend.options["norms"] == "layer"
    assert reason in backend.probe().what
    for _ in range(2):
        backend.pipeline(tiny_bundle, "taesd", shapes=None)
    said = capsys.readouterr().err
    assert said.count("no C++ compiler") == 1
    assert reason in said
    assert "g++" in said


def test_torch_compile_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = parse_backend("torch:mode=compile").probe()
    assert not found.usable
    assert "g++" in found.next
    assert parse_backend("torch").probe().usable


def test_a_full_cache_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactCache(tmp_path)
    made, _ = store.get_or_make("key", "label", lambda folder: (folder / "x").write_text("x"))
    monkeypatch.setattr(cache, "waiting_lock", lambda file: pytest.fail("it writes a lock"))
    monkeypatch.setattr("os.utime", lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert store.get_or_make("key", "label", lambda folder: None) == (made, True)
