"""The engines themselves: a Ray cluster of two nodes on this machine, submitit's local executor."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster

from bench.fleet import engines, node
from bench.fleet.protocol import Call, Fleet, LostError, Machine, select
from core.errors import PreconditionError
from core.process import run_apart


def all_of(fleet: Fleet, machine: Machine, call: Callable[[], Iterator[Any]]) -> list[Any]:
    """What a call on a machine yields."""
    with closing(fleet.results(fleet.submit(machine, call, "a test"))) as stream:
        return [message for message in stream if message is not None]


def where() -> Iterator[dict[str, Any]]:
    """What the process on the machine is like."""
    yield {
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "of_ray": [name for name in os.environ if name.startswith("RAY_")],
        "mine": os.environ.get("TEST_OF_NODE"),
        "pid": os.getpid(),
    }


def refused() -> Iterator[int]:
    yield 1
    raise PreconditionError("this is wrong", "because", "do that")


def counting(file: str, count: int, pause_s: float) -> Iterator[tuple[str, float, float]]:
    """Count slowly; when each number began and ended."""
    for number in range(count):
        began = time.time()
        time.sleep(pause_s)
        Path(file).write_text(f"{os.getpid()}")
        yield f"number {number}", began, time.time()


def sent(function: Callable[..., Any], *arguments: Any) -> Call:
    """A call whose code is sent: tests are not importable on a node."""
    for name in ("ray.cloudpickle", "cloudpickle"):
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name).register_pickle_by_value(sys.modules[__name__])
    return functools.partial(function, *arguments)


def until_lost(fleet: Fleet, machine: Machine, call: Call, cut: Callable[[int], None]) -> int:
    """How many messages a call still gives of which `cut` ends the machine in the middle.

    Args:
        cut: is told how many there were so far.
    """
    count = 0
    with (
        pytest.raises(LostError, match=f"{machine.name} is gone"),
        closing(fleet.results(fleet.submit(machine, call, "a test"))) as stream,
    ):
        for _ in filter(None, stream):
            count += 1
            cut(count)
    return count


# ---- Ray


def test_a_cluster_of_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """One test, as a cluster takes seconds to start: nodes, a clean process, one call at a time,
    errors, a label that no node has, a node that is killed in the middle."""
    fleet = cluster.fleet
    machines = fleet.machines()
    assert [each.name for each in machines] == ["left", "right"]
    assert machines[0].labels == {"name": "left", "device": "cpu-left"}
    assert "1 CPUs" in machines[0].hardware
    with pytest.raises(PreconditionError) as none:
        select(machines, "device=h100")
    assert "device=cpu-left,name=left" in none.value.why

    left, right = machines
    (is_like,) = all_of(fleet, left, sent(where))
    assert is_like["niceness"] == os.getpriority(os.PRIO_PROCESS, 0)
    assert is_like["threads"] is None
    assert is_like["of_ray"] == []
    assert is_like["mine"] == "left"
    (again,) = all_of(fleet, left, sent(where))
    assert again["pid"] != is_like["pid"]
    (apart,) = all_of(fleet, left, functools.partial(node.once, run_apart, os.getpid))
    assert apart not in (again["pid"], is_like["pid"]), "as ceilings are measured"

    with pytest.raises(PreconditionError, match="this is wrong") as raised:
        all_of(fleet, left, sent(refused))
    assert raised.value.next == "do that"

    spans: list[tuple[float, float]] = []

    def count(number: int) -> None:
        gave = all_of(fleet, left, sent(counting, str(tmp_path / f"{number}"), 2, 0.2))
        spans.append((gave[0][1], gave[-1][2]))

    threads = [threading.Thread(target=count, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    seen: set[str] = set()
    while any(thread.is_alive() for thread in threads):
        seen |= {*cluster.machine("left").running}
        time.sleep(0.1)
    assert seen == {"a test"}
    (_, first_end), (second_begin, _) = sorted(spans)
    assert first_end <= second_begin, "two calls at once on one machine"

    call = sent(counting, str(tmp_path / "right"), 100, 0.3)
    given = until_lost(fleet, right, call, lambda n: cluster.kill("right") if n == 2 else None)
    assert 2 <= given < 10
    until = time.monotonic() + 60
    while len(fleet.machines()) > 1:  # the cluster learns of it a little later
        assert time.monotonic() < until
        time.sleep(0.2)


def test_a_process_of_low_priority_is_refused(cluster: Cluster) -> None:
    cluster.nodes["slow"] = cluster.add("slow", RAY_worker_niceness="5")
    with pytest.raises(PreconditionError, match="lower priority") as refusal:
        all_of(cluster.fleet, cluster.machine("slow"), functools.partial(node.once, os.getpid))
    assert "RAY_worker_niceness=0" in refusal.value.next
    cluster.kill("slow")


def test_rays_client_is_refused() -> None:
    pytest.importorskip("ray", reason="ray is not installed: the extra `ray`")
    with pytest.raises(PreconditionError, match="Ray's client"):
        engines.fleet_at("ray://192.0.2.1:10001")


@pytest.mark.parametrize(("address", "package"), [("auto", "ray"), ("slurm:gpu", "submitit")])
def test_an_engine_that_is_not_installed_is_named(
    address: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "bench.fleet.ray", raising=False)
    monkeypatch.delitem(sys.modules, "bench.fleet.slurm", raising=False)
    with pytest.raises(PreconditionError, match=package) as refusal:
        engines.fleet_at(address)
    assert "pip install" in refusal.value.next


# ---- Slurm, by submitit's local executor


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    pytest.importorskip("submitit", reason="submitit is not installed: the extra `slurm`")
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    return engines.fleet_at("local")


def test_a_job_gives_what_it_yields_as_it_comes(jobs: Fleet, tmp_path: Path) -> None:
    (machine,) = jobs.machines()
    call = sent(counting, str(tmp_path / "file"), 3, 0.5)
    came = []
    with closing(jobs.results(jobs.submit(machine, call, "a test"))) as stream:
        came = [(message[0], time.time() - message[2]) for message in filter(None, stream)]
    assert [number for number, _ in came] == ["number 0", "number 1", "number 2"]
    assert came[0][1] < 0.5 + came[2][1], "the first came with the last"
    with pytest.raises(PreconditionError, match="this is wrong"):
        all_of(jobs, machine, sent(refused))
    jobs.close()
    assert not list((tmp_path / "build" / "fleet" / "jobs").iterdir())


@pytest.mark.parametrize("devices", [None, "1"])
def test_a_job_sees_the_devices_that_its_driver_sees(
    jobs: Fleet, monkeypatch: pytest.MonkeyPatch, devices: str | None
) -> None:
    if devices is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    call = functools.partial(node.once, os.getenv, "CUDA_VISIBLE_DEVICES", "all")
    assert all_of(jobs, jobs.machines()[0], call) == [devices or "all"]


def test_a_job_of_slurm_asks_for_its_node_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doubles of sinfo, sbatch and srun: what is submitted, not what becomes of it."""
    pytest.importorskip("submitit", reason="submitit is not installed: the extra `slurm`")
    for name, says in (("sinfo", "n1|64|256000|amx|gpu:h100:8|idle"), ("srun", ""),
                       ("sbatch", "Submitted batch job 12")):  # fmt: skip
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{says}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("ADDBENCH_BUILD", str(tmp_path / "build"))
    fleet = engines.fleet_at("slurm:gpu")
    (machine,) = select(fleet.machines(), "gpu=h100,amx=yes")
    fleet.submit(machine, functools.partial(node.once, os.getpid), "RUN null-vae-b1-r0")
    script, *_ = (tmp_path / "build").rglob("*.sh")  # as it was written, and as it was sent
    asked = {line for line in script.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"#SBATCH --partition=gpu", "#SBATCH --nodelist=n1", "#SBATCH --exclusive",
            "#SBATCH --mem=0", "#SBATCH --cpus-per-task=64"} <= asked  # fmt: skip


def test_a_job_that_is_killed_is_lost_and_keeps_what_it_gave(jobs: Fleet, tmp_path: Path) -> None:
    (machine,) = jobs.machines()
    file = tmp_path / "pid"

    def cut(count: int) -> None:
        if count == 1:
            os.kill(int(file.read_text()), signal.SIGKILL)

    assert until_lost(jobs, machine, sent(counting, str(file), 100, 0.3), cut) >= 1
    jobs.close()


def test_nodes_of_slurm_have_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A double of sinfo: no Slurm runs here."""
    pytest.importorskip("submitit", reason="submitit is not installed: the extra `slurm`")
    program = tmp_path / "sinfo"
    program.write_text(
        "#!/bin/sh\necho 'n1|64|256000|amx,rack3|gpu:h100:8(S:0-1)|idle'\n"
        "echo 'n2|32|128000+|(null)|(null)|alloc'\necho 'n3|32|128000|(null)|(null)|down*'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    first, second = engines.fleet_at("slurm:gpu").machines()
    assert first.labels == {"name": "n1", "cpus": "64", "amx": "yes", "rack3": "yes", "gpu": "h100"}
    assert first.hardware == "64 CPUs, 256 GB, gpu:h100:8(S:0-1)"
    assert first.running == ()
    assert second.running == ("alloc",)
    with pytest.raises(PreconditionError, match="names no partition"):
        engines.fleet_at("slurm")
