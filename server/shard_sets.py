"""The sets of shards of a service in the cluster: placing, starting, finding and ending them."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import time
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..sharding.errors import PlacementError, StepwellError
from .calls import wait_for
from .config import NAMESPACE, ServiceConfig
from .keeper import Keeper
from .resizing import ShardSet, ShardSets
from .room import drained_now, needs, nodes_now, require_room, tell
from .seat import Seat
from .shard_actor import ShardActor
from .standby import ActorState

ACTOR_START_TIMEOUT_S = 120.0

untyped_ray: Any = ray  # some of its functions have no types


class SetsInRay(ShardSets):
    """Those of one service in Ray. Ray is asked on threads, as it may keep one waiting.

    Args:
        config: The settings that the service was launched with.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config

    def found_now(self) -> list[ShardSet]:
        """See :meth:`found`; waits for Ray."""
        return _found(self._config)

    async def found(self) -> list[ShardSet]:
        """See :class:`ShardSets`."""
        return await asyncio.to_thread(self.found_now)

    async def start(self, config: ServiceConfig, avoid: Collection[str]) -> ShardSet:
        """See :class:`ShardSets`."""
        return await asyncio.to_thread(_start_and_wait, config, avoid)

    async def end(self, config: ServiceConfig) -> None:
        """See :class:`ShardSets`."""
        await asyncio.to_thread(end_set, config.set_name)

    async def nodes(self, config: ServiceConfig) -> list[str]:
        """See :class:`ShardSets`."""
        return await asyncio.to_thread(nodes_of, config)

    async def drained(self) -> list[str]:
        """See :class:`ShardSets`."""
        return await asyncio.to_thread(drained_now)

    def here(self) -> str:
        """See :class:`ShardSets`."""
        node: str = ray.get_runtime_context().get_node_id()
        return node

    async def states(self, actors: Sequence[Any]) -> list[ActorState]:
        """See :class:`ShardSets`."""
        return await asyncio.to_thread(lambda: [_state(actor) for actor in actors])

    async def replace(self, config: ServiceConfig, index: int, lost: Any, node: str) -> Any:
        """See :class:`ShardSets`."""
        return await asyncio.to_thread(_replace, config, index, lost, node)


def _row(actor: Any) -> dict[str, Any]:
    """What Ray knows of an actor."""
    row: dict[str, Any] = untyped_ray._private.state.actors(actor._actor_id.hex())
    return row


def _state(actor: Any) -> ActorState:
    shown = {"ALIVE": ActorState.RUNS, "DEPENDENCIES_UNREADY": ActorState.STARTS, "PENDING_CREATION": ActorState.STARTS}
    return shown.get(_row(actor).get("State", ""), ActorState.LOST)


def _replace(config: ServiceConfig, index: int, lost: Any, node: str) -> Any:
    # Its name is not that of its index where it has taken another one's place.
    name, deadline = _row(lost).get("Name") or config.shard_name(index), time.monotonic() + ACTOR_START_TIMEOUT_S
    end_actors([name])
    options = {**common_options(config), **on_node(node), "name": name}
    while True:
        try:
            return start_actor(_shard_class(config), config, index, True, **options)
        except ValueError as error:  # Ray has not yet given up the name
            if time.monotonic() > deadline:
                raise PlacementError(f"shard {index} cannot be started on node {node}: {error}") from error
            time.sleep(0.1)


def start_set(config: ServiceConfig, avoid: Collection[str] = ()) -> ShardSet:
    """Place and start a set's shards, and what keeps their copies; they may not answer yet.

    Args:
        config: The set's settings.
        avoid: Ids of nodes that nothing is to be placed on.

    Raises:
        PlacementError: If the cluster has no room for them.
    """
    # Ray warns that removing the places of actors ends these; that is what ending a set does.
    logging.getLogger("ray.actor").addFilter(_is_news)
    require_room(config, nodes_now(avoid))
    group = reserve(config, avoid)
    common = common_options(config)
    each: dict[str, Any] = {"num_cpus": config.num_cpus_per_shard, "num_gpus": config.num_gpus_per_shard}
    try:
        bundles = _first_bundles(group)
        keepers, shards = _start_keepers(config, group, bundles), []
        for index in range(config.num_shards):
            options = {**common, **each, "name": config.shard_name(index), "strategy": _place(group, index)}
            shards.append(start_actor(_shard_class(config), config, index, **options))
        spares = _start_spares(config, group, bundles)
    except ValueError:
        end_set(config.set_name)
        raise
    return ShardSet(config, shards, keepers, spares=spares)


def _shard_class(config: ServiceConfig) -> type[ShardActor]:
    return Seat if config.standby else ShardActor


def _first_bundles(group: PlacementGroup) -> list[int]:
    """A shard's place on each node that has some."""
    by_bundle = sorted(placement_group_table(group)["bundles_to_node_id"].items(), reverse=True)
    return sorted({node: bundle for bundle, node in by_bundle}.values())


def _start_spares(config: ServiceConfig, group: PlacementGroup, bundles: Sequence[int]) -> list[Any]:
    """Each beside a shard, on one node after the other; the coordinator's comes last."""
    spares, common = [], common_options(config)
    for index in range(config.standby):
        strategy = _place(group, bundles[-1 - index % len(bundles)])
        options = {**common, "name": config.spare_name(index), "num_cpus": 0}
        spares.append(start_actor(Seat, config, None, strategy=strategy, **options))
    return spares


def _start_keepers(config: ServiceConfig, group: PlacementGroup, first_bundles: Sequence[int]) -> list[Any]:
    """One on each node that has shards, and so many at least as each shard wants.

    Each has its place beside a shard, with which it goes to another node if its own is lost.
    """
    num_keepers = max(len(first_bundles), config.redundancy) if config.redundancy else 0
    keepers, common = [], common_options(config)
    for index in range(num_keepers):
        strategy = _place(group, first_bundles[index % len(first_bundles)])
        keepers.append(start_actor(Keeper, name=config.keeper_name(index), num_cpus=0, strategy=strategy, **common))
    return keepers


def _place(group: PlacementGroup, bundle: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)


def _start_and_wait(config: ServiceConfig, avoid: Collection[str]) -> ShardSet:
    started = start_set(config, avoid)
    try:
        calls = [shard.epoch.remote() for shard in started.shards]
        wait_for(calls, timeout_s=ACTOR_START_TIMEOUT_S, what=f"the {config.num_shards} new shards to start")
    except StepwellError:
        end_set(config.set_name)
        raise
    return started


def _is_news(record: logging.LogRecord) -> bool:
    return "restartable detached actor with a placement group" not in record.getMessage()


def common_options(config: ServiceConfig) -> dict[str, Any]:
    """What all actors of a service have in common for Ray."""
    lifetime = "detached" if config.detached else None
    # What a process that died was at is not for Ray to repeat: who asked for it asks again.
    return {"namespace": NAMESPACE, "lifetime": lifetime, "max_restarts": -1, "max_task_retries": 0}


def start_actor(actor_class: type, *args: Any, strategy: Any, **options: Any) -> Any:
    """Start an actor under one of Ray's scheduling strategies; its handle."""
    remote_class: Any = ray.remote(actor_class)
    return remote_class.options(scheduling_strategy=strategy, **options).remote(*args)


def on_node(node: str) -> dict[str, Any]:
    """Options of an actor that is to be on a node while there is that node, and reserves nothing to speak of.

    It needs a byte of memory, as Ray starts an actor anywhere that needs nothing.
    """
    return {"num_cpus": 0, "memory": 1, "strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


def nodes_of(config: ServiceConfig) -> list[str]:
    """Ids of the nodes that a set's shards have their places on, by index; empty for one that has none now."""
    rows = placement_group_table().values()
    there = (row for row in rows if row["name"] == config.set_name and row["state"] != "REMOVED")
    places: dict[int, str] = next((row["bundles_to_node_id"] for row in there), {})
    return [places.get(index, "") for index in range(config.num_shards)]


def reserve(config: ServiceConfig, avoid: Collection[str] = ()) -> PlacementGroup:
    """Reserve places for a set's shards on other nodes than ``avoid``.

    Raises:
        PlacementError: If there are none within ``placement_timeout_s``.
    """
    # A bundle must hold something: a byte of memory, so that shards without CPUs have room where all CPUs are taken.
    bundle = needs(config) or {"memory": 1}
    elsewhere = [{"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}] * config.num_shards if avoid else None
    group: PlacementGroup = placement_group(
        [dict(bundle) for _ in range(config.num_shards)],
        strategy=config.placement,
        name=config.set_name,
        lifetime="detached" if config.detached else None,
        bundle_label_selector=elsewhere,
    )
    try:
        ray.get(group.ready(), timeout=config.placement_timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        remove_placement_group(group)
        raise PlacementError(
            f"no room for {config.num_shards} shards of {bundle} ({config.placement}) within "
            f"{config.placement_timeout_s:g} s; free now: {tell(nodes_now(avoid))}. "
            "End another service with `stepwell down`, or ask for fewer shards or less for each."
        ) from error
    return group


def find_node(text: str) -> str:
    """The id of a node.

    Args:
        text: Its id, the beginning of that, its address or the name of its host.

    Raises:
        PlacementError: If no node of the cluster is meant, or more than one.
    """
    there = [node for node in untyped_ray.nodes() if node["Alive"]]
    meant: list[str] = [
        node["NodeID"]
        for node in there
        if node["NodeID"].startswith(text) or text in (node["NodeManagerAddress"], node["NodeManagerHostname"])
    ]
    if len(meant) != 1:
        ids = ", ".join(f"{node['NodeID']} ({node['NodeManagerAddress']})" for node in there)
        raise PlacementError(f"expected the id, address or host name of one node, got {text!r}; there are {ids}")
    return meant[0]


def end_set(set_name: str) -> None:
    """End a set's actors, the first shard before all others; see :meth:`ShardSets.found`."""
    end_actors([f"{set_name}/shard-0", *actor_names(f"{set_name}/")])
    give_up_places(set_name)


def end_actors(names: Sequence[str]) -> None:
    """End actors, some of which may have ended."""
    for actor in [find_actor(name) for name in dict.fromkeys(names)]:
        if actor is not None:
            ray.kill(actor)


def give_up_places(name: str) -> None:
    """Free what a service or a set has reserved, once its actors have ended: else Ray would start them again."""
    for group in groups_of(name):
        remove_placement_group(group)


def groups_of(name: str) -> list[PlacementGroup]:
    """The places of a service or a set, from whatever namespace it was launched."""
    rows: dict[str, dict[str, Any]] = placement_group_table()
    return [
        PlacementGroup(untyped_ray.PlacementGroupID.from_hex(group))
        for group, row in rows.items()
        if f"{row['name']}/".startswith(f"{name}/") and row["state"] != "REMOVED"
    ]


def find_actor(name: str) -> Any | None:
    """Handle of a named actor; None if there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def actor_names(prefix: str) -> list[str]:
    """Names of all actors of ours that begin like this."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)]


def _found(config: ServiceConfig) -> list[ShardSet]:
    actors: dict[tuple[int, int], dict[str, set[int]]] = {}
    for name in actor_names(f"{config.name}/"):
        if match := re.fullmatch(r".*/set-(\d+)\.(\d+)/(shard|keeper|spare)-(\d+)", name):
            kinds = actors.setdefault((int(match[1]), int(match[2])), {"shard": set(), "keeper": set(), "spare": set()})
            kinds[match[3]].add(int(match[4]))
    sets = []
    for shard_set, kinds in sorted(actors.items()):
        num_shards = max(kinds["shard"], default=0) + 1
        each = dataclasses.replace(config, num_shards=num_shards, shard_set=shard_set)
        shards = _handles([each.shard_name(index) for index in sorted(kinds["shard"])])
        keepers = _handles([each.keeper_name(index) for index in sorted(kinds["keeper"])])
        spares = _handles([each.spare_name(index) for index in sorted(kinds["spare"])])
        sets.append(ShardSet(each, shards, keepers, is_whole=0 in kinds["shard"], spares=spares))
    return sets


def _handles(names: Sequence[str]) -> list[Any]:
    """Of those actors that are there; some may have ended just now."""
    return [actor for actor in map(find_actor, names) if actor is not None]
