"""A process that launches a service in a cluster of hosts, and trains: ``... host_worker ADDRESS``.

Says whose cable is to be taken out, while it trains; says "recovered" when it has trained on; waits for a line, trains
on, and says "same" if all is as it would have been.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import ray
import torch

import stepwell
from tests.integration.nodes import node_of
from tests.integration.rank import Rank, rank_on

NAME = "over-hosts"
LIMIT_S = 240.0
WITH_SHARDS = 2
TOLD = "told: "

untyped_ray: Any = ray  # some of its functions have no types


def main(address: str) -> None:
    """One worker is here, where no shard is; the other one beside the second shard."""
    torch.set_num_threads(1)
    ray.init(address, namespace="of the worker", log_to_driver=False, configure_logging=False)
    await_nodes(1 + WITH_SHARDS)
    service = stepwell.launch(NAME, num_shards=WITH_SHARDS, num_cpus_per_shard=0.5)
    first, second = map(node_of, service.shards)
    assert first != second
    assert first == node_of(service.coordinator)
    there, here = rank_on(second, NAME, 0), Rank(NAME, 1)
    run(there, here, 10)
    assert (ask(there, "is_near"), here.is_near()) == ([False, True], [False, False])
    tell(host_of(first))
    run(there, here, 200)
    assert set(map(node_of, service.find_shards())) == {second}
    tell("recovered")
    sys.stdin.readline()
    run(there, here, 230)
    assert (ask(there, "is_near"), here.is_near()) == ([True, True], [False, False])
    ask(there, "require_same")
    here.require_same()
    tell("same")


def tell(what: str) -> None:
    print(f"{TOLD}{what}", flush=True)


def await_nodes(number: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while sum(node["Alive"] for node in untyped_ray.nodes()) < number:
        assert time.monotonic() < deadline, f"expected {number} nodes within {LIMIT_S:g} s, got {untyped_ray.nodes()}"
        time.sleep(0.1)


def host_of(node: str) -> str:
    (name,) = (each["NodeManagerHostname"] for each in untyped_ray.nodes() if each["NodeID"] == node)
    return str(name)


def run(there: Any, here: Rank, stop: int) -> None:
    """Have both take steps until there were ``stop``."""
    running = there.run.remote(stop)
    here.run(stop)
    ray.get(running, timeout=LIMIT_S)


def ask(there: Any, method: str) -> object:
    return ray.get(getattr(there, method).remote(), timeout=LIMIT_S)


if __name__ == "__main__":
    main(sys.argv[1])
