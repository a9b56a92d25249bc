"""The server as an application of Ray Serve: every replica is all of it, with a worker of its own.

    serve run serve.ray_app:application model=shapes-turbo backend=ort replicas=2

Ray starts replicas, spreads requests over them and mends what dies; the queue, the batches, 429 and
the deadline are each replica's own. `/live` stays on the replica that a connection began with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.errors import PreconditionError
from core.files import build_root
from serve.app import Application
from serve.engine import Post
from serve.model import served_model

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

ARGUMENTS = {
    "model": "shapes-turbo", "weights": "", "dtype": "", "backend": "ort", "decoder": "",
    "replicas": "1", "queue": "16", "gpus": "0",
}  # fmt: skip
"""What the application is asked for, with its defaults; the names are those of `addbench serve`."""
DRAIN_S = 30.0
DEEPER = 8
"""Requests that Ray hands a replica beyond its queue: so that it is the replica who refuses."""


class Replica:
    """The server's application between the start and the end of a replica."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self.engine: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
        else:
            await self.app(scope, receive, send)

    async def live(self, receive: Receive, send: Send) -> None:
        """Load before the first request comes, and finish what there is at the end."""
        await receive()
        self.engine = asyncio.create_task(self.app.engine.run())
        while not self.app.engine.ready:
            if self.engine.done():
                failure = self.engine.exception()
                await send({"type": "lifespan.startup.failed", "message": str(failure)})
                return
            await asyncio.sleep(0.05)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.app.drain(DRAIN_S)
        self.app.engine.close()
        await self.engine
        await send({"type": "lifespan.shutdown.complete"})


def checked(arguments: Mapping[str, str]) -> dict[str, str]:
    """Return all arguments, defaults filled in.

    Raises:
        PreconditionError: there is no such argument, or a number is none.
    """
    for name, value in arguments.items():
        if name not in ARGUMENTS:
            raise PreconditionError(
                f"the application takes no {name}", f"it takes {', '.join(ARGUMENTS)}",
                "serve run serve.ray_app:application model=shapes-turbo replicas=2",
            )  # fmt: skip
        if name in ("replicas", "queue", "gpus") and not str(value).isdecimal():
            raise PreconditionError(
                f"{name}={value} is no whole number", "it counts", f"write {name}={ARGUMENTS[name]}"
            )
    return ARGUMENTS | {name: str(value) for name, value in arguments.items()}


def replica_of(arguments: Mapping[str, str]) -> Replica:
    """Return the application of one replica; it loads when its life begins."""
    from export.bundle import find_bundle

    said = checked(arguments)
    bundle = find_bundle(said["model"], said["weights"] or None, said["dtype"] or None)
    chosen = tuple(filter(None, said["decoder"].split(",")))
    model = served_model(bundle, chosen)
    job = {
        "bundle": str(bundle.path), "backend": said["backend"], "decoders": list(model.decoders),
        "all_decoders": bool(chosen), "batch": None, "scheduler": None, "guidance": None,
    }  # fmt: skip
    log = build_root() / "serve" / "ray-worker.log"
    return Replica(Application(model, [Post(said["backend"], job, log)], queue=int(said["queue"])))


def application(arguments: Mapping[str, str]) -> Any:
    """Return what `serve run` deploys.

    Raises:
        PreconditionError: an argument, or the bundle, is not to be had; nothing is deployed.
    """
    from ray import serve

    said = checked(arguments)
    replica_of(said)  # refused here, not on every replica
    limit = int(said["queue"]) + DEEPER
    deployment = serve.deployment(
        num_replicas=int(said["replicas"]),
        max_ongoing_requests=limit,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(said["gpus"])},
    )(serve.ingress(lambda: replica_of(said))(type("Pictures", (), {})))
    return deployment.bind()
