"""Ray moves the calls: an actor for each, on the machine that was chosen, alone on it.

A machine measures where its node offers the resource `addbench`, of which a call takes all: so one
group is measured at a time, whoever asks. Labels begin with `addbench/`. Actors, not tasks: their
names are what `addbench fleet` lists, they go when their driver does, and each is a fresh process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bench.fleet.protocol import Call, LostError, Machine
from core.errors import PreconditionError

RESOURCE = "addbench"
PREFIX = "addbench/"
BEAT_S = 1.0
OF_RAY = ("PYTHONBREAKPOINT", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "LD_PRELOAD")
"""Variables that Ray sets or takes for its own ends, beside those that begin with `RAY_`."""


class Doer:
    """The process on the machine: it becomes what one would be that was started by hand there."""

    def __init__(self) -> None:
        raylet = int(os.environ["RAY_RAYLET_PID"])
        mine, usual = (os.getpriority(os.PRIO_PROCESS, pid) for pid in (0, raylet))
        self.fault: PreconditionError | None = None
        if mine > usual:
            self.fault = PreconditionError(
                f"Ray runs its workers at a lower priority there (niceness {mine})",
                "whatever else runs on the machine would slow down what is measured",
                "start its node with RAY_worker_niceness=0 ray start ...",
            )
        started = psutil.Process(raylet).environ()
        # Ray limits its workers' threads to the CPUs that a call takes: none.
        for name in list(os.environ):
            if name not in started or name.startswith("RAY_"):
                del os.environ[name]
        for name, value in started.items():
            if not name.startswith("RAY_") and name not in OF_RAY:
                os.environ[name] = value

    def run(self, call: Call) -> Iterator[Any]:
        """What the call yields."""
        if self.fault:
            raise self.fault
        yield from call()


class RayFleet:
    """A Ray cluster that this process has joined. See `protocol.Fleet`."""

    def __init__(self, address: str) -> None:
        self.address = address
        if address.startswith("ray://"):
            raise PreconditionError(
                f"--fleet {address} is Ray's client",
                "rows come as they are measured, which its client does not do",
                "join the cluster on this machine (ray start --address=HEAD:6379), and use"
                " --fleet auto",
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if ray.is_initialized():
            return
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PreconditionError(
                f"there is no Ray cluster at {address}",
                " ".join(str(error).split())[:300],
                "start it with ray start --head, or join it on this machine with ray start"
                " --address=HEAD:6379 (docs/fleet.md)",
            ) from error

    def machines(self) -> list[Machine]:
        """See `protocol.Fleet`."""
        running: dict[str, list[str]] = {}
        for actor in list_named_actors(all_namespaces=True):
            if actor["name"].startswith(PREFIX):
                _, id_, title = actor["name"].split("/", 2)
                running.setdefault(id_, []).append(title.rpartition("#")[0])
        machines = []
        for each in ray.nodes():
            if each["Alive"] and each["Resources"].get(RESOURCE):
                labels = {key.removeprefix(PREFIX): value for key, value in each["Labels"].items()
                          if key != "ray.io/node-id"}  # fmt: skip
                own = [value for key, value in sorted(each["Labels"].items())
                       if key.startswith(PREFIX)]  # fmt: skip
                machines.append(
                    Machine(
                        name=labels.get("name") or "-".join(own) or each["NodeID"][:6],
                        id=each["NodeID"],
                        labels=labels,
                        hardware=hardware_text(each["Resources"], labels),
                        running=tuple(sorted(running.get(each["NodeID"], ()))),
                    )
                )
        return sorted(machines, key=lambda machine: machine.name)

    def submit(self, machine: Machine, call: Call, title: str) -> tuple[Machine, Any, Any]:
        """See `protocol.Fleet`."""
        actor: Any = ray.remote(Doer)
        made = actor.options(
            name=f"{PREFIX}{machine.id}/{title}#{os.urandom(4).hex()}",
            num_cpus=0,
            resources={RESOURCE: 1},
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine.id, soft=False),
        ).remote()
        return machine, made, made.run.options(num_returns="streaming").remote(call)

    def results(self, handle: tuple[Machine, Any, Any]) -> Generator[Any, None, None]:
        """See `protocol.Fleet`."""
        machine, actor, stream = handle
        try:
            while True:
                if not ray.wait([stream], timeout=BEAT_S)[0]:
                    yield None
                    continue
                try:
                    yield ray.get(next(stream))
                except StopIteration:
                    return
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise LostError(
                f"{machine.name} is gone, or the process on it that measures",
                str(error).strip().splitlines()[0],
                "see to the machine, then go on with --resume",
            ) from error
        finally:
            ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """Leave the cluster."""
        ray.shutdown()


def hardware_text(resources: dict[str, float], labels: dict[str, str]) -> str:
    """What Ray knows of a node's hardware."""
    pieces = [f"{resources.get('CPU', 0):g} CPUs", f"{resources.get('memory', 0) / 1e9:.0f} GB"]
    if resources.get("GPU"):
        kind = labels.get("ray.io/accelerator-type")
        pieces.append(f"{resources['GPU']:g} GPUs" + (f" ({kind})" if kind else ""))
    return ", ".join(pieces)


open_fleet = RayFleet
