"""Shards without tensors: they answer their coordinator as real ones do, with replies of the same size.

So the real coordinator serves a thousand of them and thousands of workers in one process. What a call costs in Ray is
not in here: calls are counted.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepwell.server.changes import Change, Changes
from stepwell.server.collective import NO_GENERATION, Generation
from stepwell.server.config import ServiceConfig
from stepwell.server.coordinator import Coordinator
from stepwell.server.epochs import Fence, change_of_coordinator, of_coordinator
from stepwell.server.knowledge import ShardReport
from stepwell.server.messages import LoadHeader, unpack_job
from stepwell.server.shard_saves import SaveUnderWay
from stepwell.server.workers import Worker
from stepwell.sharding.buffers import MASTER
from stepwell.sharding.compiling import Kernel
from stepwell.sharding.coverage import Gradients
from stepwell.sharding.folder import Destination, write_manifest
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import Layout
from stepwell.sharding.manifest import FileEntry, ShardFile, build_manifest, shard_file_name
from stepwell.sharding.reports import ShardStatus
from stepwell.sharding.saved import SavedCheckpoint
from stepwell.sharding.world import World


class Traffic:
    """The calls from a coordinator to its shards.

    Attributes:
        calls: How many of each kind.
    """

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()

    @property
    def num_calls(self) -> int:
        """All of them."""
        return self.calls.total()


class Handle:
    """A shard's handle, as Ray gives it: every method has ``remote``."""

    def __init__(self, shard: SimulatedShard, traffic: Traffic) -> None:
        self._shard, self._traffic = shard, traffic

    def __getattr__(self, name: str) -> Remote:
        remote = Remote(getattr(self._shard, name), name, self._traffic)
        self.__dict__[name] = remote
        return remote


class Remote:
    """A method of a shard."""

    def __init__(self, method: Callable[..., Any], name: str, traffic: Traffic) -> None:
        self._method, self._name, self._traffic = method, name, traffic

    def remote(self, *args: Any) -> asyncio.Future[Any]:
        """Call it."""
        self._traffic.calls[self._name] += 1
        answer: asyncio.Future[Any] = asyncio.ensure_future(self._method(*args))
        return answer


@dataclasses.dataclass(slots=True)
class Job:
    """A job as all shards have it; each real one works it out for itself."""

    packed: bytes
    spec: JobSpec
    layout: Layout


class SimulatedService:
    """The real coordinator, and shards without tensors.

    Args:
        num_shards: Shards.

    Attributes:
        traffic: Calls so far.
        coordinator: The coordinator.
        job: The job, once it was registered.
    """

    def __init__(self, num_shards: int) -> None:
        self.config = ServiceConfig("simulated", num_shards=num_shards, kernel="eager", redundancy=0)
        self.traffic, self.job = Traffic(), None  # type: Traffic, Job | None
        handles = [Handle(SimulatedShard(index, self), self.traffic) for index in range(num_shards)]
        self.coordinator = Coordinator(self.config, handles, resign=_never)

    def lay_out(self, packed: bytes) -> Job:
        """A job that a shard was given."""
        if self.job is None or self.job.packed != packed:
            spec = unpack_job(packed)
            self.job = Job(packed, spec, spec.layout())
        return self.job


class SimulatedShard:
    """One shard; see :class:`stepwell.server.coordinated_shard.CoordinatedShard` for what its methods mean."""

    def __init__(self, index: int, service: SimulatedService) -> None:
        self._index, self._service = index, service
        self.fence, self._changes = Fence(index), Changes(index)
        self._job: Job | None = None
        self._workers: dict[int, Worker] = {}
        self._left: set[int] = set()
        self._timeline = 0
        self._generation = NO_GENERATION
        self._saves: dict[str, SaveUnderWay] = {}

    async def epoch(self) -> int:
        return self.fence.epoch

    async def begin_epoch(self, epoch: int) -> ShardReport:
        self.fence.begin(epoch)
        return self._report()

    @of_coordinator
    async def report(self) -> ShardReport:
        return self._report()

    @of_coordinator
    async def join(self, generation: Generation, timeout_s: float, shards: Sequence[Any]) -> None:
        assert len(shards) == self._service.config.num_shards
        self._generation = generation

    @of_coordinator
    async def generation(self) -> Generation:
        return self._generation

    @of_coordinator
    async def kernel(self) -> str:
        return "eager"

    @of_coordinator
    async def kernel_identity(self, kernel: Kernel) -> str:
        return "simulated"

    @change_of_coordinator
    async def register(self, job: bytes, code: bytes) -> None:
        self._job = self._service.lay_out(job)

    @change_of_coordinator
    async def admit(self, workers: Mapping[int, Worker]) -> None:
        self._workers.update(workers)
        self._left.difference_update(workers)

    @change_of_coordinator
    async def leave(self, ranks: Sequence[int]) -> None:
        self._left.update(ranks)

    @change_of_coordinator
    async def set_workers(self, world_size: int, gradients: Gradients) -> None:
        self._workers = {}

    @change_of_coordinator
    async def prepare_load(self, timeline: int, request: str, header: LoadHeader, *parts: object) -> None:
        self._changes.prepare(Change(timeline, request, lambda: None))

    @change_of_coordinator
    async def adopt(self, timeline: int) -> None:
        self._changes.note(self._changes.pop(timeline))
        self._timeline = timeline

    @of_coordinator
    async def hold(self) -> int:
        return 0

    @of_coordinator
    async def settle(self, sequence: int, timeout_s: float) -> ShardStatus:
        return self._status()

    @of_coordinator
    async def end_step(self, timeout_s: float) -> None:
        """There is none."""

    @of_coordinator
    async def release(self) -> None:
        self._changes.drop()

    @change_of_coordinator
    async def snapshot(self, save_id: str, to: Destination) -> None:
        self._saves[save_id] = SaveUnderWay(to.uri, 0)

    @of_coordinator
    async def save(self, save_id: str, uri: str) -> ShardFile:
        """What a real one tells of its file: each piece of each slot."""
        assert self._job is not None
        pieces, size_bytes = [], 0
        for slot in (MASTER, *self._job.spec.rule.slots):
            for extent in self._job.layout.extents:
                tiles = extent.tile_range(self._index, self._service.config.num_shards)
                for piece in extent.pieces(tiles, slot.stride):
                    pieces.append((piece.param, slot.name, piece.offset, piece.numel, 0))
                    size_bytes += piece.numel * slot.dtype(extent.dtype).itemsize
        name = shard_file_name(save_id, self._index, self._service.config.num_shards)
        return ShardFile(FileEntry(name, size_bytes + 4096, 0), tuple(pieces))

    @change_of_coordinator
    async def complete_save(self, save_id: str, uri: str, files: Sequence[ShardFile]) -> SavedCheckpoint | None:
        assert self._job is not None
        write_manifest(uri, build_manifest(self._job.spec, files, self._status()))
        return None

    @change_of_coordinator
    async def finish_save(self, save_id: str) -> None:
        self._saves.pop(save_id)

    @change_of_coordinator
    async def give_up_save(self, save_id: str, uri: str) -> None:
        self._saves.pop(save_id)

    async def status(self) -> ShardStatus | None:
        return None if self._job is None else self._status()

    def _status(self) -> ShardStatus:
        assert self._job is not None
        return ShardStatus(
            shard=self._index,
            timeline=self._timeline,
            sequence=0,
            step=0,
            skipped_steps=0,
            size_bytes=0,
            kernel_identity="simulated",
            scalars=self._job.spec.rule.initial_scalars(self._job.spec.num_groups),
            step_counts=(),
            in_flight=False,
            world=World(tuple(range(self._job.spec.world_size))),
        )

    def _report(self) -> ShardReport:
        return ShardReport(
            job=None if self._job is None else self._job.spec,
            status=None if self._job is None else self._status(),
            workers=dict(self._workers),
            left=frozenset(self._left),
            generation=self._generation,
            prepared=self._changes.prepared,
            requests=self._changes.taken,
            saves=dict(self._saves),
            saved=None,
            was_restarted=False,
        )


def _never() -> None:
    raise AssertionError("there is one coordinator")
