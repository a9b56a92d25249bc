"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

from typing import Any

from bench.fleet import engines
from bench.fleet.protocol import Machine, select

MEMORY = 80 << 20
"""About the smallest object store that Ray makes: nothing goes through it."""


class Cluster:
    """A Ray cluster of two nodes that measure, on this machine; its head measures nothing."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
        self.cluster = RayCluster(initialize_head=True, head_node_args=head)
        try:
            self.nodes = {name: self.add(name) for name in ("left", "right")}
            self.fleet = engines.fleet_at(self.cluster.address)
        except BaseException:
            self.cluster.shutdown()
            raise

    def add(self, name: str, **variables: str) -> Any:
        return self.cluster.add_node(
            num_cpus=1,
            object_store_memory=MEMORY,
            resources={"addbench": 1},
            labels={"addbench/name": name, "addbench/device": f"cpu-{name}"},
            env_vars={"RAY_worker_niceness": "0", "TEST_OF_NODE": name, **variables},
        )

    def machine(self, name: str) -> Machine:
        return select(self.fleet.machines(), f"name={name}")[0]

    def kill(self, name: str) -> None:
        """A power cut."""
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)
