"""How much room the cluster has for shards, and what to tell where it has too little."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray

from ..sharding.errors import PlacementError
from .config import ServiceConfig

RESOURCES = ("CPU", "GPU")
UNIT = 1e-4
"""Ray counts resources in ten-thousandths."""
MOST_TOLD = 8

untyped_ray: Any = ray  # some of its functions have no types


@dataclasses.dataclass(frozen=True, slots=True)
class NodeRoom:
    """What a node has.

    Attributes:
        address: Its address in Ray.
        total: CPUs and GPUs.
        free: Those of them that nobody has reserved.
    """

    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]

    def num_shards(self, config: ServiceConfig) -> int:
        """How many shards it holds when nothing else is on it."""
        return min(
            (
                round(self.total.get(resource, 0) / UNIT) // round(each / UNIT)
                for resource, each in needs(config).items()
            ),
            default=config.num_shards,
        )

    def __str__(self) -> str:
        parts = (
            f"{self.free.get(resource, 0):g} of {self.total[resource]:g} {resource}"
            for resource in RESOURCES
            if self.total.get(resource)
        )
        return f"{self.address} has {' and '.join(parts) or 'neither CPU nor GPU'}"


def needs(config: ServiceConfig) -> dict[str, float]:
    """CPUs and GPUs of a shard, without those that it needs none of."""
    each = {"CPU": config.num_cpus_per_shard, "GPU": config.num_gpus_per_shard}
    return {resource: amount for resource, amount in each.items() if amount > 0}


def drained_now() -> list[str]:
    """Ids of the nodes that Ray is draining: it places nothing on them any more."""
    # As Ray's own libraries ask for it; there is no public function.
    return list(untyped_ray._private.state.state.get_draining_nodes())


def nodes_now(avoid: Collection[str] = ()) -> list[NodeRoom]:
    """The cluster's nodes that are alive and not drained, but for those with the ids ``avoid``; asks Ray."""
    free: Mapping[str, Mapping[str, float]] = untyped_ray._private.state.available_resources_per_node()
    without = {*avoid, *drained_now()}
    return [
        NodeRoom(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in untyped_ray.nodes()
        if node["Alive"] and node["NodeID"] not in without
    ]


def require_room(config: ServiceConfig, nodes: Sequence[NodeRoom]) -> None:
    """Refuse at once what the cluster, were it idle, has no room for.

    Raises:
        PlacementError: Naming what is wanted and what there is.
    """
    for resource, each in needs(config).items():
        wanted, total = each * config.num_shards, sum(node.total.get(resource, 0) for node in nodes)
        if wanted > total + UNIT:
            raise PlacementError(
                f"{config.num_shards} shards with {each:g} {resource} each need {wanted:g} {resource}s; "
                f"the cluster has {total:g} on {len(nodes)} node(s). "
                f"Ask for fewer shards, set num_{resource.lower()}s_per_shard lower, or add nodes."
            )
    on_each = [node.num_shards(config) for node in nodes]
    if config.placement == "STRICT_SPREAD":
        most, where = sum(number > 0 for number in on_each), "with one on a node"
    elif config.placement == "STRICT_PACK":
        most, where = max(on_each, default=0), "on one node"
    else:
        most, where = sum(on_each), "each whole on a node"
    if most < config.num_shards:
        raise PlacementError(
            f"{config.num_shards} shards of {needs(config)} ({config.placement}): the cluster, were it idle, has room "
            f"for {most}, {where}: {tell(nodes)}. Ask for fewer shards or less for each, choose another placement, or "
            "add nodes."
        )


def tell(nodes: Sequence[NodeRoom]) -> str:
    """What the nodes have, those with the most room first."""
    most_first = sorted(nodes, key=lambda node: [-node.free.get(each, 0) for each in reversed(RESOURCES)])
    left = f"; and {len(nodes) - MOST_TOLD} more" if len(nodes) > MOST_TOLD else ""
    return "; ".join(map(str, most_first[:MOST_TOLD])) + left
