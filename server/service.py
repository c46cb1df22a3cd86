"""Starting a service, finding one, and what one does with it."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Sequence
from typing import Any, Literal, overload

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..sharding.compiling import KernelChoice
from ..sharding.errors import PlacementError, ServiceExistsError, ServiceNotFoundError, StepwellError
from ..sharding.folder import Checkpoint, list_checkpoints, require_keep_last
from ..sharding.pending_save import PendingSave
from . import cluster
from .calls import ask
from .config import NAMESPACE, Placement, ServiceConfig, default_kernel
from .coordinator import CoordinatorActor
from .keeper import Keeper
from .shard_actor import ShardActor
from .shards import FORMING_TIMEOUT_S, STATE_TIMEOUT_S

ACTOR_START_TIMEOUT_S = 120.0

untyped_ray: Any = ray  # some of its functions have no types


class Service:
    """A running service. :func:`launch` and :func:`connect` make it; as a context manager it shuts down on exit.

    Attributes:
        config: Its settings.
        coordinator: Handle of its coordinator actor.
        shards: Handles of its shard actors.
    """

    def __init__(self, config: ServiceConfig, coordinator: Any, shards: list[Any], *, owns_ray: bool = False) -> None:
        self.config, self.coordinator, self.shards = config, coordinator, shards
        self._owns_ray = owns_ray
        self._pending: PendingSave | None = None

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"<Service {self.name!r}, {len(self.shards)} shards>"

    @property
    def name(self) -> str:
        """Its name in the cluster."""
        return self.config.name

    def status(self) -> dict[str, Any]:
        """Where the service stands, as plain values.

        Returns:
            ``name``, ``num_shards``, ``generation`` of the shards' group, ``epoch`` of the coordinator and its
            ``restarts``; ``redundancy``; ``recoveries`` of shards since, with the seconds of the last one by part, see
            :class:`stepwell.server.watch.Recovery`; with a job also ``rule``, ``world_size``, ``num_params``,
            ``numel``, ``step``, ``skipped_steps``, ``sequence``, ``timeline``, ``scalars``, ``kernel`` and
            ``size_bytes`` per shard.
        """
        config, spec, generation, epoch, shards, (count, last) = self.ask("status", what="its status")
        fields: dict[str, Any] = {
            "name": config.name,
            "num_shards": config.num_shards,
            "generation": str(generation),
            "epoch": epoch,
            "restarts": epoch - 1,
            "redundancy": config.redundancy,
            "recoveries": {"count": count, "last": None if last is None else dataclasses.asdict(last)},
        }
        if spec is None or shards[0] is None:
            return {**fields, "rule": None, "step": 0}
        first = shards[0]
        return {
            **fields,
            "rule": spec.rule.name,
            "world_size": spec.world_size,
            "num_params": len(spec.params),
            "numel": sum(param.numel for param in spec.params),
            "step": first.step,
            "skipped_steps": first.skipped_steps,
            "sequence": first.sequence,
            "timeline": first.timeline,
            "scalars": dict(first.scalars),
            "kernel": first.kernel_identity,
            "size_bytes": [0 if shard is None else shard.size_bytes for shard in shards],
        }

    @overload
    def save(self, uri: str, *, keep_last: int | None = None, wait: Literal[True] = True) -> int: ...

    @overload
    def save(self, uri: str, *, keep_last: int | None = None, wait: Literal[False]) -> PendingSave: ...

    def save(self, uri: str, *, keep_last: int | None = None, wait: bool = True) -> int | PendingSave:
        """Write a checkpoint of the state between two steps to ``uri``, a path or fsspec URI that every shard reaches.

        Called by one process, at any time. Steps go on while it is written. A save that fails leaves the checkpoint
        that was there before. Saves are written one after the other; a second one waits for the first.

        Args:
            uri: The checkpoint's folder; with ``keep_last`` the run's, where it gets one of its own, ``step-<n>``.
            keep_last: How many complete checkpoints of the run stay, 1 at least. Once this one is complete, the older
                ones and what interrupted saves have left are removed. None removes nothing.
            wait: Whether to return when it is complete; else as soon as its step is settled. A service that ends with
                this process, and the process, then wait for the checkpoint before they end.

        Returns:
            The number of steps in it; without ``wait`` a :class:`stepwell.PendingSave`, whose ``result()`` gives it.

        Raises:
            CheckpointError: If it cannot be written. Steps go on, and the checkpoints from before are whole.
            NotRegisteredError: If the service has no job yet.
            ValueError: If ``keep_last`` is less than 1.
        """
        require_keep_last(keep_last)
        save_id = uuid.uuid4().hex[:12]
        is_new, at, step = self.ask("begin_save", save_id, uri, keep_last, what=f"a step to save to {uri}")

        def end() -> None:
            self.ask("end_save", save_id, at, what=f"the checkpoint {at}")

        save = PendingSave.in_thread(at, step, end) if is_new else PendingSave.complete(at, step)
        if wait:
            return save.result()
        save.watch(ends_with_process=not self.config.detached)
        self._pending = save
        return save

    def restore(self, uri: str) -> int:
        """Take over the checkpoint at ``uri``, written by any number of shards. Called by one process.

        All of it is read and compared with its digests first, while steps go on: a damaged one changes nothing.
        Workers that are connected call ``optimizer.refresh()`` afterwards.

        Returns:
            The number of steps in it.

        Raises:
            CheckpointError: If there is none, or it is damaged; the message names the file and the tensor.
            JobMismatchError: If it is of another model or rule.
        """
        step: int = self.ask("restore", uri, uuid.uuid4().hex, what=f"the checkpoint {uri}").step
        return step

    def checkpoints(self, uri: str) -> list[Checkpoint]:
        """The complete checkpoints in a run's folder, the one that was written last at the end.

        Their files are there with their sizes; ``stepwell checkpoint verify`` looks at every byte.

        Args:
            uri: The run's folder, see ``keep_last`` of :meth:`save`; or that of a single checkpoint.

        Raises:
            CheckpointError: If the folder cannot be read.
        """
        return list_checkpoints(uri)

    def shutdown(self) -> None:
        """End the service and free its place in the cluster. State that was not saved is gone."""
        if not ray.is_initialized():
            return
        if self._pending is not None:
            self._pending.finish()
        keeper = _find_actor(self.config.keeper_name)
        _end([actor for actor in (self.coordinator, keeper, *self.shards) if actor is not None], self.name)
        if self._owns_ray and not [name for name in service_names() if name != self.name]:
            ray.shutdown()

    def ask(self, method: str, *args: Any, what: str, timeout_s: float = STATE_TIMEOUT_S) -> Any:
        """Call a method of the coordinator; see :func:`stepwell.server.calls.ask`."""
        return ask(self.coordinator, method, *args, timeout_s=timeout_s, what=f"service {self.name!r}: {what}")


def launch(
    name: str | None = None,
    *,
    num_shards: int = 1,
    num_gpus_per_shard: float = 0,
    num_cpus_per_shard: float = 1,
    placement: Placement = "SPREAD",
    chunk_numel: int | None = None,
    kernel: KernelChoice | None = None,
    restore: str | None = None,
    worker_timeout_s: float = 1800.0,
    placement_timeout_s: float = 60.0,
    redundancy: int = 1,
) -> Service:
    """Start a service.

    Args:
        name: Its name; it then outlives this process, until ``shutdown`` or ``stepwell down``. None: unnamed, ends with
            this process, in a Ray of its own unless this process is in one already.
        num_shards: Shards.
        num_gpus_per_shard: GPUs of each; 0 keeps the state in CPU memory.
        num_cpus_per_shard: CPUs of each.
        placement: Ray's placement strategy for them.
        chunk_numel: Elements in a chunk, a power of two; None chooses by the model's size. Never touches the result.
        kernel: How kernels run: ``"compiled"`` (once for each rule and machine, some seconds), ``"eager"``, which is
            several times slower, or ``"auto"``: compiled where there is a compiler. The bits depend on it; the job and
            its checkpoints record it. None: ``$STEPWELL_KERNEL``, else ``"auto"``.
        restore: A checkpoint to begin with.
        worker_timeout_s: How long a step waits for the last rank after the first.
        placement_timeout_s: How long to wait for room in the cluster.
        redundancy: 1: what a shard holds survives the shard, by a copy of its state and the last steps' gradients in
            memory of its node; 0: a shard that dies takes the service back to its last checkpoint.

    Raises:
        ServiceExistsError: If there is a service of this name.
        PlacementError: If the cluster has no room for the shards.
        CheckpointError: If ``restore`` cannot be read.
        ValueError: If an argument is out of range.
    """
    config = ServiceConfig(
        name=name or f"unnamed-{uuid.uuid4().hex[:12]}",
        num_shards=num_shards,
        num_gpus_per_shard=num_gpus_per_shard,
        num_cpus_per_shard=num_cpus_per_shard,
        placement=placement,
        chunk_numel=chunk_numel,
        kernel=default_kernel() if kernel is None else kernel,
        detached=name is not None,
        worker_timeout_s=worker_timeout_s,
        placement_timeout_s=placement_timeout_s,
        redundancy=redundancy,
    )
    owns_ray = name is None and not ray.is_initialized()
    if owns_ray:
        cluster.start_embedded(num_cpus=max(1, round(num_shards * num_cpus_per_shard)))
    else:
        cluster.attach()
    try:
        service = _start(config, owns_ray)
        if restore is not None:
            _restore_or_end(service, restore)
    except StepwellError:
        if owns_ray:
            ray.shutdown()
        raise
    return service


def connect(name: str, *, address: str | None = None) -> Service:
    """Find a running service by name.

    Args:
        name: The name it was launched with.
        address: Its Ray cluster; None takes the one this process is in, ``$RAY_ADDRESS``, or the one ``stepwell up``
            started on this machine.

    Raises:
        ServiceNotFoundError: If there is no such service, or no cluster.
    """
    cluster.attach(address)
    coordinator = _find_actor(f"{name}/coordinator")
    if coordinator is None:
        raise _cut_short(name) if _exists(name) else _not_found(name)
    config, shards = ask(coordinator, "describe", timeout_s=FORMING_TIMEOUT_S, what=f"service {name!r}")
    return Service(config, coordinator, shards)


def end(name: str, *, address: str | None = None) -> None:
    """End a service by name, also one whose launch was cut short. State that was not saved is gone.

    Args:
        name: The name it was launched with.
        address: Its Ray cluster, as for :func:`connect`.

    Raises:
        ServiceNotFoundError: If there is no such service, or no cluster.
    """
    cluster.attach(address)
    if not _exists(name):
        raise _not_found(name)
    found = map(_find_actor, _actor_names(f"{name}/"))
    _end([actor for actor in found if actor is not None], name)


def service_names() -> list[str]:
    """Names of the services in the cluster that this process is in."""
    names = _actor_names("")
    return sorted(name.removesuffix("/coordinator") for name in names if name.endswith("/coordinator"))


def _start(config: ServiceConfig, owns_ray: bool) -> Service:
    if _find_actor(config.coordinator_name) is not None:
        raise ServiceExistsError(
            f"there is a service {config.name!r} already; connect to it with stepwell.connect({config.name!r}), "
            f"or end it with `stepwell down {config.name}`"
        )
    if _exists(config.name):
        raise _cut_short(config.name)
    _require_resources(config)
    group = _reserve(config)
    lifetime = "detached" if config.detached else None
    # What a process that died was at is not for Ray to repeat: who asked for it asks again.
    common: dict[str, Any] = {
        "namespace": NAMESPACE, "lifetime": lifetime, "max_restarts": -1, "max_task_retries": 0
    }  # fmt: skip
    actors, keeper = list[Any](), None
    # Ray warns that removing the group ends its actors; that is what shutdown does.
    logging.getLogger("ray.actor").addFilter(_is_news)
    try:
        beside_the_first: dict[str, Any] = {**common, "num_cpus": 0, "strategy": _place(group, 0)}
        if config.redundancy:
            keeper = _start_actor(Keeper, name=config.keeper_name, **beside_the_first)
            actors.append(keeper)
        needs: dict[str, Any] = {"num_cpus": config.num_cpus_per_shard, "num_gpus": config.num_gpus_per_shard}
        shards = []
        for index in range(config.num_shards):
            options = {**common, **needs, "name": config.shard_name(index), "strategy": _place(group, index)}
            shards.append(_start_actor(ShardActor, config, index, keeper, **options))
        actors += shards
        coordinator = _start_actor(CoordinatorActor, config, name=config.coordinator_name, **beside_the_first)
        actors.append(coordinator)
        what = f"service {config.name!r} to start"
        ask(coordinator, "start", timeout_s=ACTOR_START_TIMEOUT_S, what=what)
    except (StepwellError, ValueError):
        _end(actors, config.name)
        raise
    return Service(config, coordinator, shards, owns_ray=owns_ray)


def _place(group: PlacementGroup, bundle: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)


def _start_actor(actor_class: type, *args: Any, strategy: PlacementGroupSchedulingStrategy, **options: Any) -> Any:
    remote_class: Any = ray.remote(actor_class)
    return remote_class.options(scheduling_strategy=strategy, **options).remote(*args)


def _is_news(record: logging.LogRecord) -> bool:
    return "restartable detached actor with a placement group" not in record.getMessage()


def _restore_or_end(service: Service, uri: str) -> None:
    try:
        service.restore(uri)
    except StepwellError:
        service.shutdown()
        raise


def _find_actor(name: str) -> Any | None:
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


def _end(actors: Sequence[Any], name: str) -> None:
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


def _actor_names(prefix: str) -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)]


def _exists(name: str) -> bool:
    """Whether there is anything of a service; the first thing that there is are the places of its shards."""
    return bool(_groups(name) or _actor_names(f"{name}/"))


def _not_found(name: str) -> ServiceNotFoundError:
    return ServiceNotFoundError(
        f"there is no service {name!r} in this cluster; running: {', '.join(service_names()) or 'none'}. "
        f"Start it with `stepwell up {name}`"
    )


def _cut_short(name: str) -> ServiceExistsError:
    return ServiceExistsError(
        f"service {name!r} is being launched, or its launch was cut short; wait, or end it with `stepwell down {name}`"
    )


def describe_for_peers(service: Service) -> dict[str, str]:
    """What another process of this host needs to find ``service``: the cluster's address and the service's name."""
    return {"address": cluster.address(), "name": service.name}


__all__ = ["Service", "connect", "describe_for_peers", "end", "launch", "service_names"]
