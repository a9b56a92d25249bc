"""Slurm moves the calls, by submitit: a job for each, alone on the node that was chosen.

What a call yields goes through a file in the build folder, which all nodes must see; so must they
this checkout and its environment. `local` is submitit's own executor: jobs on this machine, where
a lock takes the place of Slurm's `--exclusive`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import shutil
import subprocess
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import submitit
from filelock import FileLock

from bench.fleet.protocol import Call, LostError, Machine
from core.errors import PreconditionError
from core.files import build_root

BEAT_S = 1.0
LOOK_S = 0.1
"""How often the file of a running job is looked at."""
STATES = ("idle", "alloc", "mix", "comp", "resv")
"""Beginnings of the states of nodes that run jobs, now or when others end."""
LONGEST_MIN = 24 * 60
"""The time limit of a job; `--timeout` ends a cell long before."""


@dataclass(frozen=True)
class Value:
    """Something that a call yielded."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """What a call raised."""

    error: Exception


@dataclass(frozen=True)
class Ended:
    """The call has yielded everything."""


def fill(file: Path, call: Call, lock: Path | None, devices: str | None) -> None:
    """Run a call on the node and write what it yields into a file, each as it comes.

    Args:
        lock: what is held meanwhile; None where Slurm keeps others away.
        devices: the driver's CUDA_VISIBLE_DEVICES, of which submitit's own executor takes all away.
    """
    alone = FileLock(lock) if lock else contextlib.nullcontext()
    if lock:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ |= {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    with alone, file.open("ab") as stream:

        def put(message: Value | Raised | Ended) -> None:
            stream.write(pickle.dumps(message))
            stream.flush()
            os.fsync(stream.fileno())

        try:
            for value in call():
                put(Value(value))
        except Exception as error:  # whatever it is, the driver raises it
            put(Raised(error))
        else:
            put(Ended())


class SlurmFleet:
    """A partition of the Slurm cluster that this machine submits to. See `protocol.Fleet`."""

    def __init__(self, address: str) -> None:
        self.address = address
        engine, _, self.partition = address.partition(":")
        self.local = engine == "local"
        if not self.local and not self.partition:
            raise PreconditionError(
                f"--fleet {address} names no partition",
                "jobs are submitted to one",
                "write it like --fleet slurm:gpu (sinfo lists them)",
            )
        if not self.local and shutil.which("sinfo") is None:
            raise PreconditionError(
                f"--fleet {address} finds no Slurm here",
                "there is no sinfo on the PATH",
                "run it where jobs are submitted; --fleet local is submitit on this machine",
            )
        self.folder = build_root() / "fleet" / "jobs" / secrets.token_hex(4)

    def machines(self) -> list[Machine]:
        """See `protocol.Fleet`."""
        if self.local:
            return [Machine("local", "", {"name": "local"}, f"{os.cpu_count()} CPUs")]
        ask = ["sinfo", "--Node", "--noheader", "--partition", self.partition,
               "--format", "%N|%c|%m|%f|%G|%t"]  # fmt: skip
        done = subprocess.run(ask, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PreconditionError(
                f"Slurm does not tell the nodes of partition {self.partition}",
                done.stderr.strip() or f"sinfo ended with {done.returncode}",
                "sinfo lists the partitions that there are",
            )
        return [machine_of(line) for line in sorted({*done.stdout.splitlines()})
                if line.rpartition("|")[2].startswith(STATES)]  # fmt: skip

    def submit(self, machine: Machine, call: Call, title: str) -> tuple[Machine, Any, Path]:
        """See `protocol.Fleet`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        executor = submitit.AutoExecutor(self.folder, cluster="local" if self.local else "slurm")
        executor.update_parameters(name=f"addbench {title}"[:64], timeout_min=LONGEST_MIN)
        if not self.local:
            executor.update_parameters(
                cpus_per_task=int(machine.labels["cpus"]),
                slurm_partition=self.partition,
                slurm_exclusive=True,
                slurm_mem="0",
                slurm_additional_parameters={"nodelist": machine.id},
            )
        file = self.folder / f"{secrets.token_hex(8)}.pickle"
        lock = build_root() / "fleet" / ".local.lock" if self.local else None
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        return machine, executor.submit(fill, file, call, lock, devices), file

    def results(self, handle: tuple[Machine, Any, Path]) -> Generator[Any, None, None]:
        """See `protocol.Fleet`."""
        machine, job, file = handle
        try:
            said = time.monotonic()
            place = 0
            while True:
                ended = job.done()  # before the file is read: what it wrote last is there then
                messages = []
                if file.exists():
                    with file.open("rb") as stream:
                        stream.seek(place)
                        messages = list(whole(stream))
                        place = stream.tell()
                for message in messages:
                    if isinstance(message, Ended):
                        return
                    if isinstance(message, Raised):
                        raise message.error
                    yield message.value
                if ended and not messages:
                    words = (job.stderr() or "").strip().splitlines() or ["it left no word"]
                    raise LostError(
                        f"the job on {machine.name} is gone ({job.state})",
                        words[-1][:300],
                        "see to the machine, then go on with --resume",
                    )
                if time.monotonic() - said >= BEAT_S:
                    said = time.monotonic()
                    yield None
                time.sleep(LOOK_S)
        finally:
            job.cancel()
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave no job's file behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


def whole(stream: IO[bytes]) -> Iterator[Value | Raised | Ended]:
    """The messages that are complete; the stream is left behind the last of them."""
    while True:
        place = stream.tell()
        try:
            yield pickle.load(stream)
        except (EOFError, pickle.UnpicklingError, ValueError):
            stream.seek(place)
            return


def machine_of(line: str) -> Machine:
    """A node as sinfo tells it: its features and kinds of device are labels without a value."""
    name, cpus, memory, features, devices, state = line.strip().split("|")
    labels = {"name": name, "cpus": cpus}
    labels |= {each: "yes" for each in features.split(",") if each and each != "(null)"}
    kinds = [each.split("(")[0].split(":") for each in devices.split(",") if each != "(null)"]
    labels |= {kind[0]: kind[1] for kind in kinds if len(kind) > 2}
    hardware = f"{cpus} CPUs, {int(memory.rstrip('+')) / 1e3:.0f} GB"
    hardware += f", {devices}" if devices != "(null)" else ""
    return Machine(name, name, labels, hardware, () if state.startswith("idle") else (state,))


open_fleet = SlurmFleet
