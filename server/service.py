"""A service: launching one, finding one, and what one does with it."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any, Literal, overload

import ray

from ..sharding.chronicle import Columns
from ..sharding.compiling import KernelChoice
from ..sharding.errors import StepwellError
from ..sharding.folder import Checkpoint, list_checkpoints, require_keep_last
from ..sharding.pending_save import PendingSave
from . import cluster
from .calls import ask, wait_for
from .config import Placement, ServiceConfig, default_kernel, default_log_format
from .knowledge import ServiceStatus
from .resizing import ShardSet
from .shard_sets import find_actor, find_node
from .shards import FORMING_TIMEOUT_S, STATE_TIMEOUT_S
from .starting import cut_short, end_service, exists, not_found, service_names, start_actors


class Service:
    """A running service. :func:`launch` and :func:`connect` make it; as a context manager it shuts down on exit.

    Attributes:
        config: Its settings.
        coordinator: Handle of its coordinator actor.
        shards: Handles of its shard actors.
    """

    def __init__(
        self,
        config: ServiceConfig,
        coordinator: Any,
        shards: list[Any],
        *,
        owns_ray: bool = False,
        started: ShardSet | None = None,
    ) -> None:
        self.config, self.coordinator, self.shards = config, coordinator, shards
        self._owns_ray = owns_ray
        self._pending: PendingSave | None = None
        # Only held: without a name the actors end when the handles are gone with which they were started.
        self._started = started

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
            ``restarts``; ``elastic``; ``redundancy``: ``wanted`` keepers of each shard, and for each of the ``shards``
            what those have, by number: ``step`` of the copy, ``copied_at`` in seconds since 1970, ``num_logged`` steps
            after it, ``size_bytes``; ``standby``: how many spares are ``wanted`` and ``ready``; ``recoveries`` of
            shards since: their ``count``, and of the ``last`` one the ``seconds`` by part, see
            :class:`stepwell.server.recoveries.Recovery`; with a job also ``rule``, ``world_size``, the ``ranks`` that
            the next step waits for, ``excluded`` (rank to the step from which on the job goes on without it),
            ``num_params``, ``numel``, ``step``, ``skipped_steps``, ``sequence``, ``timeline``, ``scalars``, ``kernel``
            and ``size_bytes`` per shard.
        """
        found: ServiceStatus = self.ask("status", what="its status")
        config, spec, shards = found.config, found.spec, found.shards
        fields: dict[str, Any] = {
            "name": config.name,
            "num_shards": config.num_shards,
            "generation": str(found.generation),
            "epoch": found.epoch,
            "restarts": found.epoch - 1,
            "elastic": config.elastic,
            "redundancy": {"wanted": config.redundancy, "shards": found.redundancy()},
            "standby": {"wanted": config.standby, "ready": found.num_spares_ready},
            "recoveries": dataclasses.asdict(found.recoveries),
        }
        if spec is None or shards[0] is None:
            return {**fields, "rule": None, "step": 0}
        first = shards[0]
        return {
            **fields,
            "rule": spec.rule.name,
            "world_size": first.world.size,
            "ranks": list(first.world.ranks),
            "excluded": dict(first.world.excluded),
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

    def history(self, last: int | None = None) -> Columns:
        """What each step brought, from the first on that led to the present state.

        When there are about a thousand rows every second one goes, and so on: the whole run stays, at a coarser grain,
        and the last step always. Begins with this service: a checkpoint holds none of it.

        Args:
            last: How many rows, from the end; None for all.

        Returns:
            A list for each column, NaN where it is not known. ``step``; ``time_s`` (Unix time); ``timeline``,
            ``sequence`` and ``skipped_steps`` so far; how many ``workers``; ``loss``, if
            :meth:`stepwell.ServiceOptimizer.report` was told; ``grad_norm``, if a limit is set; ``lr``, and the rule's
            scalars such as ``d``, with several groups ``lr[0]``, ...; seconds of the first shard by phase:
            ``gather_s``, ``log_s``, ``vote_s``, ``reduce_s``, ``apply_s``. Empty before the first step.

        Raises:
            ServiceError: If the first shard does not answer.
        """
        _, (first, *_) = self.ask("describe", what="its shards")  # others than before, it may be
        what = f"service {self.name!r}: its history"
        columns: Columns = wait_for([first.chronicle.remote(last)], timeout_s=FORMING_TIMEOUT_S, what=what)[0]
        return columns

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

    def dismiss_workers(self) -> None:
        """Let others take the place of workers that ended without a goodbye: killed, or lost with their node.

        Called by one process, when the old ones are gone and before any of the next ones makes its optimizer; those
        may be of another number, in a service that is not elastic too. A step that the old ones had all pushed for is
        taken; what some of them have pushed for the step after it is dropped. Should one of them be alive still, it
        is refused.

        Raises:
            NotRegisteredError: If there is no job yet, and so nobody to dismiss.
            CheckpointRestoreNeededError: If the service has lost its state; restore a checkpoint, then call this.
            ShardLostError: If a shard is being brought back; call this again.
        """
        self.ask("dismiss", what="the workers to be dismissed")

    def resize(self, num_shards: int) -> None:
        """Go on with another number of shards, between two steps: parameters and state are the same to the bit.

        Called by one process, at any time. The new shards start beside the present ones, while steps go on; then all
        of the state goes over, and the present ones end. Workers see a pause and a line in the log.

        Raises:
            PlacementError: If the cluster has no room for the new shards beside the present ones. Nothing has changed.
            ServiceError: If the new shards could not take over, or the service has no name. Nothing has changed.
            NotRegisteredError: If the job has no parameters yet. Nothing has changed.
            ValueError: If ``num_shards`` is less than 1.
        """
        dataclasses.replace(self.config, num_shards=num_shards)  # checks it
        self.ask("resize", num_shards, (), uuid.uuid4().hex, what=f"{num_shards} new shards to take over")
        self.find_shards()

    def drain(self, node: str) -> bool:
        """Move the shards of a node to others, between two steps, as for :meth:`resize`; the node may go then.

        Nodes that Ray is told to drain (``ray drain-node``, an autoscaler's or a cloud's notice) are left without being
        asked for. Called by one process, at any time.

        Args:
            node: The node's id in Ray, the beginning of that, its address or its host's name.

        Returns:
            Whether there were any shards on it.

        Raises:
            PlacementError: If there is no such node, or no room on others. Nothing has changed.
            ServiceError, NotRegisteredError: As for :meth:`resize`.
        """
        what = f"shards to move away from node {node}"
        moved: bool = self.ask("drain", find_node(node), uuid.uuid4().hex, what=what)
        self.find_shards()
        return moved

    def find_shards(self) -> list[Any]:
        """Handles of the shards that the service has now, which are :attr:`shards` then."""
        self.config, self.shards = self.ask("locate", what="its shards")
        return self.shards

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
        end_service(self.name)
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
    standby: int = 0,
    elastic: bool = False,
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
        redundancy: How many keepers, processes beside the shards, hold a copy of each shard's state and the last steps'
            gradients in memory, on other nodes where shards are on several: with 1 or 2, what a shard holds survives
            the shard. 0: a shard that dies takes the service back to its last checkpoint.
        standby: How many spares, processes that have loaded what a shard needs and take a lost one's place at once,
            where a shard would be waited for that Ray starts again. Takes ``redundancy``; not for shards on GPUs.
        elastic: Whether workers may join and leave between steps, for gradients that are local to ranks. A worker that
            does not push within ``worker_timeout_s`` is then excluded and the step taken without it; else the step is
            given up on all, with a :class:`MissingRankError` that names it. See *Note: Elastic jobs* in docs/design.md.

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
        standby=standby,
        elastic=elastic,
        log_format=default_log_format(),
    )
    owns_ray = name is None and not ray.is_initialized()
    if owns_ray:
        cluster.start_embedded(num_cpus=max(1, round(num_shards * num_cpus_per_shard)))
    else:
        cluster.attach()
    try:
        coordinator, started = start_actors(config)
        service = Service(config, coordinator, started.shards, owns_ray=owns_ray, started=started)
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
    coordinator = find_actor(f"{name}/coordinator")
    if coordinator is None:
        raise cut_short(name) if exists(name) else not_found(name)
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
    if not exists(name):
        raise not_found(name)
    end_service(name)


def _restore_or_end(service: Service, uri: str) -> None:
    try:
        service.restore(uri)
    except StepwellError:
        service.shutdown()
        raise


__all__ = ["Service", "connect", "end", "launch", "service_names"]
