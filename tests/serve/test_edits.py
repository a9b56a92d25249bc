"""Pictures to start from, over the API and live; workers are test doubles."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from running import MODEL, Running, decoded, is_picture_of, serving, until

from serve.envelope import pack

PATH = "/v1/images/edits"
PICTURES = replace(MODEL, pictures=True, pairs=((4, 0.25), (2, 0.5), (4, 0.75)))


def png(colour: tuple[int, int, int] = (200, 30, 30), side: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def form(fields: dict[str, str], files: dict[str, bytes], edge: str = "edge") -> dict[str, Any]:
    pieces = [
        f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for name, data in files.items():
        head = f'--{edge}\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"'
        pieces.append(f"{head}\r\nContent-Type: image/png\r\n\r\n".encode() + data + b"\r\n")
    body = b"".join(pieces) + f"--{edge}--\r\n".encode()
    return {"body": body, "Content_Type": f"multipart/form-data; boundary={edge}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = serving(tmp_path_factory.mktemp("log"), model=PICTURES).wait_ready()
    yield running
    running.stop()


def test_a_picture_is_redrawn(server: Running) -> None:
    sent = form({"prompt": "a star", "seed": "4"}, {"image": png()})
    status, _, answer = server.call("POST", PATH, **sent)
    assert status == 200
    (file,) = decoded(answer)
    assert is_picture_of(file, "a star", 4, steps=2, picture=png(), strength=0.5)
    sent = form({"prompt": "a star", "seed": "4", "n": "2", "num_inference_steps": "4",
                 "strength": "0.75"}, {"image": png()})  # fmt: skip
    files = decoded(server.call("POST", PATH, **sent)[2])
    for number, file in enumerate(files):
        assert is_picture_of(file, "a star", 4 + number, steps=4, picture=png(), strength=0.75)


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"prompt": "x"}, {}, "image"),
        ({}, {"image": png()}, "prompt"),
        ({"prompt": "x"}, {"image": b""}, "image"),
        ({"prompt": "x"}, {"image": png(), "mask": png()}, "mask"),
        ({"prompt": "x"}, {"image": png(), "image[]": png()}, "image"),
        ({"prompt": "x", "strength": "0"}, {"image": png()}, "strength"),
        ({"prompt": "x", "strength": "nan"}, {"image": png()}, "strength"),
        ({"prompt": "x", "n": "two"}, {"image": png()}, "n"),
        ({"prompt": "x", "colour": "red"}, {"image": png()}, "colour"),
        ({"prompt": "x", "image": "a text"}, {"image": png()}, "image"),
    ],
)
def test_fields_of_a_form(
    server: Running, fields: dict[str, str], files: dict[str, bytes], param: str
) -> None:
    status, _, answer = server.call("POST", PATH, **form(fields, files))
    assert (status, answer["error"]["param"]) == (400, param)


def test_what_is_no_form_or_too_large(server: Running) -> None:
    kind = "multipart/form-data; boundary=edge"
    assert server.call("POST", PATH, b"{}", Content_Type="application/json")[0] == 415
    for body in (b"", b"nothing", b"--edge\r\n", b"--edge\r\nContent-Disposition: x\r\n\r\ny\r\n"):
        assert server.call("POST", PATH, body, Content_Type=kind)[0] == 400
    assert server.call("POST", PATH, b"x", Content_Type="multipart/form-data")[0] == 400
    large = form({"prompt": "x"}, {"image": b"\0" * ((8 << 20) + 1)})
    assert server.call("POST", PATH, **large)[0] == 413
    assert server.call("POST", PATH, b"\0" * (10 << 20), Content_Type=kind)[0] == 413


@settings(max_examples=60)
@given(st.binary(max_size=400))
def test_any_form_is_answered_in_words(server: Running, body: bytes) -> None:
    kind = "multipart/form-data; boundary=edge"
    status, _, answer = server.call("POST", PATH, b"--edge\r\n" + body, Content_Type=kind)
    assert status == 400
    assert answer["error"]["message"]


def test_a_model_without_encoders_says_so(
    start: Callable[..., Running],
) -> None:
    server = start().wait_ready()
    status, _, answer = server.call("POST", PATH, **form({"prompt": "x"}, {"image": png()}))
    assert (status, answer["error"]["code"]) == (404, "not_supported")


def test_live_with_a_picture(server: Running) -> None:
    with server.live() as typist:
        typist.socket.send(pack({"id": 1, "prompt": "x"}, png()))
        assert is_picture_of(typist.answer()[1], "x", 0, steps=2, picture=png(), strength=0.5)
        typist.socket.send(pack({"id": 2, "prompt": "x", "steps": 4, "strength": 0.25}, png()))
        assert is_picture_of(typist.answer()[1], "x", 0, steps=4, picture=png(), strength=0.25)
        typist.send(3, "x")
        assert is_picture_of(typist.answer()[1], "x", 0)


def test_with_and_without_a_picture_are_never_one_batch(start: Callable[..., Running]) -> None:
    server = start(model=PICTURES, draw_ms=80.0).wait_ready()
    with server.live() as one, server.live() as two, server.live() as three:
        one.send(1, "blocker")
        until(lambda: server.metric("in_work") == 1)
        two.socket.send(pack({"id": 1, "prompt": "x", "steps": 2, "strength": 0.5}, png()))
        three.send(1, "x", steps=2)
        assert is_picture_of(two.answer()[1], "x", 0, steps=2, picture=png(), strength=0.5)
        assert is_picture_of(three.answer()[1], "x", 0, steps=2)


def test_openai_s_own_client(server: Running) -> None:
    openai = pytest.importorskip("openai", reason="the client library is not installed")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
        made = client.images.edit(
            image=("a.png", png(), "image/png"), prompt="x", extra_body={"seed": 5}
        )
    answer = json.loads(made.model_dump_json())
    assert is_picture_of(decoded(answer)[0], "x", 5, steps=2, picture=png(), strength=0.5)
