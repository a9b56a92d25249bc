"""What is built is not believed because it is there: the operators' library, and its compiler."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from backends.artifacts import cache
from backends.artifacts.cache import ArtifactCache
from backends.base import BackendError
from backends.commands.cache import main as cache_command
from backends.onnxrt import compiler as compilers
from backends.onnxrt import libraries, operators
from backends.registry import parse_backend
from core.files import ROOT
from core.isa import isa

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")

WRITES = """out=; while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
[ -z "$out" ] || echo 'int built;' | c++ -shared -fPIC -x c++ - -o "$out"
"""
"""A compiler that gives an empty library, at once, whatever it is told to build."""
FAILS_LATE = 'case "$*" in *winograd.cc*) echo c++: fatal error: Killed >&2; exit 1;; esac\n'
"""A compiler that works, but not for the operators."""


def compiler(folder: Path, name: str, body: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / name
    script.write_text(f"#!/bin/sh\n{body}")
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    libraries.say_once.cache_clear()
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


def flip(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def open_to_others(library: Path) -> None:
    library.chmod(0o666)


def linked(library: Path) -> None:
    """It lies elsewhere, where others may come to it."""
    library.rename(library.with_name("elsewhere"))
    library.symlink_to("elsewhere")


def given_away(library: Path) -> None:
    os.chown(library, 12345, -1)


DAMAGES = [truncate, empty, flip, unnoted, foreign, open_to_others, linked,
           pytest.param(given_away, marks=needs_root)]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_that_is_not_what_was_built_is_built_again(
    damage: Callable[[Path], None], quick: str, capsys: pytest.CaptureFixture[str]
) -> None:
    library = operators.library()
    whole = library.read_bytes()
    stamp = library.stat().st_mtime_ns
    assert operators.library() == library
    assert library.stat().st_mtime_ns == stamp
    assert cache_command(["verify"]) == 0
    damage(library)
    assert not libraries.is_ours(library)
    assert cache_command(["verify"]) == 4
    said = capsys.readouterr().out
    assert f"{library}  sound" in said
    assert f"{library}  not what was built" in said
    assert not library.exists()
    assert operators.library() == library
    assert libraries.is_ours(library)
    assert len(library.read_bytes()) == len(whole)


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_built_again_without_being_verified(
    damage: Callable[[Path], None], quick: str
) -> None:
    library = operators.library()
    damage(library)
    assert operators.library() == library
    assert libraries.is_ours(library)


@needs_compiler
@pytest.mark.parametrize("above", ["build", "build/native"])
def test_what_lies_where_others_can_write_is_not_loaded(
    above: str, quick: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = operators.library()
    (tmp_path / above).chmod(0o777)
    assert not libraries.is_ours(first)
    library = operators.library()
    assert library == tmp_path / "cache" / "addbench" / "native" / first.name
    assert operators.library() == library
    said = capsys.readouterr().err
    assert said.count(f"{tmp_path / above} can be written to by everybody") == 1
    assert str(library.parent) in said
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(BackendError, match="can be kept nowhere"):
        operators.library()
    (tmp_path / "cache").chmod(0o1777)  # as /tmp is: what is there is its owner's alone
    assert operators.library() == library


@needs_root
@needs_compiler
def test_a_folder_of_another_users_is_not_built_in(quick: str, tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    os.chown(tmp_path / "build", 12345, -1)
    assert operators.library().is_relative_to(tmp_path / "cache")
    assert not (tmp_path / "build" / "native").exists()


@needs_compiler
def test_a_full_build_root_is_enough_where_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As another user than the one who filled it, where the test may become one."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        monkeypatch.setenv("ADDBENCH_BUILD", str(root / "build"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "nowhere"))
        monkeypatch.setenv("CXX", compiler(root, "quick", WRITES))
        library = operators.library()
        before = sorted(root.rglob("*"))
        for folder in (root, root / "build", library.parent):
            folder.chmod(0o555)
        if (child := os.fork()) == 0:
            try:
                if os.getuid() == 0:
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                ended = 0 if operators.library() == library else 1
            except BaseException:
                ended = 2
            os._exit(ended)
        _, status = os.waitpid(child, 0)
        for folder in (root, root / "build", library.parent):
            folder.chmod(0o755)
        assert os.waitstatus_to_exitcode(status) == 0
        assert sorted(root.rglob("*")) == before


@needs_compiler
def test_who_builds_is_waited_for_with_words(
    quick: str, capsys: pytest.CaptureFixture[str]
) -> None:
    library = operators.library()
    truncate(library)
    lock = FileLock(library.with_suffix(".lock"))
    lock.acquire()
    waiter = threading.Thread(target=operators.library)
    waiter.start()
    said = ""
    while "waiting for the process that holds" not in said:
        time.sleep(0.05)
        said += capsys.readouterr().err
    assert not libraries.is_ours(library)
    lock.release()
    waiter.join()
    assert libraries.is_ours(library)


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
    for place in ("one", "two"):  # the same words for two compilers
        monkeypatch.setenv("CXX", "same")
        monkeypatch.setenv("PATH", f"{tmp_path / place}:{os.environ['PATH']}")
        compiler(tmp_path / place, "same", WRITES)
        compilers.identity.cache_clear()
        names.add(operators.library().name)
    monkeypatch.setattr(operators, "_vectors", lambda isa: ["-msse4.2"])
    names.add(operators.library().name)
    assert len(names) == 6


@needs_compiler
@pytest.mark.skipif("x86_64" not in isa(), reason="flags of x86")
@pytest.mark.parametrize("flags", ["-march=native", "-mavx512f -mavx512bw -mfma"])
def test_instructions_do_not_come_in_by_cxx(
    flags: str, quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    told = compiler(tmp_path, "told", f'echo "$@" >> {log}\n{WRITES}')
    monkeypatch.setenv("CXX", f"{told} {flags}")
    for vectors, knows in (("", set()), ("avx2 fma f16c", {"__AVX2__", "__FMA__", "__F16C__"})):
        monkeypatch.setattr(operators, "isa", lambda vectors=vectors: f"x86_64 {vectors}")
        operators.library()
        (line,) = (line for line in log.read_text().splitlines() if "winograd.cc" in line)
        log.unlink()
        used = [word for word in shlex.split(line) if word.startswith("-m")]
        assert flags.split()[0] in used
        macros = subprocess.run(
            ["c++", *used, "-dM", "-E", "-x", "c++", os.devnull],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        wide = {word for word in macros.split() if word.startswith(("__AVX", "__FMA__", "__F16C"))}
        assert wide - {"__AVX__"} == knows


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo no room >&2; exit 1", "ends with 1: no room"),
        ("kill -9 $$", "ends with -9"),
        ("exit 0", "writes no library"),
        ('while [ "$1" != -o ]; do shift; done; echo hello > "$2"', "writes no library"),
        ("sleep 1000 & echo $! > $0.pid; wait", "does not end within"),
        (FAILS_LATE + WRITES, "fatal error: Killed"),
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
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    libraries.say_once.cache_clear()
    if body and "sleep" in body:
        monkeypatch.setattr(compilers, "TRIAL_S", 1.0)
    path = compiler(tmp_path, "broken", body) if body else "no-such-compiler"
    monkeypatch.setenv("CXX", path)
    backend = parse_backend("ort")
    late = body is not None and body.startswith(FAILS_LATE)
    if not late:
        assert backend.options["norms"] == "layer"
        assert reason in backend.probe().what
    for _ in range(2):
        backend.pipeline(tiny_bundle, "taesd", shapes=None)
    assert backend.options["norms"] == "layer"
    assert backend.row_flags == ("no_compiler",)
    assert reason in backend.probe().what
    assert parse_backend("ort").options["products"] == "op"
    if (pid := Path(f"{path}.pid")).exists():
        line = Path(f"/proc/{pid.read_text().strip()}/cmdline")
        assert not line.exists() or "sleep" not in line.read_text()
    said = capsys.readouterr().err
    assert said.count("no C++ compiler") == 1
    assert reason in said
    assert "g++" in said


@needs_compiler
def test_operators_that_were_asked_for_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bundle
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("CXX", compiler(tmp_path, "asked", FAILS_LATE + WRITES))
    with pytest.raises(BackendError, match="(?s)cannot be built.*fatal error: Killed"):
        parse_backend("ort:products=linear").pipeline(tiny_bundle, "taesd", shapes=None)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child that its parent ended")
def test_a_killed_process_takes_its_compiler_along(tmp_path: Path) -> None:
    script = compiler(tmp_path, "driver", f"sleep 1000 & echo $! > {tmp_path}/pid; wait")
    code = f"from core.process import run_kept; run_kept([{script!r}])"
    builder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    child = Path("/proc") / (tmp_path / "pid").read_text().strip()
    assert "sleep" in (child / "cmdline").read_text()
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    until = time.monotonic() + 30
    while child.exists() and "sleep" in (child / "cmdline").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


@needs_compiler
def test_an_older_onnxruntime_is_refused_by_the_library() -> None:
    """One whose API has no table of this version, as its GetApi says."""
    make = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    words: list[bytes] = []

    @make
    def create_status(code: int, text: bytes) -> int:
        words.append(text)
        return 42

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
    get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_api = get(lambda version: ctypes.addressof(table) if version == 1 else None)
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), None)
    register = ctypes.CDLL(str(operators.library())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 42
    assert b"1.18" in words[0]


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
