"""Starting a whole service in the cluster, and finding one."""

from __future__ import annotations

from typing import Any

from ..sharding.errors import ServiceExistsError, ServiceNotFoundError, StepwellError
from .calls import ask
from .config import ServiceConfig
from .coordinator import CoordinatorActor
from .resizing import ShardSet
from .shard_sets import (
    ACTOR_START_TIMEOUT_S,
    actor_names,
    common_options,
    end_actors,
    find_actor,
    give_up_places,
    groups_of,
    nodes_of,
    on_node,
    start_actor,
    start_set,
)


def start_actors(config: ServiceConfig) -> tuple[Any, ShardSet]:
    """Start a service's actors; returns when its coordinator has taken the shards over.

    Returns:
        Handle of the coordinator, and the shards and keepers. Without a name they end when these handles are gone.

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
    started = start_set(config)
    try:
        # Beside the first shard, but in no place of the set's, as sets come and go.
        options = {**common_options(config), **on_node(nodes_of(config)[0]), "name": config.coordinator_name}
        coordinator = start_actor(CoordinatorActor, config, **options)
        what = f"service {config.name!r} to start"
        ask(coordinator, "start", timeout_s=ACTOR_START_TIMEOUT_S, what=what)
    except (StepwellError, ValueError):
        end_service(config.name)
        raise
    return coordinator, started


def service_names() -> list[str]:
    """Names of the services in the cluster that this process is in."""
    names = actor_names("")
    return sorted(name.removesuffix("/coordinator") for name in names if name.endswith("/coordinator"))


def end_service(name: str) -> None:
    """End all actors of a service, the coordinator before those that it would have brought back."""
    end_actors([f"{name}/coordinator", *actor_names(f"{name}/")])
    give_up_places(name)


def exists(name: str) -> bool:
    """Whether there is anything of a service; the first thing that there is are the places of its shards."""
    return bool(groups_of(name) or actor_names(f"{name}/"))


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
