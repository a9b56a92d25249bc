"""Storms: bodies at random, clients that leave at random, a worker killed under load. Short here;
the slow ones are what the server is held to. Workers are test doubles."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import string
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import MODEL, Running, decoded, is_picture_of, serving, until
from websockets.exceptions import ConnectionClosed

from serve.envelope import pack

Start = Callable[..., Running]
JSON = {"Content_Type": "application/json"}
PATH = "/v1/images/generations"
PICTURES = replace(MODEL, pictures=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = serving(tmp_path_factory.mktemp("log"), model=PICTURES, draw_ms=0.0).wait_ready()
    yield running
    running.stop()


NAMES = st.sampled_from(["prompt", "n", "size", "seed", "model", "response_format", "user",
                         "output_format", "num_inference_steps", "decoder", "guidance_scale",
                         "quality", "id", "steps", "strength"]) | st.text(max_size=8)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
    | st.sampled_from(["png", "file", "8x8", "double", "vae", "auto", "1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner,
                                                                max_size=2),
    max_leaves=5,
)  # fmt: skip
BODIES = st.binary(max_size=60) | st.dictionaries(NAMES, VALUES, max_size=6).map(
    lambda body: json.dumps(body).encode()
)


def words(answer: Any) -> bool:
    """Whether an error is in three parts."""
    what, _, rest = answer["error"]["message"].partition(": ")
    return bool(what) and "; " in rest


@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@given(BODIES)
def test_any_body_is_a_picture_or_an_error_in_words(shared: Running, body: bytes) -> None:
    status, _, answer = shared.call("POST", PATH, body, **JSON)
    assert status in (200, 400, 404)
    if status != 200:
        assert words(answer)


@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(NAMES, VALUES, max_size=5), st.binary(max_size=30))
def test_any_live_message_is_answered(shared: Running, header: dict[str, Any], body: bytes) -> None:
    try:
        text = json.dumps(header, allow_nan=False)
    except ValueError:
        return
    with shared.live() as typist:
        typist.socket.send(len(text.encode()).to_bytes(4, "big") + text.encode() + body)
        typist.send(7, "after it")
        answer, file = typist.answer()
        if answer["id"] != 7:
            answer, file = typist.answer()
        assert is_picture_of(file, "after it", 0)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | st.text(max_size=50))
def test_any_bytes_on_a_socket_are_answered_or_closed(
    shared: Running, message: bytes | str
) -> None:
    with shared.live() as typist:
        try:
            typist.socket.send(message)
            answer, _ = typist.answer()
        except ConnectionClosed as closed:
            answer = {"error": closed.rcvd.code if closed.rcvd else None}
        assert answer["error"]


def leave_at_random(server: Running, seed: int) -> None:
    """A client that asks and leaves: before, while or after its picture is drawn, or in the midst
    of its own words."""
    rng = random.Random(seed)
    body = json.dumps({"prompt": "".join(rng.choices(string.ascii_letters, k=9)), "n": 1}).encode()
    head = (
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
        b" application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    upgrade = (
        b"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    live = b"\x82" + bytes([0x80 | 31]) + b"\0\0\0\0" + pack({"id": 1, "prompt": "leaving"})
    whole = head + body if rng.random() < 0.7 else upgrade + live
    with socket.create_connection(("127.0.0.1", server.port), 30) as client:
        cut = rng.randrange(len(whole)) if rng.random() < 0.2 else len(whole)
        client.sendall(whole[:cut])
        time.sleep(rng.random() * 0.05)
        if rng.random() < 0.5:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def storm(server: Running, clients: int) -> None:
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda seed: leave_at_random(server, seed), range(clients)))
    until(lambda: server.metric("queue_depth") == 0)
    until(lambda: server.metric("in_work") == 0)
    until(lambda: server.metric("live_connections") == 0)
    until(lambda: server.app.answering <= 1)  # the one that asks
    assert not server.app.engine.waiting.busy
    status, _, answer = server.draw(prompt="after the storm", seed=3)
    assert status == 200
    assert is_picture_of(decoded(answer)[0], "after the storm", 3)


def test_clients_that_leave_at_random_leave_nothing_behind(start: Start) -> None:
    storm(start(draw_ms=10.0).wait_ready(), 500)


@pytest.mark.slow
def test_memory_is_flat_over_ten_minutes_of_them(start: Start) -> None:
    server = start(draw_ms=5.0).wait_ready()
    life = server.app.engine.attendants[0].life
    assert life is not None
    worker, own = psutil.Process(life.process.pid), psutil.Process()
    storm(server, 1000)
    before, end = own.memory_info().rss + worker.memory_info().rss, time.monotonic() + 600
    while time.monotonic() < end:
        storm(server, 500)
    assert own.memory_info().rss + worker.memory_info().rss < before + (32 << 20)


def many(server: Running, requests: int, threads: int) -> tuple[int, int]:
    """Ask for so many pictures; how many came and were right, how many were refused as busy."""
    right, busy, lock = 0, 0, threading.Lock()

    def ask(number: int) -> None:
        nonlocal right, busy
        while True:
            status, _, answer = server.draw(prompt=f"picture {number}", seed=number)
            if status != 429:
                break
            with lock:
                busy += 1
            time.sleep(0.02)
        if status == 200:
            (file,) = decoded(answer)
            assert is_picture_of(file, f"picture {number}", number)
            with lock:
                right += 1
        else:
            assert answer["error"]["code"] == "worker_died"

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, range(requests)))
    return right, busy


def test_none_is_lost_and_none_is_answered_with_anothers_picture(start: Start) -> None:
    server = start(draw_ms=1.0, queue=8).wait_ready()
    right, busy = many(server, 300, 24)
    assert right == 300
    assert busy > 0  # the queue was really full at times
    assert server.metric("images_total") == 300


@pytest.mark.slow
def test_ten_thousand_requests(start: Start) -> None:
    server = start(draw_ms=0.5, queue=8).wait_ready()
    assert many(server, 10_000, 16)[0] == 10_000
    assert server.metric("images_total") == 10_000


def test_a_worker_killed_under_load_again_and_again(start: Start) -> None:
    server = start(draw_ms=10.0, queue=64, sizes=[1, 2]).wait_ready()
    over = threading.Event()
    kills = 0

    def killing() -> None:
        nonlocal kills
        while not over.wait(0.4):
            if (life := server.app.engine.attendants[0].life) and life.ready_at:
                os.kill(life.process.pid, signal.SIGKILL)
                kills += 1

    killer = threading.Thread(target=killing)
    killer.start()
    right, _ = many(server, 150, 12)  # every one is answered
    over.set()
    killer.join()
    assert server.metric("worker_restarts_total") > 0
    assert right >= 150 - 2 * kills  # a death costs what was in work alone


def test_overload_keeps_its_bound_and_is_calm_again(start: Start) -> None:
    """Twice what it can: what is accepted waits for the queue at most, and no longer."""
    server = start(draw_ms=20.0, sizes=[1], queue=4).wait_ready()
    taken: list[float] = []
    codes: list[int] = []

    def ask(number: int) -> None:
        time.sleep(number * 0.01)
        started = time.perf_counter()
        status, headers, _ = server.draw(prompt=f"p{number}")
        codes.append(status)
        if status == 200:
            taken.append(time.perf_counter() - started)
        else:
            assert status == 429
            assert int(headers["retry-after"]) >= 1

    with ThreadPoolExecutor(100) as pool:
        list(pool.map(ask, range(100)))
    assert codes.count(429) > 10
    assert codes.count(200) > 10
    started = time.perf_counter()
    assert server.draw(prompt="calm")[0] == 200
    assert time.perf_counter() - started < 2


def test_a_log_stays_small(start: Start, tmp_path: Path) -> None:
    server = start().wait_ready()
    for number in range(50):
        server.draw(prompt=f"refuse {number}")
    assert server.app.engine.attendants[0].post.log.stat().st_size == 0
