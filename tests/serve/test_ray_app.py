"""The server as Ray Serve's application: its life, without Ray; the arguments; and the deployment
where Ray is installed with what its Serve needs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from running import COMMAND, MODEL

from core.errors import PreconditionError
from export.bundle import Bundle
from serve.app import Application
from serve.engine import Post
from serve.ray_app import Replica, checked, replica_of


def replica(tmp_path: Path, **rest: Any) -> Replica:
    job = {"draw_ms": 2.0, "load_ms": 100.0, "sizes": [1], "load": "well", "side": 8, **rest}
    return Replica(Application(MODEL, [Post("double", job, tmp_path / "log", COMMAND)]))


def lived(app: Replica, ask: Any) -> Any:
    """Run an application as a replica is run: its life begins before requests, and ends after."""

    async def run() -> Any:
        config = uvicorn.Config(app, port=0, log_config=None, lifespan="on", access_log=False)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        answer = None
        if not serving.done() and not server.should_exit:
            port = server.servers[0].sockets[0].getsockname()[1]
            answer = await asyncio.to_thread(ask, f"http://127.0.0.1:{port}")
        server.should_exit = True
        await serving
        return answer

    return asyncio.run(run())


def test_a_replica_is_ready_before_its_first_request_and_leaves_nothing(tmp_path: Path) -> None:
    app = replica(tmp_path)
    pids: list[int] = []

    def ask(url: str) -> Any:
        assert json.load(urllib.request.urlopen(f"{url}/health"))["status"] == "ready"
        life = app.app.engine.attendants[0].life
        assert life is not None
        pids.append(life.process.pid)
        body = json.dumps({"prompt": "a", "response_format": "file"}).encode()
        asked = urllib.request.Request(
            f"{url}/v1/images/generations", body, {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(asked).read()

    assert lived(app, ask).startswith(b"\x89PNG")
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], signal.SIGCONT)


def test_a_replica_that_cannot_load_says_so_before_it_takes_requests(tmp_path: Path) -> None:
    messages = []

    async def run() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "lifespan.startup"}

        async def send(message: Any) -> None:
            messages.append(message)

        await replica(tmp_path, load="refuse")({"type": "lifespan"}, receive, send)

    asyncio.run(run())
    (message,) = messages
    assert message["type"] == "lifespan.startup.failed"
    assert "the double does not load" in message["message"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"modle": "x"}, "takes no modle"), ({"replicas": "two"}, "no whole number"),
     ({"model": "no-such-model"}, "no-such-model")],
)  # fmt: skip
def test_arguments_are_refused_before_anything_is_deployed(
    arguments: dict[str, str], words: str
) -> None:
    with pytest.raises(PreconditionError, match=words):
        replica_of(arguments)


def test_what_is_served(shapes_bundle: Bundle) -> None:
    made = replica_of({"model": str(shapes_bundle.path), "decoder": "taesd", "queue": "7"})
    assert made.app.model.decoders == ("taesd",)
    assert made.app.engine.waiting.limit == 7
    (worker,) = made.app.engine.attendants
    assert worker.post.job["bundle"] == str(shapes_bundle.path)
    assert checked({"replicas": 2})["replicas"] == "2"  # type: ignore[dict-item]


def test_the_deployment(shapes_bundle: Bundle) -> None:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    from serve.ray_app import application

    bound = application({"model": str(shapes_bundle.path), "replicas": "2", "queue": "4"})
    deployment = bound._bound_deployment
    assert deployment.num_replicas == 2
    assert deployment.max_ongoing_requests == 12
