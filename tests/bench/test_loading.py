"""What a start costs with an empty cache, without one, and with a filled one."""

from __future__ import annotations

import pytest

from bench.loading import WAYS
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
