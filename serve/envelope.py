"""One message with bytes behind it: uint32 length, JSON of that length, the bytes.

The same on the WebSocket, where a message has its own end, and between server and worker, where
another uint32 goes before it: the length of all of it. Numbers are big-endian.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

from core.errors import PreconditionError

UINT32 = struct.Struct(">I")


class EnvelopeError(PreconditionError):
    """Bytes that are no envelope."""

    def __init__(self, why: str) -> None:
        super().__init__(
            "the message is no envelope",
            why,
            "send uint32 length (big-endian), a JSON object of so many bytes, then the picture",
        )


def pack(header: Mapping[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return b"".join((UINT32.pack(len(text)), text, body))


def unpack(message: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON object of an envelope, and the bytes behind it.

    Raises:
        EnvelopeError: it is none.
    """
    if len(message) < UINT32.size:
        raise EnvelopeError(f"it has {len(message)} bytes, and its length alone takes 4")
    (length,) = UINT32.unpack_from(message)
    if length > len(message) - UINT32.size:
        raise EnvelopeError(f"it announces {length} bytes of JSON, more than it has")
    end = UINT32.size + length
    return read_object(message[UINT32.size : end]), message[end:]


def read_object(text: bytes | str) -> dict[str, Any]:
    """A JSON object whose keys stand once each.

    Raises:
        EnvelopeError: it is none.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(items)
        if len(keys) < len(items):
            raise EnvelopeError("a key of its JSON stands twice")
        return keys

    def constant(name: str) -> float:
        raise EnvelopeError(f"{name} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise EnvelopeError("its JSON is nested too deeply") from None
    except ValueError:  # of json's own, of UTF-8, of integers with thousands of digits
        raise EnvelopeError("what should be JSON is not") from None
    if not isinstance(value, dict):
        raise EnvelopeError("its JSON is not an object")
    return value


def frame(header: Mapping[str, Any], body: bytes = b"") -> bytes:
    """An envelope with its own length before it, for a stream."""
    envelope = pack(header, body)
    return UINT32.pack(len(envelope)) + envelope


def receive_frame(stream: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """The next envelope of a blocking stream; None at its end."""
    head = _exactly(stream, UINT32.size)
    envelope = head and _exactly(stream, UINT32.unpack(head)[0])
    return unpack(envelope) if envelope else None


def _exactly(stream: socket.socket, count: int) -> bytes | None:
    pieces = bytearray()
    while len(pieces) < count:
        piece = stream.recv(min(count - len(pieces), 1 << 20))
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)
