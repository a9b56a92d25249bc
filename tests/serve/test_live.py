"""`/live` over real sockets; workers are test doubles."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from running import Running, Typist, is_picture_of, pixels, until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from serve.engine import Attendant
from serve.envelope import pack, unpack
from serve.live import LARGEST_MESSAGE, MOST_CONNECTIONS

Start = Callable[..., Running]
TEXT = "a large red circle left of a small blue star on a black background"


def type_text(typist: Typist, text: str, gap_s: float, first: int = 0) -> None:
    for end in range(1, len(text) + 1):
        typist.send(first + end, text[:end], seed=3)
        time.sleep(gap_s)


def test_a_picture_for_a_message(server: Running) -> None:
    with server.live() as typist:
        typist.send(1, "a red circle", seed=5, steps=2, decoder="taesd")
        header, file = typist.answer()
    assert is_picture_of(file, "a red circle", 5, steps=2, decoder="taesd")
    assert (header["id"], header["skipped"], header["tokens"]) == (1, 0, 5)
    assert {"queue", "text", "unet", "encode", "server"} <= header["ms"].keys()
    assert typist.statuses[-1] == {"status": "ready", "stage": "", "progress": None}


def test_the_defaults_are_a_fixed_seed_and_jpeg(server: Running) -> None:
    with server.live("") as typist:
        typist.send(1, "x")
        typist.send(2, "x")
        files = [body for _, body in typist.answers_until(2)]
    assert files[-1].startswith(b"\xff\xd8")
    assert len(set(files)) == 1


def test_a_stale_picture_is_stopped_but_never_two_in_a_row(start: Start) -> None:
    server = start(draw_ms=1500.0, stops_stale=True).wait_ready()
    work = server.app.engine.attendants[0]
    with server.live() as typist:
        for number in (1, 2, 3):
            typist.send(number, f"text {number}", seed=3)
            # 1 is stopped for 2, which is then finished though 3 waits.
            until(lambda number=number: is_in_work(work, f"text {min(number, 2)}"))
        answers = typist.answers_until(3)
        typist.send(4, "text 4", seed=3)
        until(lambda: is_in_work(work, "text 4"))
        typist.send(5, "text 5", seed=3)
        answers += typist.answers_until(5)
    assert [header["id"] for header, _ in answers] == [2, 3, 5]
    assert [header["skipped"] for header, _ in answers] == [1, 0, 1]
    for header, file in answers:
        assert is_picture_of(file, f"text {header['id']}", 3)
    assert 'cancelled_total{where="stale"} 2.0' in server.call("GET", "/metrics")[2].decode()
    assert not server.app.engine.spared


def test_a_picture_in_work_is_finished_where_nobody_said(start: Start) -> None:
    server = start(draw_ms=600.0).wait_ready()
    with server.live() as typist:
        typist.send(1, "text 1", seed=3)
        until(lambda: is_in_work(server.app.engine.attendants[0], "text 1"))
        typist.send(2, "text 2", seed=3)
        assert [header["id"] for header, _ in typist.answers_until(2)] == [1, 2]


def is_in_work(attendant: Attendant, prompt: str) -> bool:
    batches = list(attendant.life.batches.values()) if attendant.life else []
    return any(ticket.brief.prompt == prompt for batch in batches for _, ticket in batch.entries)


def test_typing_faster_than_drawing_draws_the_last_text(start: Start) -> None:
    server = start(draw_ms=30.0).wait_ready()
    with server.live() as typist:
        type_text(typist, TEXT, gap_s=0.004)
        answers = typist.answers_until(len(TEXT))
    ids = [header["id"] for header, _ in answers]
    assert ids == sorted(set(ids))
    assert len(ids) < len(TEXT) / 2
    assert len(ids) + sum(header["skipped"] for header, _ in answers) == len(TEXT)
    for header, file in answers:
        assert is_picture_of(file, TEXT[: header["id"]], 3)
    assert server.metric("frames_replaced_total") == len(TEXT) - len(ids)


def test_many_typists_each_get_their_last_text_and_nothing_queues(start: Start) -> None:
    server = start(draw_ms=10.0).wait_ready()
    deepest = 0.0

    def work(number: int) -> None:
        with server.live() as typist:
            text = f"{number} {TEXT}"
            type_text(typist, text, gap_s=0.005)
            answers = typist.answers_until(len(text))
            assert is_picture_of(answers[-1][1], text, 3)
            ids = [header["id"] for header, _ in answers]
            assert ids == sorted(set(ids))

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(work, number) for number in range(8)]
        while not all(job.done() for job in jobs):
            deepest = max(deepest, server.metric("queue_depth"))
            time.sleep(0.02)
        for job in jobs:
            job.result()
    assert 1 <= deepest <= 8
    until(lambda: server.metric("live_connections") == 0)


def test_two_workers_keep_a_typist_in_order(start: Start) -> None:
    server = start(workers=2, draw_ms=15.0, sizes=[1]).wait_ready()
    until(lambda: all(at.state == "ready" for at in server.app.engine.attendants))
    with server.live() as one, server.live() as two:
        for number in range(1, 60):
            one.send(number, f"one {number}")
            two.send(number, f"two {number}")
            time.sleep(0.005)
        for typist in (one, two):
            ids = [header["id"] for header, _ in typist.answers_until(59)]
            assert ids == sorted(set(ids))


def test_what_is_typed_while_the_model_loads_is_drawn_when_it_is_there(start: Start) -> None:
    server = start(load_ms=800.0)
    with server.live() as typist:
        typist.send(1, "early")
        typist.send(2, "early bird")
        header, file = typist.answer()
        assert header["id"] == 2
        assert is_picture_of(file, "early bird", 0)
    assert typist.statuses[0]["status"] == "loading"
    told = {status["stage"]: status["progress"] for status in typist.statuses}
    assert (told["the double loads"], told["the double loads, part 2 of 2"]) == (0.0, 0.5)


def test_a_killed_worker_costs_a_moment_and_the_last_text_is_drawn(start: Start) -> None:
    server = start(draw_ms=200.0).wait_ready()
    with server.live() as typist:
        typist.send(1, "before the worker dies")
        until(lambda: server.metric("in_work") == 1)
        life = server.app.engine.attendants[0].life
        assert life is not None
        os.kill(life.process.pid, signal.SIGKILL)
        header, file = typist.answer()
        assert header["id"] == 1
        assert is_picture_of(file, "before the worker dies", 0)
    stages = [status for status in typist.statuses if status["status"] == "loading"]
    assert any("ended by SIGKILL" in status["stage"] for status in stages)
    assert server.metric("worker_restarts_total") == 1


def test_what_kills_workers_is_tried_twice_and_no_more(start: Start) -> None:
    server = start().wait_ready()
    with server.live() as typist:
        typist.send(1, "die")
        header, _ = typist.answer()
        assert header["error"]["code"] == "worker_died"
        assert "SIGKILL" in header["error"]["what"]
        assert "worker-0.log" in header["error"]["next"]
        typist.send(2, "well again")
        assert is_picture_of(typist.answer()[1], "well again", 0)
    assert server.metric("worker_restarts_total") == 2


def test_bad_messages_are_answered_on_the_open_socket(server: Running) -> None:
    with server.live() as typist:
        for header, param in [
            ({"id": 1}, "prompt"), ({"prompt": "x"}, "id"), ({"id": "1x", "prompt": "x"}, "id"),
            ({"id": "1", "prompt": "x"}, "id"), ({"id": True, "prompt": "x"}, "id"),
            ({"id": 2, "prompt": "x", "seed": -1}, "seed"),
            ({"id": 3, "prompt": "x", "steps": 3}, "steps"),
            ({"id": 4, "prompt": "x", "n": 2}, "n"),
            ({"id": 5, "prompt": "x", "strength": 0.5}, "strength"),
        ]:  # fmt: skip
            typist.socket.send(pack(header))
            answer, body = typist.answer()
            assert answer["error"]["param"] == param
            assert answer["error"]["what"]
            assert not body
        typist.socket.send(pack({"id": 6, "prompt": "x"}, b"not wanted"))
        assert typist.answer()[0]["error"]["param"] == "picture"
        typist.send(7, "refuse me")
        assert typist.answer()[0]["error"]["what"] == "this one is refused"
        typist.send(8, "fine")
        assert is_picture_of(typist.answer()[1], "fine", 0)


def test_text_messages_are_the_json_alone(server: Running) -> None:
    with server.live() as typist:
        typist.socket.send('{"id": 1, "prompt": "typed by hand"}')
        assert is_picture_of(typist.answer()[1], "typed by hand", 0)


@pytest.mark.parametrize(
    "message",
    [b"", b"abc", struct.pack(">I", 99) + b"{}", struct.pack(">I", 2) + b"[]", "no json",
     struct.pack(">I", 4) + b"\xff\xff\xff\xff"],
    ids=repr,
)  # fmt: skip
def test_what_is_no_envelope_ends_the_connection_with_words(
    server: Running, message: bytes | str
) -> None:
    with server.live() as typist:
        typist.socket.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            typist.answer()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1007
    assert closed.value.rcvd.reason.startswith("the message is no envelope: ")
    assert server.draw(prompt="x")[0] == 200


def test_a_message_that_is_too_large_ends_the_connection(server: Running) -> None:
    with server.live() as typist, pytest.raises(ConnectionClosed) as closed:
        typist.socket.send(b"x" * (LARGEST_MESSAGE + 1))
        typist.answer()
    # What of it is still under way when the server closes can cost the client the reason.
    assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
    assert server.draw(prompt="x")[0] == 200


def test_other_origins_are_refused_at_the_handshake(server: Running) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}):
        with (
            pytest.raises(InvalidStatus) as refused,
            server.live(additional_headers=headers),
        ):
            pass
        assert refused.value.response.status_code == 403
        assert b"another origin" in (refused.value.response.body or b"")
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    with server.live(additional_headers=own) as typist:
        typist.send(1, "mine")
        assert typist.answer()[0]["id"] == 1


def test_the_token_opens_the_socket(start: Start) -> None:
    server = start(token="s3cret").wait_ready()
    with pytest.raises(InvalidStatus) as refused, server.live():
        pass
    assert refused.value.response.status_code == 401
    with server.live(additional_headers={"Cookie": "addbench-token=s3cret"}) as typist:
        typist.send(1, "x")
        assert typist.answer()[0]["id"] == 1


def test_too_many_connections_and_unknown_formats_are_told(server: Running) -> None:
    with server.live("?format=gif") as typist:
        assert typist.answer()[0]["error"]["what"] == "format = 'gif' is not supported"
        with pytest.raises(ConnectionClosed):
            typist.answer()
    contexts = [server.live() for _ in range(MOST_CONNECTIONS)]
    for context in contexts:
        context.__enter__()
    with server.live() as typist:
        assert "too many" in typist.answer()[0]["error"]["what"]
        with pytest.raises(ConnectionClosed) as closed:
            typist.answer()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1013
    for context in contexts:
        context.__exit__(None, None, None)
    until(lambda: server.metric("live_connections") == 0)
    with server.live() as typist:
        typist.send(1, "room again")
        assert typist.answer()[0]["id"] == 1


def test_a_client_that_leaves_gives_its_turn_back(start: Start) -> None:
    server = start(draw_ms=20_000.0, sizes=[1]).wait_ready()
    with server.live() as typist:
        typist.send(1, "a long one")
        until(lambda: server.metric("in_work") == 1)
        typist.send(2, "that is never begun")
        until(lambda: server.metric("queue_depth") == 1)
    until(lambda: server.metric("queue_depth") + server.metric("in_work") == 0)


def test_a_reader_that_stopped_costs_no_memory_and_nobody_else(start: Start) -> None:
    """Its answers are replaced by newer ones; when it reads again it gets the newest."""
    server = start(draw_ms=0.5, side=256).wait_ready()
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.connect(("127.0.0.1", server.port))
    stalled.sendall(
        b"GET /live?format=png HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection:"
        b" Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
        b"\r\n\r\n"
    )
    until(lambda: server.metric("live_connections") == 1)
    (connection,) = server.app.live.connections
    number = 0
    until_then = time.monotonic() + 120
    while connection.answer is None or number < 100:  # until the slot out is taken
        number += 1
        text = b'{"id": %d, "prompt": "x"}' % number
        mask = b"\0\0\0\0"
        stalled.sendall(b"\x81" + bytes([0x80 | len(text)]) + mask + text)
        time.sleep(0.002)
        assert time.monotonic() < until_then
    with server.live() as typist:
        typist.send(1, "somebody else")
        assert is_picture_of(typist.answer()[1], "somebody else", 0, side=256)
    assert server.metric("frames_replaced_total") > 0
    received = threading.Thread(target=drain, args=(stalled,))
    received.start()
    until(lambda: connection.answer is None)
    stalled.close()
    received.join()


def drain(client: socket.socket) -> None:
    try:
        while client.recv(1 << 16):
            pass
    except OSError:
        pass


def test_live_and_the_api_take_turns(start: Start) -> None:
    server = start(draw_ms=20.0, sizes=[1], queue=64).wait_ready()
    with server.live() as typist, ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(server.draw, prompt=f"api {n}") for n in range(12)]
        until(lambda: server.metric("queue_depth") >= 8)
        typist.send(1, "live")
        assert is_picture_of(typist.answer()[1], "live", 0)
        assert server.metric("queue_depth") >= 4  # it did not wait behind them
        assert all(job.result()[0] == 200 for job in jobs)


def test_the_envelope_is_what_the_page_s_module_reads(server: Running) -> None:
    """uint32 big-endian, JSON, bytes: as a browser's DataView has it by default."""
    with server.live() as typist:
        typist.send(1, "x")
        while True:
            message = typist.socket.recv()
            assert isinstance(message, bytes)
            length = int.from_bytes(message[:4], "big")
            header, body = unpack(message)
            assert len(body) == len(message) - 4 - length
            if "id" in header:
                assert np.shape(pixels(body)) == (8, 8, 3)
                break
