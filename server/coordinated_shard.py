"""A shard as its coordinator sees it: what it has the shard do. A shard actor is one that workers reach, too."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch

from ..sharding.checkpoint import CheckpointReader
from ..sharding.compiling import (
    Kernel,
    compiled_code,
    kernel_identity,
    resolve_kernel,
    take_compiled_code,
)
from ..sharding.coverage import Gradients
from ..sharding.errors import IncarnationError, PlacementError
from ..sharding.folder import Destination
from ..sharding.job import JobSpec
from ..sharding.manifest import Manifest, ShardFile
from ..sharding.saved import SavedCheckpoint
from ..sharding.shard import Shard
from ..sharding.snapshot import Snapshot
from ..sharding.warm_up import warm_up
from ..sharding.world import World
from .ahead import Ahead
from .changes import Change, Changes
from .collective import Collective, Generation
from .config import COLLECTIVE_MARGIN_S, ServiceConfig
from .epochs import Fence, change_of_coordinator, of_coordinator
from .knowledge import ShardReport
from .logs import Context, begin_logs
from .mappings import Mappings
from .meeting import Meeting
from .messages import LoadHeader, source_of, unpack_holdings, unpack_job
from .meter import ShardMeter
from .redundancy import Redundancy
from .shard_saves import ShardSaves
from .signals import end_at_sigterm
from .steps import Steps
from .wire import WireValues, values_from_wire
from .workers import Worker, workers_of


class CoordinatedShard:
    """Serves one shard. Every method is called through Ray, by the coordinator, on the actor's event loop.

    Args:
        config: The service's.
        shard: This shard's index.
        is_successor: Whether another actor was this shard before; one that Ray starts again need not be told.
    """

    def __init__(self, config: ServiceConfig, shard: int, is_successor: bool = False) -> None:
        self._config, self._index = config, shard
        self._host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._device = _device(config)
        torch.set_num_threads(max(1, round(config.num_cpus_per_shard)))
        self._meetings: dict[Generation, Meeting] = {}
        self.fence, self._changes = Fence(shard), Changes(shard)
        end_at_sigterm()
        # Not so where a test has an actor in its own process.
        is_again = ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed
        self._was_restarted = is_successor or is_again
        self._redundancy = Redundancy(
            shard,
            log_steps=config.log_steps,
            taken=lambda: self._changes.taken,
            may_come_back=self._was_restarted and config.redundancy > 0,
        )
        self._steps = Steps(shard, config.worker_timeout_s, self._redundancy)
        self._saves = ShardSaves(shard, config.num_shards)
        if ray.is_initialized():
            steps = self._steps
            begin_logs(config.log_format, self._log_context)
            ShardMeter(config.name, shard, steps.tally, lambda: (steps.shard, steps.generation)).begin()
        num_kept = config.log_steps + 2 if config.redundancy else 1
        self._mappings = Mappings(num_kept, are_pinned=self._device.type == "cuda")
        self._ahead = Ahead()
        self._is_in_office = False

    # The coordinator's death; see Note: Epochs

    async def epoch(self) -> int:
        """Of the newest coordinator that this shard has heard of."""
        return self.fence.epoch

    async def begin_epoch(self, epoch: int) -> ShardReport:
        """Obey a new coordinator; its predecessors are refused from now on. Returns what it needs to know.

        What one of them had this shard begin ends first.
        """
        self.fence.begin(epoch)
        async with self.fence.changing:
            return self._report()

    @of_coordinator
    async def report(self) -> ShardReport:
        """What a coordinator needs to know."""
        return self._report()

    # Forming the group; called by the coordinator

    @of_coordinator
    async def join(self, generation: Generation, timeout_s: float, shards: Sequence[Any]) -> None:
        """Leave the last group and form that of ``generation`` with all ``shards``."""
        peers = [shard for index, shard in enumerate(shards) if index != self._index]
        self._steps.leave_group(generation, peers)
        for earlier in [each for each in self._meetings if each < generation]:
            self._meetings.pop(earlier).end()
        meeting = self._meetings.setdefault(generation, Meeting())

        def tell(key: str, value: bytes) -> None:
            for peer in peers:
                peer.meet.remote(generation, key, value)

        meeting.attend(tell, timeout_s)
        collective = await asyncio.get_running_loop().run_in_executor(
            None,
            lambda: Collective(
                generation,
                self._index,
                self._config.num_shards,
                host=self._host,
                meeting=meeting,
                forming_timeout_s=timeout_s,
                timeout_s=self._config.worker_timeout_s + COLLECTIVE_MARGIN_S,
            ),
        )
        self._steps.enter_group(collective)

    async def meet(self, generation: Generation, key: str, value: bytes) -> None:
        """Take what another shard tells of itself for the group of ``generation``; called by that shard.

        It may have been asked to join before this one.
        """
        if generation >= self._steps.newest_generation:
            self._meetings.setdefault(generation, Meeting()).note(key, value)

    @of_coordinator
    async def generation(self) -> Generation:
        """The generation of a group that this shard can use."""
        return self._steps.usable_generation

    # The job and its workers; called by the coordinator

    @of_coordinator
    async def kernel(self) -> Kernel:
        """How passes can run here."""
        kernel: Kernel = await self._steps.compute(lambda: resolve_kernel(self._config.kernel, self._device))
        return kernel

    @of_coordinator
    async def kernel_identity(self, kernel: Kernel) -> str:
        """What the bits of such kernels depend on here."""
        identity: str = await self._steps.compute(lambda: kernel_identity(self._device, kernel))
        return identity

    @of_coordinator
    async def compile(self, job: bytes) -> bytes:
        """Compile a job's kernels; returns their code, for the other shards. Called on shard 0 alone."""
        spec = unpack_job(job)

        def compile_kernels() -> bytes:
            warm_up(spec, self._device)
            return compiled_code()

        code: bytes = await self._steps.compute(compile_kernels)
        return code

    @change_of_coordinator
    async def register(self, job: bytes, code: bytes) -> None:
        """Lay out a job and allocate its buffers; its kernels are compiled already, as ``code``."""
        spec = unpack_job(job)
        await self._steps.compute(lambda: self._lay_out(spec, code, timeline=0))

    @change_of_coordinator
    async def admit(self, workers: Mapping[int, Worker], world: World | None = None) -> None:
        """Let workers' processes push, by rank; all or none. A step that one of them was replaced in ends first.

        Args:
            workers: The workers.
            world: Whom steps wait for then, if that changes; the service is held meanwhile.

        Raises:
            ShardLostError: If that step rests until a lost shard is back.
        """
        self._steps.require_no_rest()
        replaced = self._admit(workers)
        for rank in replaced:
            self._mappings.forget(rank)
            self._ahead.forget(rank)
            told = f"rank {rank}: another process has registered as this rank since; end this one"
            self._steps.withdraw(rank, IncarnationError(told))
        if replaced:
            await self._steps.end_for_successor(self._config.worker_timeout_s + COLLECTIVE_MARGIN_S)
        await self._set_world(world)

    @change_of_coordinator
    async def leave(self, ranks: Sequence[int], world: World | None = None) -> None:
        """Note that workers have said goodbye; ``world`` as for :meth:`admit`."""
        for rank in ranks:
            self._steps.job().members.leave(rank)
        await self._set_world(world)
        await self._steps.copy_at_rest()

    @change_of_coordinator
    async def set_workers(self, world_size: int, gradients: Gradients) -> None:
        """Change number and kind of the workers, all of whom have left; the service is held meanwhile."""
        self._steps.job().set_workers(world_size, gradients)
        await self._copy()

    # Its state; called by the coordinator. See Note: Changes that are all or nothing

    @change_of_coordinator
    async def prepare_load(self, timeline: int, request: str, header: LoadHeader, *parts: WireValues) -> None:
        """Prepare to take a state that workers hold, a part each; it stays in the object store until then."""
        source, shard = source_of(header, map(values_from_wire, parts)), self._steps.job()
        self._changes.prepare(Change(timeline, request, lambda: shard.load(source, timeline=timeline)))

    @change_of_coordinator
    async def prepare_extension(
        self, timeline: int, request: str, job: bytes, workers: Mapping[int, Worker], *parts: WireValues
    ) -> None:
        """Make room for parameters that are added to the job, which the workers then hold as ``workers`` says."""
        spec, source = unpack_job(job), source_of(LoadHeader(), map(values_from_wire, parts))
        shard = self._steps.whole_job()
        await self._steps.compute(lambda: shard.prepare_extension(spec, source))

        def take() -> None:
            shard.adopt_extension(timeline=timeline)
            self._admit(workers)

        self._changes.prepare(Change(timeline, request, take))

    @of_coordinator
    async def verify(self, uri: str, manifest: bytes) -> None:
        """Read this shard's share of a checkpoint and compare it with its digests; steps go on.

        Raises:
            CheckpointError: Naming the first damage.
        """

        def verify() -> None:
            with CheckpointReader(uri, Manifest.unpack(manifest, uri)) as reader:
                reader.require_intact(self._index, self._config.num_shards)

        await asyncio.get_running_loop().run_in_executor(None, verify)

    @change_of_coordinator
    async def prepare_restore(
        self,
        timeline: int,
        request: str,
        uri: str,
        manifest: bytes,
        job: bytes,
        code: bytes,
        workers: Mapping[int, Worker],
        world: World | None,
    ) -> None:
        """Prepare to take the state of a checkpoint that all shards have verified, as ``job``.

        A shard without a job, or cut otherwise, lays it out. Steps then wait for ``world``, or all ranks of the job.
        """
        spec, checkpoint = unpack_job(job), Manifest.unpack(manifest, uri)

        def take() -> None:
            shard = self._steps.shard
            if shard is None or shard.spec != spec:
                self._lay_out(spec, code, timeline=timeline - 1)
                self._admit(workers)
            if world is not None:
                self._steps.job().set_world(world)
            with CheckpointReader(uri, checkpoint) as reader:
                self._steps.job().load(reader.source(), timeline=timeline)

        self._changes.prepare(Change(timeline, request, take))

    @change_of_coordinator
    async def adopt(self, timeline: int) -> None:
        """Take the change that begins ``timeline``; the service is held meanwhile."""
        change = self._changes.pop(timeline)
        await self._steps.load(change.take)
        self._changes.note(change)
        await self._copy()

    # Saves; called by the coordinator. See ShardSaves

    @change_of_coordinator
    async def snapshot(self, save_id: str, to: Destination) -> None:
        """Keep the state for :meth:`save`; the service is held meanwhile."""
        shard = self._steps.whole_job()
        snapshot: Snapshot = await self._steps.compute(shard.snapshot)
        self._saves.keep(save_id, to, shard.spec, snapshot)

    @of_coordinator
    async def save(self, save_id: str, uri: str) -> ShardFile:
        """Write this shard's file of a checkpoint, the state that :meth:`snapshot` kept; steps go on."""
        return await self._saves.write(save_id, uri)

    @change_of_coordinator
    async def complete_save(self, save_id: str, uri: str, files: Sequence[ShardFile]) -> SavedCheckpoint | None:
        """Write the manifest of a checkpoint whose files are there; called on shard 0 alone.

        By a shard, as that knows whether the coordinator which asks for it has been replaced.
        """
        await self._saves.complete(save_id, uri, files)
        return self._saves.saved

    @change_of_coordinator
    async def finish_save(self, save_id: str, saved: SavedCheckpoint | None) -> None:
        """Forget a save, and know which checkpoint was completed last."""
        self._saves.finish(save_id, saved)

    @change_of_coordinator
    async def give_up_save(self, save_id: str, uri: str) -> None:
        """Free what a save keeps, and remove this shard's file of it."""
        await self._saves.give_up(save_id, uri)

    # Within

    async def _set_world(self, world: World | None) -> None:
        """Have steps wait for other ranks, and the keeper know of these and of the workers."""
        shard = self._steps.job()
        if world is None or world == shard.world:
            await self._redundancy.admit(shard)
        else:
            self._steps.set_world(world)
            await self._copy()

    async def _copy(self) -> None:
        """Have the keeper know the state as it is, before anybody is told that it is so."""
        shard = self._steps.job()
        if self._redundancy.is_on and shard.is_whole:
            await self._redundancy.copy_now(shard, await self._steps.compute(lambda: self._redundancy.moment(shard)))

    def _report(self) -> ShardReport:
        shard = self._steps.shard
        workers, left = ({}, frozenset[int]()) if shard is None else workers_of(shard)
        return ShardReport(
            job=None if shard is None else shard.spec,
            status=None if shard is None else shard.status(),
            workers=workers,
            left=left,
            generation=self._steps.usable_generation,
            prepared=self._changes.prepared,
            requests=self._changes.taken,
            saves=self._saves.under_way,
            saved=self._saves.saved,
            was_restarted=self._was_restarted,
            is_in_office=self._is_in_office,
        )

    def _log_context(self) -> Context:
        shard = self._steps.shard
        step, generation = 0 if shard is None else shard.history.num_steps, str(self._steps.generation)
        return {"service": self._config.name, "shard": self._index, "step": step, "generation": generation}

    def _lay_out(self, spec: JobSpec, code: bytes, *, timeline: int) -> None:
        """Make a shard without parameters in place of the one before; in the thread for arithmetic."""
        self._steps.shard = None  # else there would be memory for two
        self._steps.shard = self._laid_out(spec, code, timeline=timeline)

    def _laid_out(self, spec: JobSpec, code: bytes, *, timeline: int) -> Shard:
        self._redundancy.lay_out(code)
        take_compiled_code(code)
        warm_up(spec, self._device)
        config = self._config
        world = World(tuple(range(spec.world_size)), is_elastic=config.elastic, timeout_s=config.worker_timeout_s)
        place = {"shard": self._index, "num_shards": config.num_shards}
        return Shard(spec, **place, device=self._device, timeline=timeline, world=world)

    def _admit(self, workers: Mapping[int, Worker]) -> list[int]:
        """Admit workers; the ranks that have another process now."""
        shard = self._steps.job()
        held = {rank: unpack_holdings(worker.holdings, shard.spec.params) for rank, worker in workers.items()}
        return [rank for rank, worker in workers.items() if shard.admit(rank, worker.incarnation, held[rank])]


def _device(config: ServiceConfig) -> torch.device:
    if config.num_gpus_per_shard == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PlacementError(
            "Ray placed this shard on a GPU, but torch finds no CUDA device there; install a CUDA build of torch"
        )
    return torch.device("cuda", 0)
