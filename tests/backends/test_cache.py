"""The artifact cache under real faults: flipped bytes, killed writers, races, a small cap."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backends.artifacts import cache as module
from backends.artifacts.cache import ENTRY, ArtifactCache, disk_bytes
from backends.base import Shapes, artifact_key
from backends.registry import parse_backend
from core.files import ROOT
from export.bundle import Bundle


@pytest.fixture
def cache(tmp_path: Path) -> ArtifactCache:
    return ArtifactCache(tmp_path, cap_gb=1)


def make(content: bytes = b"artifact") -> object:
    def write(folder: Path) -> None:
        (folder / "model.bin").write_bytes(content)

    return write


def test_made_once(cache: ArtifactCache) -> None:
    path, cached = cache.get_or_make("k", "label", make())
    assert not cached
    again, cached = cache.get_or_make("k", "label", make(b"other"))
    assert cached
    assert again == path
    assert (path / "model.bin").read_bytes() == b"artifact"


@pytest.mark.parametrize("keep_time", [False, True])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove", "torn entry"])
def test_a_damaged_artifact_is_made_again(
    cache: ArtifactCache, fault: str, keep_time: bool
) -> None:
    path, _ = cache.get_or_make("k", "label", make())
    file = path / (ENTRY if fault == "torn entry" else "model.bin")
    before = file.stat()
    if fault == "flip":
        file.write_bytes(b"Artifact")
    elif fault == "remove":
        file.unlink()
    else:
        os.truncate(file, 5)
    if keep_time and fault != "remove":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    if fault == "flip" and keep_time:
        # Same size, same time: only `cache verify`, which hashes everything, can see it.
        assert cache.verify() == {"k": False}
        return
    path, cached = cache.get_or_make("k", "label", make())
    assert not cached
    assert (path / "model.bin").read_bytes() == b"artifact"


def test_a_failed_make_leaves_nothing(cache: ArtifactCache) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("the compiler died")

    with pytest.raises(RuntimeError):
        cache.get_or_make("k", "label", broken)
    assert [p.name for p in cache.root.iterdir() if not p.name.endswith(".lock")] == []


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path, cap_gb=1)
    for n, key in enumerate("abc"):
        path, _ = cache.get_or_make(key, key, make(b"x" * 1000))
        os.utime(path / ENTRY, (1000 + n, 1000 + n))
    cache.get_or_make("a", "a", make())  # used again: now the youngest
    assert [entry.key for entry in cache.prune(2200 / 1e9)] == ["b"]
    assert {entry.key for entry in cache.entries()} == {"a", "c"}
    assert [entry.key for entry in cache.prune(0)] == ["c", "a"]


def test_the_cap_spares_what_was_just_used(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path, cap_gb=0)
    cache.get_or_make("a", "a", make())
    cache.get_or_make("b", "b", make())
    assert {entry.key for entry in cache.entries()} == {"a", "b"}


# ---- files that several entries hold

LARGE = bytes(range(256)) * (module.WORTH_SHARING // 256)


def nodes(cache: ArtifactCache) -> dict[str, int]:
    """Entry -> inode of its file."""
    return {entry.key: (entry.path / "model.bin").stat().st_ino for entry in cache.entries()}


def test_what_two_entries_hold_lies_on_disk_once(cache: ArtifactCache) -> None:
    cache.get_or_make("a", "a", make(LARGE))
    cache.get_or_make("b", "b", make(LARGE))
    cache.get_or_make("c", "c", make(LARGE[::-1]))  # as long
    cache.get_or_make("d", "d", make(b"small"))
    cache.get_or_make("e", "e", make(b"small"))
    found = nodes(cache)
    assert found["a"] == found["b"]
    assert len(set(found.values())) == 4, "only large files are looked for"
    assert disk_bytes(cache.entries()) == 2 * len(LARGE) + 2 * len(b"small")
    assert {entry.bytes for entry in cache.entries()} == {len(LARGE), len(b"small")}
    assert all(cache.verify().values())
    assert not list(cache.root.glob("*/.*"))


def test_an_entry_outlives_the_one_it_shares_with(cache: ArtifactCache) -> None:
    for place, key in enumerate("ab"):
        path, _ = cache.get_or_make(key, key, make(LARGE))
        os.utime(path / ENTRY, (1000 + place, 1000 + place))
    # Together they take no more than one: nothing has to go.
    assert cache.prune(1.5 * len(LARGE) / 1e9) == []
    assert [entry.key for entry in cache.prune(0.5 * len(LARGE) / 1e9)] == ["a", "b"]
    for key in "ab":
        cache.get_or_make(key, key, make(LARGE))
    os.utime(cache.root / "a" / ENTRY, (1000, 1000))
    cache.discard(cache.root / "a", (cache.root / "a").stat().st_ino)
    path, cached = cache.get_or_make("b", "b", make())
    assert cached
    assert (path / "model.bin").read_bytes() == LARGE


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_damaged_file_takes_no_sound_ones_place(cache: ArtifactCache, keep_time: bool) -> None:
    path, _ = cache.get_or_make("a", "a", make(LARGE))
    before = (path / "model.bin").stat()
    (path / "model.bin").write_bytes(LARGE[::-1])
    if keep_time:
        os.utime(path / "model.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    other, _ = cache.get_or_make("b", "b", make(LARGE))
    assert (other / "model.bin").read_bytes() == LARGE
    assert cache.verify() == {"a": False, "b": True}


@pytest.mark.parametrize("fault", ["pruned", "gone", "no links", "interrupt"])
def test_sharing_that_fails_costs_nothing(
    cache: ArtifactCache, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other entry goes, before and after it was looked at; a disk without hard links; Ctrl-C
    between link and rename."""
    path, _ = cache.get_or_make("a", "a", make(LARGE))
    link = os.link

    def linking(source: Path, target: Path) -> None:
        if fault == "gone":
            (path / "model.bin").unlink()
        if fault == "no links":
            raise OSError("not supported")
        link(source, target)
        if fault == "interrupt":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", linking)
    if fault == "pruned":
        found = cache.entries()
        shutil.rmtree(path)
        monkeypatch.setattr(cache, "entries", lambda: found)
    if fault == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            cache.get_or_make("b", "b", make(LARGE))
        assert [entry.key for entry in cache.entries()] == ["a"]
        assert not list(cache.root.glob(".staging-*"))
        return
    other, _ = cache.get_or_make("b", "b", make(LARGE))
    assert (other / "model.bin").read_bytes() == LARGE
    assert (other / "model.bin").stat().st_nlink == 1


def test_weights_are_not_copied_for_another_batch_or_level(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """onnxruntime's graphs keep the batch named: one artifact; two levels fold the same weights."""
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    monkeypatch.setattr(module, "WORTH_SHARING", 1 << 10)
    width, height = tiny_bundle.size
    made = [
        parse_backend(f"ort:level={level}").compile(
            tiny_bundle, "vae_decoder", Shapes(batch, width, height)
        )
        for level, batch in (("basic", 1), ("basic", 4), ("extended", 1))
    ]
    assert made[0].path == made[1].path
    files = [artifact.path / "model.onnx.data" for artifact in made if artifact.path]
    assert len({file.stat().st_ino for file in files}) == 1
    assert files[0].stat().st_nlink == 2
    apart = sum(entry.bytes for entry in ArtifactCache().entries())
    saved = apart - disk_bytes(ArtifactCache().entries())
    assert saved >= files[0].stat().st_size
    backend = parse_backend("ort:level=extended,threads=1")
    backend.load(tiny_bundle, made[2]).close()


RACER = """
import sys, time
from pathlib import Path
from backends.artifacts.cache import ArtifactCache
def make(folder):
    with open(Path(sys.argv[1]) / "made", "a") as log:
        log.write("x")
    (folder / "model.bin").write_text("half")
    time.sleep(float(sys.argv[2]))
    (folder / "model.bin").write_text("whole")
path, _ = ArtifactCache(Path(sys.argv[1]) / "cache").get_or_make("k", "label", make)
print((path / "model.bin").read_text())
"""


def racer(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RACER, str(tmp_path), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_two_processes_compile_it_once(tmp_path: Path) -> None:
    racers = [racer(tmp_path, 0.5) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in racers] == ["whole"] * 3
    assert (tmp_path / "made").read_text() == "x"


def test_a_killed_compile_leaves_no_artifact(tmp_path: Path) -> None:
    victim = racer(tmp_path, 60)
    deadline = time.monotonic() + 20
    while not (tmp_path / "made").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not (tmp_path / "cache" / "k").exists()
    out, _ = racer(tmp_path, 0).communicate()
    assert out.strip() == "whole"
    assert not list((tmp_path / "cache").glob(".staging-*"))


def test_the_key_holds_what_the_result_depends_on(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, height = tiny_bundle.size

    def key(backend: str, batch: int = 1, part: str = "unet") -> str:
        return artifact_key(parse_backend(backend), tiny_bundle, part, Shapes(batch, width, height))

    base = key("ort")
    assert base == key("ort", batch=4), "onnxruntime's graphs keep the batch axis named"
    assert base == key("ort:threads=1"), "threads do not change the compiled graph"
    others = [key("ort:level=basic"), key("ort:prepack=1"), key("ort", part="vae_decoder")]
    monkeypatch.setattr("backends.ort.isa", lambda: "another CPU")
    others.append(key("ort"))
    assert len({base, *others}) == 5


def test_a_warm_load_does_not_optimise_again(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path))
    backend = parse_backend("ort")
    width, height = tiny_bundle.size
    cold = backend.compile(tiny_bundle, "taesd_decoder", Shapes(1, width, height))
    monkeypatch.setattr("backends.ort.optimise", None)  # would fail if it were called
    warm = backend.compile(tiny_bundle, "taesd_decoder", Shapes(1, width, height))
    assert (cold.cached, warm.cached) == (False, True)
    assert cold.path == warm.path
    backend.load(tiny_bundle, warm).close()
