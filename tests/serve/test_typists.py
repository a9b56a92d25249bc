"""Scripted typists over a server; workers are test doubles."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest
from running import Running, until

from bench.traffic.typists import type_all

Start = Callable[..., Running]
LINES = ["a large red circle on a black background", "a small blue star left of a green square"]


def test_typists_are_drawn_to_their_last_key_over_a_death(start: Start) -> None:
    server = start(draw_ms=5.0).wait_ready()

    def kill() -> None:
        until(lambda: server.metric("images_total") > 10)
        life = server.app.engine.attendants[0].life
        assert life is not None
        os.kill(life.process.pid, signal.SIGKILL)

    killing = threading.Thread(target=kill)
    killing.start()
    figures = type_all(f"http://127.0.0.1:{server.port}", LINES, 8, 100, 0.005)
    killing.join()
    assert figures["last_drawn"] == 8
    assert figures["in_order"]
    assert figures["errors"] == 0
    assert figures["keys"] == 800
    assert 10 < figures["pictures"] <= 800
    assert 0 < figures["p50_ms"] <= figures["p95_ms"]
    assert server.metric("worker_restarts_total") == 1


@pytest.mark.slow
def test_ten_thousand_keys_of_32_typists(start: Start) -> None:
    server = start(draw_ms=5.0).wait_ready()
    figures = type_all(f"http://127.0.0.1:{server.port}", LINES, 32, 320, 0.05)
    assert figures["last_drawn"] == 32
    assert figures["in_order"]
    assert figures["errors"] == 0
