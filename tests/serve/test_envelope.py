"""Envelopes: whatever bytes come, an object or an error in words."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.envelope import EnvelopeError, frame, pack, read_object, receive_frame, unpack

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=6), VALUES), st.binary(max_size=200))
def test_what_is_packed_is_unpacked(header: dict[str, object], body: bytes) -> None:
    assert unpack(pack(header, body)) == (header, body)


@given(st.binary(max_size=100))
def test_any_bytes_are_an_envelope_or_an_error(message: bytes) -> None:
    try:
        header, _ = unpack(message)
    except EnvelopeError as error:
        header = {"why": error.why}
    assert isinstance(header, dict)


@pytest.mark.parametrize(
    "text", ['{"a": Infinity}', '{"a": 1, "a": 2}', "[" * 10**5, '{"a":' * 10**5, "1" * 10**4,
             "nul", ""],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_what_is_not_an_object(text: str) -> None:
    with pytest.raises(EnvelopeError):
        read_object(text)


def test_frames_over_a_stream_that_dribbles_and_ends() -> None:
    here, there = socket.socketpair()
    message = frame({"id": 1}, b"x" * 5000)
    with here, there:
        for start in range(0, len(message), 999):
            here.sendall(message[start : start + 999])
        assert receive_frame(there) == ({"id": 1}, b"x" * 5000)
        here.sendall(message[:7])
        here.close()
        assert receive_frame(there) is None
