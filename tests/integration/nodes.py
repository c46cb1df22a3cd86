"""A cluster of several nodes on this machine, any of which but the first can be lost in an instant."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster

from stepwell.server.config import NAMESPACE, set_ray_defaults
from tests.integration.processes import family_of

LIMIT_S = 120.0
STORE_BYTES = 100 * 2**20
# So that the loss of a node is noticed in two seconds, and one that is slow is not taken for lost.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 20_000,
    "health_check_failure_threshold": 4,
}


class Nodes:
    """A Ray that this process is in, with nodes that are its children. The first one has no room for shards.

    Args:
        num_nodes: How many others there are.
    """

    def __init__(self, num_nodes: int) -> None:
        set_ray_defaults()
        common = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        # Of its own: where another Ray has the usual port, Ray complains, and leaves a socket open.
        head = {**common, "num_cpus": 0, "_system_config": HEALTH, "dashboard_port": _free_port()}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}
        for _ in range(num_nodes):
            self.add()
        ray.init(self._cluster.address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)

    def add(self, num_cpus: int = 1, **options: Any) -> str:
        """Add a node, with room for one shard unless told otherwise; its id."""
        common: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        node = self._cluster.add_node(num_cpus=num_cpus, **common, **options)
        self._nodes[node.node_id] = node
        node_id: str = node.node_id
        return node_id

    def lose(self, node: str) -> None:
        """Kill all of a node's processes at once, without a word to anybody."""
        lost = self._nodes.pop(node)
        roots = [each.process for kind in lost.all_processes.values() for each in kind]
        for pid in [pid for root in roots for pid in family_of(root.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for root in roots:
            root.wait(LIMIT_S)

    def await_end(self, node: str) -> None:
        """Wait until Ray has ended a node by itself, and end what it leaves."""
        (raylet,) = self._nodes[node].all_processes["raylet"]
        raylet.process.wait(LIMIT_S)
        self.lose(node)

    def close(self) -> None:
        """End them all."""
        ray.shutdown()
        untyped_cluster: Any = self._cluster
        untyped_cluster.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def node_of(actor: Any) -> str:
    """The node that an actor is on, once it answers."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            node: str = ray.get(
                actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()), timeout=LIMIT_S
            )
            return node
        except ray.exceptions.RayActorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def kill(actor: Any) -> None:
    """Kill an actor's process."""
    pid: int = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=LIMIT_S)
    os.kill(pid, signal.SIGKILL)
