"""The coordinator: registers the job and its workers, forms the shards' group, saves and restores.

It is on no step's path and holds nothing that the shards do not know: a step needs the shards alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ..sharding.compiling import Kernel
from ..sharding.coverage import require_exact_cover
from ..sharding.errors import (
    CoverageError,
    NotRegisteredError,
    ServiceError,
    ServiceTimeoutError,
    ShardLostError,
    StepwellError,
    UnknownRankError,
)
from ..sharding.folder import Destination, read_complete
from ..sharding.job import JobSpec
from ..sharding.manifest import build_manifest, check_restorable, tell_of_other_kernels
from ..sharding.reports import ShardStatus
from ..sharding.saved import SavedCheckpoint
from .calls import gather
from .config import ServiceConfig
from .messages import LoadHeader, Registration, pack_job, unpack_job
from .rendezvous import Rendezvous
from .workers import Asked, Worker

FORMING_TIMEOUT_S = 60.0
STATE_TIMEOUT_S = 1800.0
"""Limit for operations that move the whole state."""
RESTART_TIMEOUT_S = 120.0
HOLD_TRIES = 3
POLL_S = 0.05


class Coordinator:
    """One per service; every method is called through Ray, on its event loop.

    Args:
        config: The service's settings.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._shards: list[Any] = []
        self._generation = 0
        self._kernel: Kernel = "eager"
        self._spec: JobSpec | None = None
        self._timeline = 0
        self._loaded = asyncio.Event()
        self._saved: SavedCheckpoint | None = None
        self._workers: dict[int, Worker] = {}
        self._left: set[int] = set()
        self._covering = Rendezvous(self._require_first_cover, what="all ranks to register")
        self._starting = Rendezvous(self._load_parts, what="all ranks to hand in their parameters")
        self._extending = Rendezvous(self._extend, what="all ranks to add a parameter group")
        self._changing = asyncio.Lock()
        self._saving, self._written = asyncio.Lock(), asyncio.Event()
        self._written.set()
        self._saves: dict[str, asyncio.Task[None]] = {}

    async def start(self, shards: Sequence[Any]) -> None:
        """Take the shards and form their group; called once, by the launcher."""
        self._shards = list(shards)
        kernels = await self._all("kernel", what="the shards to look for a compiler")
        self._kernel = "eager" if "eager" in kernels else "compiled"
        await self._form_group()

    async def describe(self) -> tuple[ServiceConfig, list[Any]]:
        """The settings and the shards' handles."""
        return self._config, self._shards

    async def register(self, job: bytes, rank: int, incarnation: str, holdings: bytes) -> Registration:
        """Register a worker; the first one's job is the service's, every other must be the same.

        With a sharded model it returns when all ranks are in and cover every parameter exactly once. Else it returns as
        soon as rank 0 may send its parameters; other ranks wait with :meth:`wait_for_timeline`.

        Raises:
            JobMismatchError: Naming the first difference.
            CoverageError: If the ranks leave a gap, or overlap.
            UnknownRankError: If the rank is not below the world size.
        """
        spec = self._as_served(unpack_job(job))
        if not 0 <= rank < spec.world_size:
            raise UnknownRankError(f"expected a rank from 0 to {spec.world_size - 1}, got {rank}")
        async with self._changing:
            await self._adopt(spec, rank)
            self._workers[rank] = Worker(incarnation, holdings)
            self._left.discard(rank)
            self._extending.forget(rank)
            await self._admit(rank)
        if spec.gradients == "sharded":
            await self._cover(rank, spec.world_size)
        async with self._changing:
            return await self._registration()

    async def wait_for_timeline(self, after: int, timeout_s: float) -> Registration:
        """Wait until the service is on a later timeline than ``after``: what other ranks do while rank 0 loads."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._timeline <= after or not self._loaded.is_set():
            if asyncio.get_running_loop().time() > deadline:
                raise ServiceTimeoutError(f"rank 0 did not load its state within {timeout_s:g} s")
            await asyncio.sleep(POLL_S)
        async with self._changing:
            return await self._registration()

    async def refresh(self) -> Registration:
        """Where the service stands now."""
        async with self._changing:
            if not self._loaded.is_set():
                raise NotRegisteredError(f"service {self._config.name!r} has no job yet")
            return await self._registration()

    async def load(self, values: Sequence[Any], header: LoadHeader) -> Registration:
        """Load a state that rank 0 holds, beginning a new timeline.

        Args:
            values: References to its parts, passed on to the shards.
            header: The small part of the state.

        Raises:
            ServiceTimeoutError: If a rank does not register in time.
        """
        if self._loaded.is_set():
            await self._await_ranks()
        async with self._changing:
            try:
                await self._all("hold", what="the shards to come to rest")
                if self._loaded.is_set():
                    # Ends what a shard may be at: a step in which it waits for others that will not begin it any more.
                    await self._form_group()
                self._timeline += 1
                await self._all("load", header, self._timeline, *values, what="the shards to take the state")
            finally:
                await self._all("release", what="the shards to go on")
            self._loaded.set()
            return await self._registration()

    async def hand_in(self, rank: int, values: Sequence[Any]) -> Registration:
        """Load the first parameters of a sharded model, of which each rank hands in its part.

        A process that took a rank's place after all had handed in gets what was loaded.
        """
        async with self._changing:
            if self._loaded.is_set():
                return await self._registration()
        spec, timeout_s = self._require_spec(), self._config.worker_timeout_s
        return await self._starting.arrive(rank, values, world_size=spec.world_size, timeout_s=timeout_s)

    async def extend(self, job: bytes, rank: int, holdings: bytes, values: Sequence[Any]) -> Registration:
        """Add parameters to the job, once every rank has asked for it; begins a new timeline.

        A rank that asks again, as it did not hear that they were added, is told so at once.

        Args:
            job: The job with the added group.
            rank: Who asks.
            holdings: What the rank holds of all parameters.
            values: References to the added parameters' values, or this rank's part of them.

        Raises:
            JobMismatchError: If it does not begin with the present job, or the ranks differ.
        """
        spec = unpack_job(job)
        async with self._changing:
            ours = self._require_spec()
            if (len(spec.params), spec.num_groups) == (len(ours.params), ours.num_groups):
                ours.require_same(spec, whose=f"rank {rank}")
                return await self._registration()
        asked, world_size, timeout_s = Asked(spec, holdings, values), ours.world_size, self._config.worker_timeout_s
        return await self._extending.arrive(rank, asked, world_size=world_size, timeout_s=timeout_s)

    async def restore(self, uri: str) -> Registration:
        """Load a checkpoint, beginning a new timeline; without a job yet, the checkpoint's own.

        All of it is read and compared with its digests while steps go on; so damage changes nothing.
        """
        async with self._changing:
            manifest = await asyncio.to_thread(read_complete, uri)
            if self._spec is not None:
                check_restorable(manifest, self._spec, uri)
            await self._await_restarts()
            packed = manifest.pack()
            await self._all("verify", uri, packed, what=f"the shards to verify {uri}")
            if self._spec is None:
                await self._lay_out(self._as_served(manifest.spec))
            try:
                await self._all("hold", what="the shards to come to rest")
                await self._mend()
                await self._take_batches(manifest.spec)
                self._timeline += 1
                await self._all("restore", uri, packed, self._timeline, what=f"the shards to read {uri}")
            finally:
                await self._all("release", what="the shards to go on")
            self._loaded.set()
            tell_of_other_kernels(manifest, (await self._statuses())[0].kernel_identity, uri)
            return await self._registration()

    async def begin_save(self, uri: str, keep_last: int | None = None) -> tuple[str, str, int]:
        """Keep the state as it is between two steps, and begin to write it while steps go on.

        Saves are written one after the other: this waits for the one before. Ranks that ask for the same one, between
        the same two steps, get it written once.

        Args:
            uri: The checkpoint's folder; or that of the run's checkpoints.
            keep_last: In the latter case, how many of them stay.

        Returns:
            A name for :meth:`end_save`, the checkpoint's URI, and the number of steps in it.
        """
        async with self._saving:
            await self._written.wait()
            async with self._changing:
                spec, save_id = self._require_spec(), uuid.uuid4().hex[:12]
                try:
                    status = await self._settle()
                    to = Destination.of(uri, keep_last, status.step)
                    if self._saved is None or not await asyncio.to_thread(self._saved.serves, to.uri, spec, status):
                        await self._all("snapshot", save_id, what="the shards to keep their state")
                        self._written.clear()
                        self._saves[save_id] = asyncio.create_task(self._write(save_id, to, spec, status))
                finally:
                    await self._all("release", what="the shards to go on")
            return save_id, to.uri, status.step

    async def end_save(self, save_id: str) -> None:
        """Wait until the checkpoint is complete; to be called once."""
        save = self._saves.pop(save_id, None)
        if save is not None:  # else a checkpoint that was there already served
            await save

    async def status(self) -> tuple[ServiceConfig, JobSpec | None, int, list[ShardStatus | None]]:
        """Settings, job, generation and every shard's status."""
        shards = await self._all("status", what="the shards' status", timeout_s=FORMING_TIMEOUT_S)
        return self._config, self._spec, self._generation, shards

    async def leave(self, rank: int) -> None:
        """A worker says goodbye."""
        self._left.add(rank)

    async def wait_until_left(self, ranks: Sequence[int], timeout_s: float) -> bool:
        """Wait until all of ``ranks`` have said goodbye; whether they did within ``timeout_s``."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not self._left.issuperset(ranks):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True

    # Within

    async def _write(self, save_id: str, to: Destination, spec: JobSpec, status: ShardStatus) -> None:
        """Have the shards write what they keep for a save, then the manifest."""
        is_complete = False
        try:
            files = await self._all("save", save_id, to.uri, what=f"the shards to write {to.uri}")
            manifest = build_manifest(spec, files, status)
            async with self._changing:  # a restore of a checkpoint that this one replaces may be reading its files
                await asyncio.to_thread(to.complete, manifest)
            is_complete = True
            self._saved = await asyncio.to_thread(SavedCheckpoint.just_written, to.uri, spec, status)
        finally:
            if not is_complete:
                with contextlib.suppress(StepwellError):  # what made the save fail is the news
                    await self._all("give_up_save", save_id, to.uri, what="the shards to give the save up")
            self._written.set()

    async def _await_ranks(self) -> None:
        """Wait until all ranks are here: each of them loads, and one that came after would wait for another load."""
        deadline = asyncio.get_running_loop().time() + self._config.worker_timeout_s
        while missing := set(range(self._require_spec().world_size)) - (self._workers.keys() - self._left):
            if asyncio.get_running_loop().time() > deadline:
                raise ServiceTimeoutError(
                    f"rank {min(missing)} did not register within {self._config.worker_timeout_s:g} s; "
                    "every rank makes its optimizer and loads the state dict"
                )
            await asyncio.sleep(POLL_S)

    async def _adopt(self, spec: JobSpec, rank: int) -> None:
        if self._spec is None:
            await self._lay_out(spec)
            return
        if self._left.issuperset(self._workers):
            # The workers before these have all left; what they held says nothing of these.
            self._workers, self._left = {}, set()
            wanted = dataclasses.replace(self._spec, world_size=spec.world_size, gradients=spec.gradients)
            if wanted != self._spec:
                self._spec = wanted
                await self._all("set_workers", spec.world_size, spec.gradients, what="the shards to take the workers")
        self._spec.require_same(spec, whose=f"rank {rank}")

    async def _cover(self, rank: int, world_size: int) -> None:
        """See that the ranks' parts make up the model, once all are known."""
        if len(self._workers) == world_size and self._covering.is_empty:
            try:
                _require_cover(self._require_spec(), self._workers)
            except CoverageError:
                del self._workers[rank]  # the others train on
                raise
        else:
            await self._covering.arrive(rank, None, world_size=world_size, timeout_s=self._config.worker_timeout_s)

    async def _require_first_cover(self, _: Mapping[int, None]) -> None:
        try:
            _require_cover(self._require_spec(), self._workers)
        except CoverageError:
            self._workers = {}
            raise

    async def _load_parts(self, parts: Mapping[int, Sequence[Any]]) -> Registration:
        return await self.load([value for rank in sorted(parts) for value in parts[rank]], LoadHeader())

    async def _extend(self, asked: Mapping[int, Asked]) -> Registration:
        async with self._changing:
            first = asked[0].spec
            for rank in sorted(asked):
                first.require_same(asked[rank].spec, whose=f"rank {rank}")
            await self._take_extension(self._require_spec().extended(first), asked)
            return await self._registration()

    async def _take_extension(self, spec: JobSpec, asked: Mapping[int, Asked]) -> None:
        workers = {
            rank: dataclasses.replace(worker, holdings=asked[rank].holdings) for rank, worker in self._workers.items()
        }
        _require_cover(spec, workers)
        values = [value for rank in sorted(asked) for value in asked[rank].values]
        try:
            await self._settle()
            await self._all("prepare_extension", pack_job(spec), *values, what="the shards to make room")
            self._spec, self._workers, self._timeline = spec, workers, self._timeline + 1
            await self._all("adopt_extension", self._timeline, what="the shards to take the added parameters")
            for rank in self._workers:
                await self._admit(rank)
        finally:
            await self._all("release", what="the shards to go on")

    async def _take_batches(self, theirs: JobSpec) -> None:
        """Lay the job out as a checkpoint's was: what was registered together fixes the order of sums."""
        spec = self._require_spec()
        if theirs.batches != spec.batches:
            await self._lay_out(dataclasses.replace(spec, batches=theirs.batches))
            for rank in self._workers:
                await self._admit(rank)

    def _as_served(self, spec: JobSpec) -> JobSpec:
        """A job with what the service decides about it."""
        return dataclasses.replace(spec, chunk_numel=self._config.chunk_numel, kernel=self._kernel)

    async def _lay_out(self, spec: JobSpec) -> None:
        job, code = pack_job(spec), b""
        if spec.kernel == "compiled":
            # By one shard: those beside it would do the same at the same time, and a new one finds the code here.
            compiling = self._shards[0].compile.remote(job)
            code = (await gather([compiling], timeout_s=STATE_TIMEOUT_S, what="shard 0 to compile the kernels"))[0]
        await self._all("register", job, code, what="the shards to allocate their buffers")
        self._spec = spec

    async def _registration(self) -> Registration:
        spec, status = self._require_spec(), (await self._statuses())[0]
        return Registration(
            spec=pack_job(spec),
            timeline=status.timeline,
            sequence=status.sequence,
            step=status.step,
            skipped_steps=status.skipped_steps,
            scalars=status.scalars,
            needs_parameters=not self._loaded.is_set(),
        )

    async def _statuses(self) -> list[ShardStatus]:
        """Every shard's status, after the same step; they end one at different moments.

        Raises:
            ShardLostError: If one was restarted, or they have parted.
        """
        deadline = asyncio.get_running_loop().time() + FORMING_TIMEOUT_S
        while True:
            statuses = await self._all("status", what="the shards' status")
            if None in statuses:
                raise ShardLostError(
                    f"shard {statuses.index(None)} of {len(statuses)} was restarted and its state is gone; "
                    "restore the service from its last checkpoint with service.restore(URI)"
                )
            if len({(status.timeline, status.sequence) for status in statuses}) == 1:
                return statuses
            is_moving = any(status.in_flight for status in statuses)
            if not is_moving or asyncio.get_running_loop().time() > deadline:
                raise ShardLostError(
                    f"the shards are at different steps: {[status.sequence for status in statuses]}; "
                    "restore the service from its last checkpoint with service.restore(URI)"
                )
            await asyncio.sleep(POLL_S)

    async def _form_group(self) -> None:
        self._generation += 1
        opening = self._shards[0].open_store.remote(FORMING_TIMEOUT_S)
        store = (await gather([opening], timeout_s=FORMING_TIMEOUT_S, what="shard 0 to open a store"))[0]
        await self._all(
            "join", self._generation, store, FORMING_TIMEOUT_S, self._shards, what="the shards to form their group"
        )

    async def _await_restarts(self) -> None:
        """Wait for shards that are being started again; calls to them fail at once."""
        deadline = asyncio.get_running_loop().time() + RESTART_TIMEOUT_S
        while True:
            try:
                await self._all("status", what="the shards to be started again")
            except ShardLostError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(POLL_S)
            else:
                return

    async def _mend(self) -> None:
        """Form the group anew; give the job back to shards that were restarted."""
        await self._form_group()
        if None in await self._all("status", what="the shards' status"):
            await self._lay_out(self._require_spec())
            for rank in self._workers:
                await self._admit(rank)

    async def _admit(self, rank: int) -> None:
        worker = self._workers[rank]
        await self._all("admit", rank, worker.incarnation, worker.holdings, what=f"the shards to admit rank {rank}")

    async def _settle(self) -> ShardStatus:
        """Bring all shards to rest after the same step; they stay held."""
        for _ in range(HOLD_TRIES):
            target = max(await self._all("hold", what="the shards to come to rest"))
            timeout_s = self._config.worker_timeout_s
            statuses: list[ShardStatus] = await self._all(
                "settle", target, timeout_s, what="the shards to come to rest", timeout_s=timeout_s + FORMING_TIMEOUT_S
            )
            if len({status.sequence for status in statuses}) == 1:
                return statuses[0]
        raise ServiceError("the shards did not come to rest after the same step; try the save again")

    async def _all(self, method: str, *args: Any, what: str, timeout_s: float = STATE_TIMEOUT_S) -> list[Any]:
        calls = [getattr(shard, method).remote(*args) for shard in self._shards]
        return await gather(calls, timeout_s=timeout_s, what=what)

    def _require_spec(self) -> JobSpec:
        if self._spec is None:
            raise NotRegisteredError(f"service {self._config.name!r} has no job yet; start a training script first")
        return self._spec


def _require_cover(spec: JobSpec, workers: Mapping[int, Worker]) -> None:
    """See that the workers of a sharded model push every element exactly once; of any other there is nothing to see."""
    if spec.gradients == "sharded":
        require_exact_cover(spec.params, {rank: worker.held(spec) for rank, worker in workers.items()})
