"""`addbench serve` as people start it: a process, a real model, real signals."""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from running import WAIT_S, decoded, pixels
from websockets.sync.client import connect

from backends.load import load_pipeline
from backends.locked import LockedRecipe
from core.cli import run
from core.files import ROOT
from core.machine import this_machine
from export.bundle import Bundle
from serve.__main__ import follow, main, parser
from serve.envelope import pack, unpack

PROMPT = "a large red circle left of a small blue star on a black background"


class Command:
    """A running `addbench serve`."""

    def __init__(self, *flags: str, start: Any = subprocess.Popen) -> None:
        self.process = start(
            [sys.executable, "-m", "addbench", "serve", "--port", "0", *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline()]
        match = re.search(r"http://[^ ]*:(\d+)/", self.lines[0])
        assert match, self.lines[0] + self.process.stdout.read()
        self.port = int(match[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=WAIT_S) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def draw(self, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}/v1/images/generations", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            return json.loads(response.read())

    def wait_ready(self) -> Command:
        end = time.monotonic() + 300
        while self.get("/health")[0] != 200:
            assert self.process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        return self

    def end(self, how: signal.Signals) -> tuple[int, str]:
        """The exit code and what it printed."""
        self.process.send_signal(how)
        # Not `communicate`, which leaves out what `readline` has read ahead.
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        return self.process.wait(WAIT_S), "".join(self.lines) + out


@pytest.fixture(scope="module")
def command(shapes_bundle: Bundle) -> Iterator[Command]:
    running = Command("--model", str(shapes_bundle.path))
    code, answer = running.get("/health")
    assert (code, answer["status"]) == (503, "loading")  # long before the model is there
    yield running.wait_ready()
    code, out = running.end(signal.SIGTERM)
    assert code == 0, out
    assert "batches of 1, 2, 4" in out


@pytest.mark.parametrize("decoder", ["vae", "taesd"])
def test_pictures_are_the_pipeline_s(command: Command, shapes_bundle: Bundle, decoder: str) -> None:
    answer = command.draw(prompt=PROMPT, seed=5, num_inference_steps=2, decoder=decoder)
    pipe = load_pipeline(shapes_bundle.path, "ort", decoder)
    image = pipe([PROMPT], steps=2, seed=5).images[0]
    assert np.array_equal(pixels(decoded(answer)[0]), image)
    assert answer["data"][0]["tokens"] == 16


def test_live_draws_what_is_typed(command: Command, shapes_bundle: Bundle) -> None:
    with connect(f"ws://127.0.0.1:{command.port}/live?format=png") as live:
        for end in range(1, len(PROMPT) + 1):
            live.send(pack({"id": end, "prompt": PROMPT[:end], "seed": 1, "decoder": "taesd"}))
        header: dict[str, Any] = {}
        while header.get("id") != len(PROMPT):
            message = live.recv(WAIT_S)
            assert isinstance(message, bytes)
            header, body = unpack(message)
        live.send(pack({"id": 1000, "prompt": "a red dragon " + "on a hill " * 60}))
        message = live.recv(WAIT_S)
        assert isinstance(message, bytes)
        notes = unpack(message)[0]
    pipe = load_pipeline(shapes_bundle.path, "ort", "taesd")
    assert np.array_equal(pixels(body), pipe([PROMPT], steps=1, seed=1).images[0])
    assert notes["tokens"] > notes["cut_at"] == 77
    assert "dragon" in notes["unknown"]


def test_the_parent_loads_no_torch(tiny_bundle: Bundle) -> None:
    flags = ("--model", str(tiny_bundle.path), "--backend", "null")
    # Not from the tests' fork server, whose children have it all.
    running = Command(*flags, start=warm.real_popen).wait_ready()
    maps = Path(f"/proc/{running.process.pid}/maps").read_text()
    assert running.end(signal.SIGTERM)[0] == 0
    assert "python" in maps
    assert "torch" not in maps


def test_a_connection_does_not_wait_to_send(command: Command) -> None:
    """On one connection, one after the other: behind a late acknowledgement a body takes 40 ms."""
    client = http.client.HTTPConnection("127.0.0.1", command.port, timeout=WAIT_S)
    times = []
    for _ in range(15):
        started = time.perf_counter()
        client.request("GET", "/v1/models")
        client.getresponse().read()
        times.append(time.perf_counter() - started)
    client.close()
    assert statistics.median(times) < 0.035


def test_it_listens_on_loopback_alone(command: Command) -> None:
    with socket.socket() as client:
        client.settimeout(2)
        own = [address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None)]
        others = [name for name in own if not name.startswith("127.") and ":" not in name]
        for name in others:
            assert client.connect_ex((name, command.port)) != 0


def test_an_address_that_is_taken_is_refused_before_anything_loads(
    command: Command, shapes_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(shapes_bundle.path), "--port", str(command.port)]
    assert run(main, argv) == 2
    assert "cannot be listened on" in capsys.readouterr().err


def test_sigterm_finishes_what_is_being_drawn(tiny_bundle: Bundle) -> None:
    flags = ("--backend", "null:unet_ms=1500", "--batch", "1")
    running = Command("--model", str(tiny_bundle.path), *flags).wait_ready()
    body = b'{"prompt": "x", "response_format": "file"}'
    head = (
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
        b" application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with socket.create_connection(("127.0.0.1", running.port), WAIT_S) as client:
        client.sendall(head + body)
        time.sleep(0.5)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert running.get("/health")[1]["status"] == "draining"
        with pytest.raises(urllib.error.HTTPError) as refused:
            running.draw(prompt="new")
        assert refused.value.code == 503
        assert json.loads(refused.value.read())["error"]["code"] == "draining"
        answer = client.recv(1 << 20)
        assert answer.startswith(b"HTTP/1.1 200 OK")
    out, _ = running.process.communicate(timeout=WAIT_S)
    assert running.process.returncode == 0, out


def test_ctrl_c_is_an_interrupt(tiny_bundle: Bundle) -> None:
    running = Command("--model", str(tiny_bundle.path), "--backend", "null")
    running.wait_ready()
    code, out = running.end(signal.SIGINT)
    assert code == 130
    assert "Traceback" not in out


def test_a_backend_that_cannot_be_used_ends_the_command_in_words(tiny_bundle: Bundle) -> None:
    running = Command("--model", str(tiny_bundle.path), "--backend", "null:usable=0")  # fmt: skip
    out, _ = running.process.communicate(timeout=WAIT_S)
    assert running.process.returncode == 2
    assert "backend null cannot be used: it was told so" in out
    assert "drop usable=0" in out
    assert "Traceback" not in out


def test_a_crash_of_the_backend_while_warming_up(tiny_bundle: Bundle) -> None:
    running = Command("--model", str(tiny_bundle.path), "--backend", "null:fail=crash")  # fmt: skip
    out, _ = running.process.communicate(timeout=WAIT_S)
    assert running.process.returncode == 4
    assert "the worker was ended by SIGSEGV" in out


def test_two_backends_are_two_workers(tiny_bundle: Bundle) -> None:
    running = Command("--model", str(tiny_bundle.path), "--backend", "null", "--backend",
                      "null:unet_ms=1").wait_ready()  # fmt: skip
    workers = running.get("/v1/models")[1]["data"][0]["workers"]
    assert [worker["backend"] for worker in workers] == ["null", "null:unet_ms=1"]
    assert running.end(signal.SIGTERM)[0] == 0


def test_an_open_address_says_so(tiny_bundle: Bundle) -> None:
    flags = ("--model", str(tiny_bundle.path), "--backend", "null", "--host", "0.0.0.0")
    running = Command(*flags).wait_ready()
    code, out = running.end(signal.SIGTERM)
    assert code == 0
    assert "it stands open" in out
    running = Command(*flags, "--token", "s3cret").wait_ready()
    assert running.get("/v1/models")[0] == 401
    assert "it stands open" not in running.end(signal.SIGTERM)[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--decoder", "tiny"], "no decoder called 'tiny'"),
        (["--backend", "ort", "--backend", "ort"], "stands twice"),
        (["--backend", "nosuch"], "no backend called 'nosuch'"),
        (["--backend", "ort:fast"], "is not key=value"),
        (["--port", "70000"], "not a port"),
        (["--batch", "0"], "at least 1"),
        (["--batch-window", "-1"], "milliseconds"),
        (["--deadline", "5"], "with its unit"),
        (["--token", "tökén"], "not ASCII"),
        (["--guidance", "7"], "was not made for guidance"),
        (["--host", "203.0.113.7", "--port", "0"], "cannot be listened on"),
    ],
)
def test_refusals(
    argv: list[str], words: str, shapes_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in argv else ["--model", str(shapes_bundle.path)]
    assert run(main, [*model, *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_recipe_says_what_is_served(
    shapes_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = LockedRecipe(
        str(shapes_bundle.path), "folder", "fp16", "64x64", "null", "taesd", 2, 4,
        shapes_bundle.scheduler_name, 0.0, "none", False, shapes_bundle.hash,
        {"machine": this_machine(), "place": "here", "run": "r", "rounds": 1,
         "provenance": "measured"},
    )  # fmt: skip
    file = tmp_path / "recipe.toml"
    recipe.write(file)
    args = parser().parse_args(["--recipe", str(file)])
    follow(args)
    assert (args.backend, args.decoder, args.batch) == (["null"], ["taesd"], 4)
    assert args.model == str(shapes_bundle.path)
    assert run(main, ["--recipe", str(file), "--decoder", "vae"]) == 2
    assert "--decoder beside a recipe" in capsys.readouterr().err
    dataclasses.replace(recipe, low_memory=True).write(file)
    assert run(main, ["--recipe", str(file)]) == 2
    assert "cannot be served" in capsys.readouterr().err


def test_help_names_every_default() -> None:
    text = parser().format_help()
    for default in ("(127.0.0.1", "(8000)", "(30s)", "(10m)", "(30)", "(ort)"):
        assert default in text
