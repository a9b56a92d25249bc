"""Who comes to the door and does not come in: heads that dribble, and too many connections."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest
from running import Running, until

from serve import server as door

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def connected(server: Running) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    client.settimeout(30)
    return client


def everything(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    pieces = []
    while piece := client.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def test_a_head_that_dribbles_loses_its_place(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "HEAD_S", 0.6)
    with connected(server) as slow, connected(server) as silent:
        slow.sendall(HEAD)
        for _ in range(3):  # each byte on its own is in time, the head is not
            time.sleep(0.15)
            slow.sendall(b"X-Slow: 1\r\n")
        for client in (slow, silent):
            answer = everything(client)
            assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert "the head of a request has 0.6 s" in error["message"]
    until(lambda: not server.server.server_state.connections)
    assert server.call("GET", "/health")[0] == 200


def test_a_kept_connection_dribbles_no_longer_than_a_new_one(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "HEAD_S", 0.6)
    with connected(server) as client:
        for _ in range(2):  # one after the other on one connection
            client.sendall(HEAD + b"\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += client.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200 OK")
        client.sendall(HEAD)
        assert everything(client).startswith(b"HTTP/1.1 408 ")


def test_a_request_that_takes_long_is_not_cut(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "HEAD_S", 0.3)
    server = start(draw_ms=900.0).wait_ready()
    assert server.draw(prompt="long")[0] == 200
    with server.live() as typist:  # a live connection waits between keys as long as it likes
        time.sleep(0.8)
        typist.send(1, "still here")
        assert typist.answer()[0]["id"] == 1


def test_more_connections_than_there_may_be_are_turned_away(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MOST_OPEN", 3)
    kept = [connected(server) for _ in range(3)]
    until(lambda: len(server.server.server_state.connections) == 3)
    with connected(server) as fourth:
        answer = everything(fourth)
    assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"Retry-After: 1" in answer
    assert b"3 connections are open" in answer
    kept.pop().close()
    until(lambda: len(server.server.server_state.connections) == 2)
    assert server.call("GET", "/health")[0] == 200
    for client in kept:
        client.close()
