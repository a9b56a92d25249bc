"""What a start costs with an empty cache, without one, and with a filled one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.commands.harness import main
from bench.harness import loading
from bench.harness.loading import WAYS
from core.files import build_root
from export.bundle import Bundle


def test_every_way_loads_and_leaves_nothing_behind(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tiny_bundle.path.parent.iterdir())
    seconds = {}
    for way, load in WAYS.items():
        # `cold` points the cache elsewhere for the life of its process, which is this one here.
        with monkeypatch.context() as patch:
            patch.setenv("ADDBENCH_BUILD", str(build_root()))
            seconds[way] = load(tiny_bundle, "taesd_decoder")
    assert all(value > 0 for value in seconds.values())
    assert sorted(tiny_bundle.path.parent.iterdir()) == before


def test_a_record_says_what_it_is_of(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = {"seconds": 1.0, "peak_memory_mb": 1}
    monkeypatch.setattr(loading, "run_apart", lambda one, way, path, part: took)
    out = tmp_path / "loading.json"
    argv = ["--model", str(tiny_bundle.path), "--part", "taesd_decoder", "--rounds", "1"]
    assert main(["loading", *argv, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert (record["model"], record["bundle_hash"]) == (tiny_bundle.name, tiny_bundle.hash)
    assert record["backend"]["name"] == "ort"
    assert record["backend"]["options"]["threads"] != "auto"  # what it came to
    assert record["environment"]["machine"]
    assert record["rounds"] == {way: [took] for way in WAYS}
    assert record["warm_over_cold"] == 1.0
