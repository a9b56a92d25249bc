"""The API over real sockets; workers are test doubles."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from running import WAIT_S, Running, decoded, is_picture_of, pixels, serving, until

JSON = {"Content_Type": "application/json"}
Start = Callable[..., Running]


def test_a_picture(server: Running) -> None:
    status, headers, answer = server.draw(prompt="a red circle", seed=7)
    assert status == 200
    (file,) = decoded(answer)
    assert file.startswith(b"\x89PNG")
    assert is_picture_of(file, "a red circle", 7)
    entry = answer["data"][0]
    assert (entry["seed"], entry["tokens"]) == (7, 5)
    assert answer["size"] == "8x8"
    stages = dict(piece.split(";dur=") for piece in headers["server-timing"].split(", "))
    assert {"queue", "text", "unet", "encode"} <= set(stages)
    assert float(stages["unet"]) > 0


def test_several_pictures_of_several_prompts(server: Running) -> None:
    _, _, answer = server.draw(prompt=["one", "two"], n=3, seed=10, num_inference_steps=4)
    files = decoded(answer)
    assert len(files) == 6
    for index, file in enumerate(files):
        assert is_picture_of(file, ["one", "two"][index // 3], 10 + index % 3, steps=4)


def test_without_a_seed_it_is_told_and_gives_the_picture_again(server: Running) -> None:
    _, _, first = server.draw(prompt="dice")
    seed = first["data"][0]["seed"]
    _, _, again = server.draw(prompt="dice", seed=seed)
    assert decoded(first) == decoded(again)
    assert server.draw(prompt="dice")[2]["data"][0]["seed"] != seed


@pytest.mark.parametrize(("format", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"),
                                               ("webp", b"RIFF")])  # fmt: skip
def test_as_a_file(server: Running, format: str, magic: bytes) -> None:
    _, headers, file = server.draw(prompt="x", response_format="file", output_format=format)
    assert headers["content-type"] == f"image/{format}"
    assert file.startswith(magic)
    assert pixels(file).shape == (8, 8, 3)


def test_the_request_id_is_given_back_or_made(server: Running) -> None:
    _, headers, _ = server.call("GET", "/health", X_Request_ID="mine-1")
    assert headers["x-request-id"] == "mine-1"
    _, headers, _ = server.call("GET", "/health", X_Request_ID="a b\tc")
    assert headers["x-request-id"].isalnum()


REFUSED: list[tuple[dict[str, Any], str, str, int]] = [
    ({}, "prompt", "missing_parameter", 400),
    ({"prompt": 7}, "prompt", "invalid_value", 400),
    ({"prompt": []}, "prompt", "invalid_value", 400),
    ({"prompt": ["x"] * 11}, "prompt", "invalid_value", 400),
    ({"prompt": ["x", 5]}, "prompt", "invalid_value", 400),
    ({"prompt": "x" * 4001}, "prompt", "invalid_value", 400),
    ({"prompt": "\ud800"}, "prompt", "invalid_value", 400),
    ({"prompt": "x", "model": "dall-e-3"}, "model", "model_not_found", 404),
    ({"prompt": "x", "model": {}}, "model", "model_not_found", 404),
    ({"prompt": "x", "n": 0}, "n", "invalid_value", 400),
    ({"prompt": "x", "n": 11}, "n", "invalid_value", 400),
    ({"prompt": "x", "n": True}, "n", "invalid_value", 400),
    ({"prompt": "x", "n": "1"}, "n", "invalid_value", 400),
    ({"prompt": "x", "seed": "7"}, "seed", "invalid_value", 400),
    ({"prompt": "x", "n": 1.0}, "n", "invalid_value", 400),
    ({"prompt": ["x"] * 4, "n": 3}, "n", "invalid_value", 400),
    ({"prompt": "x", "size": "1024x1024"}, "size", "unsupported_value", 400),
    ({"prompt": "x", "size": 8}, "size", "unsupported_value", 400),
    ({"prompt": "x", "response_format": "url"}, "response_format", "unsupported_value", 400),
    ({"prompt": "x", "response_format": ["file"]}, "response_format", "unsupported_value", 400),
    ({"prompt": "x", "n": 2, "response_format": "file"}, "response_format", "invalid_value", 400),
    ({"prompt": "x", "output_format": "gif"}, "output_format", "unsupported_value", 400),
    ({"prompt": "x", "seed": -1}, "seed", "invalid_value", 400),
    ({"prompt": "x", "seed": 2**63}, "seed", "invalid_value", 400),
    ({"prompt": "x", "seed": 0.5}, "seed", "invalid_value", 400),
    ({"prompt": "x", "num_inference_steps": 3}, "num_inference_steps", "unsupported_value", 400),
    ({"prompt": "x", "num_inference_steps": 5}, "num_inference_steps", "invalid_value", 400),
    ({"prompt": "x", "decoder": "tiny"}, "decoder", "unsupported_value", 400),
    ({"prompt": "x", "guidance_scale": 7.5}, "guidance_scale", "unsupported_parameter", 400),
    ({"prompt": "x", "negative_prompt": "y"}, "negative_prompt", "unsupported_parameter", 400),
    ({"prompt": "x", "quality": "hd"}, "quality", "unsupported_parameter", 400),
    ({"prompt": "x", "strength": 0.5}, "strength", "unknown_parameter", 400),
    ({"prompt": "x", "sede": 5}, "sede", "unknown_parameter", 400),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server for tests that leave nothing behind."""
    running = serving(tmp_path_factory.mktemp("log")).wait_ready()
    yield running
    running.stop()


@pytest.mark.parametrize(("body", "param", "code", "status"), REFUSED, ids=str)
def test_fields_are_refused_by_name(
    shared: Running, body: dict[str, Any], param: str, code: str, status: int
) -> None:
    got, _, answer = shared.draw(**body)
    error = answer["error"]
    assert (got, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    what, _, rest = error["message"].partition(": ")
    assert what
    assert "; " in rest


def test_a_word_that_is_nearly_a_field_is_pointed_out(shared: Running) -> None:
    assert "did you mean seed?" in shared.draw(prompt="x", sede=5)[2]["error"]["message"]


def test_null_is_as_if_left_out(shared: Running) -> None:
    assert shared.draw(prompt="x", n=None, size=None, guidance_scale=0)[0] == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b'{"prompt": NaN}', b'{"prompt":"x","prompt":"y"}', b"\xff\xfe",
     b'{"n":' + b"9" * 5000 + b"}", b"[" * 100_000],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_what_is_no_json_object_is_said(shared: Running, body: bytes) -> None:
    status, _, answer = shared.call("POST", "/v1/images/generations", body, **JSON)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_media_type_size_path_and_method(shared: Running) -> None:
    path = "/v1/images/generations"
    assert shared.call("POST", path, b"{}", Content_Type="text/plain")[0] == 415
    assert shared.call("POST", path, b" " * (1 << 20) + b"{}", **JSON)[0] == 413
    assert shared.call("POST", path, b" " * (9 << 20), **JSON)[2]["error"]["code"] == "too_large"
    assert shared.call("GET", path)[0] == 405
    assert shared.call("GET", "/nothing")[2]["error"]["code"] == "not_found"


def test_who_may_enter(shared: Running) -> None:
    good = f"http://127.0.0.1:{shared.port}"
    body = b'{"prompt": "x"}'
    post = ("POST", "/v1/images/generations", body)
    assert shared.call(*post, **JSON, Origin=good)[0] == 200
    for origin in ("http://evil.example", "null", "http://[", f"{good}0"):
        status, _, answer = shared.call(*post, **JSON, Origin=origin)
        assert (status, answer["error"]["code"]) == (403, "wrong_origin")
    for host in ("evil.example", "127.0.0.1.evil.example", "[", ""):
        status, _, answer = shared.call(*post, **JSON, Host=host)
        assert (status, answer["error"]["code"]) == (403, "wrong_host")
    assert shared.call(*post, **JSON, Host=f"localhost:{shared.port}")[0] == 200


def test_the_token(start: Start) -> None:
    server = start(token="s3cret").wait_ready()
    assert server.call("GET", "/health")[0] == 200
    for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Basic s3cret"}):
        status, _, answer = server.call("GET", "/v1/models", **headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert server.call("GET", "/metrics", **headers)[0] == 401
    assert server.call("GET", "/v1/models", Authorization="Bearer s3cret")[0] == 200
    assert server.call("GET", "/v1/models", Cookie="addbench-token=s3cret")[0] == 200


def test_while_the_model_loads(start: Start) -> None:
    server = start(load_ms=1500.0)
    status, headers, answer = server.call("GET", "/health")
    assert (status, answer["status"]) == (503, "loading")
    assert answer.keys() == {"status", "model", "stage", "progress"}
    assert server.call("GET", "/health/live")[0] == 200
    status, headers, answer = server.draw(prompt="x")
    assert (status, headers["retry-after"]) == (503, "1")
    assert answer["error"]["code"] == "model_loading"
    server.wait_ready()
    assert server.call("GET", "/health")[2] == {"status": "ready", "model": "double"}
    assert server.draw(prompt="x")[0] == 200


def test_models(server: Running) -> None:
    (entry,) = server.call("GET", "/v1/models")[2]["data"]
    assert (entry["id"], entry["object"], entry["size"]) == ("double", "model", "8x8")
    assert entry["workers"][0]["state"] == "ready"


def test_a_full_queue_refuses_all_or_nothing_and_says_when(start: Start) -> None:
    server = start(draw_ms=300.0, sizes=[1], queue=3).wait_ready()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.draw, prompt="first")
        until(lambda: server.metric("in_work") == 1)
        second = pool.submit(server.draw, prompt="second", n=2)
        until(lambda: server.metric("queue_depth") == 2)
        status, headers, answer = server.draw(prompt="third", n=2)
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert answer["error"]["type"] == "rate_limit_error"
        assert int(headers["retry-after"]) >= 1
        assert server.metric("queue_depth") == 2
        assert first.result()[0] == second.result()[0] == 200
    assert server.draw(prompt="third", n=2)[0] == 200


def test_what_waited_too_long_is_not_begun(start: Start) -> None:
    server = start(draw_ms=900.0, sizes=[1], deadline_s=0.3).wait_ready()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.draw, prompt="first")
        until(lambda: server.metric("in_work") == 1)
        status, _, answer = server.draw(prompt="second")
        assert (status, answer["error"]["code"]) == (504, "deadline")
        assert first.result()[0] == 200
    assert server.metric("images_total") == 1


def test_requests_join_in_batches_and_each_gets_its_own(start: Start) -> None:
    server = start(draw_ms=60.0, queue=64).wait_ready()
    jobs = [(f"prompt {n}", n, (1, 2)[n % 5 == 0]) for n in range(30)]
    with ThreadPoolExecutor(30) as pool:
        answers = list(
            pool.map(lambda j: server.draw(prompt=j[0], seed=j[1], num_inference_steps=j[2]), jobs)
        )
    for (prompt, seed, steps), (status, _, answer) in zip(jobs, answers, strict=True):
        assert status == 200
        assert is_picture_of(decoded(answer)[0], prompt, seed, steps=steps)
    assert server.metric("batch_size_count") < 20  # fewer calls than pictures


def hang_up(server: Running, prompt: str, leave: threading.Event) -> None:
    """Ask for a picture, and leave when told to."""
    body = json.dumps({"prompt": prompt}).encode()
    with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as client:
        client.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
            b" application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        leave.wait(WAIT_S)


def test_a_client_that_leaves_costs_nothing_more(start: Start) -> None:
    server = start(draw_ms=20_000.0, sizes=[1]).wait_ready()
    leaves = [threading.Event(), threading.Event()]
    first = threading.Thread(target=hang_up, args=(server, "in work", leaves[0]))
    second = threading.Thread(target=hang_up, args=(server, "waiting", leaves[1]))
    first.start()
    until(lambda: server.metric("in_work") == 1)
    second.start()
    until(lambda: server.metric("queue_depth") == 1)
    leaves[1].set()
    until(lambda: server.metric("queue_depth") == 0)
    leaves[0].set()
    until(lambda: server.metric("in_work") == 0)  # long before the picture would be done
    first.join()
    second.join()
    text = server.call("GET", "/metrics")[2].decode()
    assert 'addbench_cancelled_total{where="waiting"} 1.0' in text
    assert 'addbench_cancelled_total{where="in work"} 1.0' in text
    assert server.metric("images_total") == 0
    assert 'requests_total{code="499",endpoint="/v1/images/generations"} 2.0' in text


def test_a_batch_is_not_cancelled_while_somebody_waits_for_it(start: Start) -> None:
    server = start(draw_ms=400.0).wait_ready()
    with ThreadPoolExecutor(3) as pool:
        blocker = pool.submit(server.draw, prompt="blocker")
        until(lambda: server.metric("in_work") == 1)
        stays = pool.submit(server.draw, prompt="stays", seed=1)
        leave = threading.Event()
        leaves = pool.submit(hang_up, server, "leaves", leave)
        until(lambda: server.metric("queue_depth") == 2)
        assert blocker.result()[0] == 200
        leave.set()
        assert is_picture_of(decoded(stays.result()[2])[0], "stays", 1)
        leaves.result()


def test_a_bug_is_said_to_be_one(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a s3cret")

    monkeypatch.setattr(server.app.engine, "ticket", broken)
    status, _, answer = server.draw(prompt="x")
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert server.call("GET", "/health")[0] == 200


def test_errors_of_drawing(server: Running) -> None:
    status, _, answer = server.draw(prompt="refuse this")
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert answer["error"]["message"].startswith("this one is refused: it was told so; ")
    status, _, answer = server.draw(prompt="fail now")
    assert (status, answer["error"]["message"]) == (
        500, "the double failed: it was told so; tell it nothing"
    )  # fmt: skip
    assert server.draw(prompt="raise a secret")[0] == 500
    assert server.draw(prompt=["fine", "refuse this"])[0] == 400
    assert server.draw(prompt="fine")[0] == 200


def test_a_prompt_lands_in_no_log_and_no_label(server: Running, capfd: Any) -> None:
    for prompt in ("s3cret picture", "raise s3cret", "fail s3cret", "refuse s3cret"):
        server.draw(prompt=prompt)
    server.call("GET", "/v1/models?prompt=s3cret")
    server.call("GET", "/s3cret")
    assert b"s3cret" not in server.call("GET", "/metrics")[2]
    log = server.app.engine.attendants[0].post.log.read_text()
    assert "ValueError" in log
    assert "s3cret" not in log + "".join(capfd.readouterr())


def test_openai_s_own_client(server: Running) -> None:
    openai = pytest.importorskip("openai", reason="the client library is not installed")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["double"]
        made = client.images.generate(prompt="a red circle", n=2, extra_body={"seed": 5})
        assert [is_picture_of(file, "a red circle", 5 + n)
                for n, file in enumerate(decoded(made.model_dump()))] == [True, True]  # fmt: skip
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(prompt="x", size="1024x1024")
        assert (refused.value.param, refused.value.code) == ("size", "unsupported_value")
        with pytest.raises(openai.NotFoundError):
            client.images.generate(prompt="x", model="gpt-image-1")
