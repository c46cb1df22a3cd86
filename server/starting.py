"""The actors of a service in the cluster: placing, starting, finding and ending them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..sharding.errors import PlacementError, ServiceExistsError, ServiceNotFoundError, StepwellError
from .calls import ask
from .config import NAMESPACE, ServiceConfig
from .coordinator import CoordinatorActor
from .keeper import Keeper
from .shard_actor import ShardActor

ACTOR_START_TIMEOUT_S = 120.0


untyped_ray: Any = ray  # some of its functions have no types


def start_actors(config: ServiceConfig) -> tuple[Any, list[Any]]:
    """Start a service's actors; returns when its coordinator has taken the shards over.

    Returns:
        Handles of the coordinator and of the shards, by index.

    Raises:
        ServiceExistsError: If there is a service of this name, or something of one.
        PlacementError: If the cluster has no room for the shards.
    """
    if find_actor(config.coordinator_name) is not None:
        raise ServiceExistsError(
            f"there is a service {config.name!r} already; connect to it with stepwell.connect({config.name!r}), "
            f"or end it with `stepwell down {config.name}`"
        )
    if exists(config.name):
        raise cut_short(config.name)
    _require_resources(config)
    group = _reserve(config)
    lifetime = "detached" if config.detached else None
    # What a process that died was at is not for Ray to repeat: who asked for it asks again.
    common: dict[str, Any] = {
        "namespace": NAMESPACE, "lifetime": lifetime, "max_restarts": -1, "max_task_retries": 0
    }  # fmt: skip
    actors = list[Any]()
    # Ray warns that removing the group ends its actors; that is what shutdown does.
    logging.getLogger("ray.actor").addFilter(_is_news)
    try:
        keepers = _start_keepers(config, group, common)
        actors += keepers
        needs: dict[str, Any] = {"num_cpus": config.num_cpus_per_shard, "num_gpus": config.num_gpus_per_shard}
        shards = []
        for index in range(config.num_shards):
            options = {**common, **needs, "name": config.shard_name(index), "strategy": _place(group, index)}
            shards.append(_start_actor(ShardActor, config, index, **options))
        actors += shards
        options = {**common, "num_cpus": 0, "name": config.coordinator_name, "strategy": _place(group, 0)}
        coordinator = _start_actor(CoordinatorActor, config, len(keepers), **options)
        actors.append(coordinator)
        what = f"service {config.name!r} to start"
        ask(coordinator, "start", timeout_s=ACTOR_START_TIMEOUT_S, what=what)
    except (StepwellError, ValueError):
        end_actors(actors, config.name)
        raise
    return coordinator, shards


def _start_keepers(config: ServiceConfig, group: PlacementGroup, options: dict[str, Any]) -> list[Any]:
    """One on each node that has shards, and so many at least as each shard wants.

    Each has its place beside a shard, with which it goes to another node if its own is lost.
    """
    by_bundle = sorted(placement_group_table(group)["bundles_to_node_id"].items(), reverse=True)
    first_bundles = sorted({node: bundle for bundle, node in by_bundle}.values())
    num_keepers = max(len(first_bundles), config.redundancy) if config.redundancy else 0
    keepers = []
    for index in range(num_keepers):
        strategy = _place(group, first_bundles[index % len(first_bundles)])
        keepers.append(_start_actor(Keeper, name=config.keeper_name(index), num_cpus=0, strategy=strategy, **options))
    return keepers


def _place(group: PlacementGroup, bundle: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)


def _start_actor(actor_class: type, *args: Any, strategy: PlacementGroupSchedulingStrategy, **options: Any) -> Any:
    remote_class: Any = ray.remote(actor_class)
    return remote_class.options(scheduling_strategy=strategy, **options).remote(*args)


def _is_news(record: logging.LogRecord) -> bool:
    return "restartable detached actor with a placement group" not in record.getMessage()


def service_names() -> list[str]:
    """Names of the services in the cluster that this process is in."""
    names = actor_names("")
    return sorted(name.removesuffix("/coordinator") for name in names if name.endswith("/coordinator"))


def find_actor(name: str) -> Any | None:
    """Handle of a named actor; None if there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _require_resources(config: ServiceConfig) -> None:
    """Refuse at once what the whole cluster, were it idle, has no room for."""
    there, num_nodes = untyped_ray.cluster_resources(), len(untyped_ray.nodes())
    for resource, each in (("GPU", config.num_gpus_per_shard), ("CPU", config.num_cpus_per_shard)):
        wanted, total = each * config.num_shards, there.get(resource, 0.0)
        if wanted > total:
            raise PlacementError(
                f"{config.num_shards} shards with {each:g} {resource} each need {wanted:g} {resource}s; "
                f"the cluster has {total:g} on {num_nodes} node(s). "
                f"Ask for fewer shards, set num_{resource.lower()}s_per_shard lower, or add nodes."
            )


def _reserve(config: ServiceConfig) -> PlacementGroup:
    bundle = {"CPU": config.num_cpus_per_shard, "GPU": config.num_gpus_per_shard}
    # A bundle must hold something: a byte of memory, so that shards without CPUs have room where all CPUs are taken.
    bundle = {resource: amount for resource, amount in bundle.items() if amount > 0} or {"memory": 1}
    group: PlacementGroup = placement_group(
        [dict(bundle) for _ in range(config.num_shards)],
        strategy=config.placement,
        name=f"{config.name}/shards",
        lifetime="detached" if config.detached else None,
    )
    try:
        ray.get(group.ready(), timeout=config.placement_timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        remove_placement_group(group)
        free = untyped_ray.available_resources()
        raise PlacementError(
            f"no room for {config.num_shards} shards of {bundle} ({config.placement}) within "
            f"{config.placement_timeout_s:g} s; free now: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU. "
            "End another service with `stepwell down`, or ask for fewer shards or less for each."
        ) from error
    return group


def end_actors(actors: Sequence[Any], name: str) -> None:
    """End a service's actors, then give up their places: the other way about Ray would start them again."""
    for actor in actors:
        ray.kill(actor)
    for group in _groups(name):
        remove_placement_group(group)


def _groups(name: str) -> list[PlacementGroup]:
    """The places of a service, from whatever namespace it was launched."""
    rows: dict[str, dict[str, Any]] = placement_group_table()
    return [
        PlacementGroup(untyped_ray.PlacementGroupID.from_hex(group))
        for group, row in rows.items()
        if row["name"] == f"{name}/shards" and row["state"] != "REMOVED"
    ]


def actor_names(prefix: str) -> list[str]:
    """Names of all actors of ours that begin like this."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)]


def exists(name: str) -> bool:
    """Whether there is anything of a service; the first thing that there is are the places of its shards."""
    return bool(_groups(name) or actor_names(f"{name}/"))


def not_found(name: str) -> ServiceNotFoundError:
    """What to tell who looks for a service that is not there."""
    return ServiceNotFoundError(
        f"there is no service {name!r} in this cluster; running: {', '.join(service_names()) or 'none'}. "
        f"Start it with `stepwell up {name}`"
    )


def cut_short(name: str) -> ServiceExistsError:
    """What to tell who looks for a service of which there is but a part."""
    return ServiceExistsError(
        f"service {name!r} is being launched, or its launch was cut short; wait, or end it with `stepwell down {name}`"
    )
