"""The coordinator: registers the job and its workers, forms the shards' group, saves and restores.

It is on no step's path and holds nothing that the shards do not know: a step needs the shards alone, and a coordinator
that is started again asks them. See *Note: Epochs* in docs/design.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import ray

from ..sharding.compiling import Kernel
from ..sharding.coverage import require_exact_cover
from ..sharding.errors import (
    CheckpointRestoreNeededError,
    NotRegisteredError,
    ServiceTimeoutError,
    UnknownRankError,
)
from ..sharding.folder import read_complete
from ..sharding.job import JobSpec
from ..sharding.manifest import Manifest, check_restorable, tell_of_other_kernels
from ..sharding.reports import ShardStatus
from .collective import NO_GENERATION, Generation
from .config import NAMESPACE, ServiceConfig
from .knowledge import Knowledge
from .messages import LoadHeader, Registration, pack_job, unpack_job
from .rendezvous import Rendezvous
from .saves import Saves
from .shards import POLL_S, Shards
from .takeover import finish_changes
from .watch import Recovery, Watch
from .workers import Asked, Worker


def end_process() -> None:
    """What a coordinator does that was replaced; if Ray knows no other, it starts the next one."""
    os._exit(1)


class Coordinator:
    """One per service; every method is called through Ray, on its event loop.

    Args:
        config: The service's settings.
        shards: The shards' handles, by index.
        is_first: Whether the service has had no coordinator before.
        resign: Called when the shards obey another coordinator.
    """

    def __init__(
        self,
        config: ServiceConfig,
        shards: Sequence[Any],
        *,
        is_first: bool = True,
        resign: Callable[[], None] = end_process,
    ) -> None:
        self._config, self._is_first = config, is_first
        self._shards = Shards(config, shards, resign=resign)
        self._known = Knowledge()
        self._kernel: Kernel = "eager"
        self._covering = Rendezvous(self._admit_first, what="all ranks to register")
        self._starting = Rendezvous(self._load_parts, what="all ranks to hand in their parameters")
        self._extending = Rendezvous(self._extend, what="all ranks to add a parameter group")
        self._changing = asyncio.Lock()
        self._saves = Saves(self._shards, self._changing, self._require_spec)
        self._taking_over: asyncio.Task[None] | None = None
        self._watch = Watch(config, self._shards, self._changing, lambda: self._known.spec is not None)

    async def start(self) -> None:
        """Take the shards over, if that was not done yet: all else waits for it.

        Raises:
            ShardLostError: If a shard cannot be reached; the next call tries again.
        """
        task = self._taking_over
        if task is None or (task.done() and task.exception() is not None):
            self._taking_over = task = asyncio.create_task(self._take_over())
        await asyncio.shield(task)

    async def describe(self) -> tuple[ServiceConfig, list[Any]]:
        """The settings and the shards' handles."""
        return self._config, self._shards.handles

    async def register(self, job: bytes, rank: int, incarnation: str, holdings: bytes) -> Registration:
        """Register a worker; the first one's job is the service's, every other must be the same.

        With a sharded model it returns when all ranks are in and cover every parameter exactly once. Else it returns as
        soon as rank 0 may send its parameters; other ranks wait with :meth:`wait_for_timeline`.

        Raises:
            JobMismatchError: Naming the first difference.
            CoverageError: If the ranks leave a gap, or overlap.
            UnknownRankError: If the rank is not below the world size.
        """
        await self.start()
        spec, worker = self._as_served(unpack_job(job)), Worker(incarnation, holdings)
        if not 0 <= rank < spec.world_size:
            raise UnknownRankError(f"expected a rank from 0 to {spec.world_size - 1}, got {rank}")
        async with self._changing:
            await self._adopt(spec, rank)
            self._extending.forget(rank)
            if spec.gradients != "sharded" or self._known.workers.keys() >= set(range(spec.world_size)) - {rank}:
                return await self._admit({rank: worker})
        timeout_s = self._config.worker_timeout_s
        return await self._covering.arrive(rank, worker, world_size=spec.world_size, timeout_s=timeout_s)

    async def wait_for_timeline(self, after: int, timeout_s: float) -> Registration:
        """Wait until the service is on a later timeline than ``after``: what other ranks do while rank 0 loads."""
        await self.start()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._known.timeline <= after or not self._known.is_loaded:
            if asyncio.get_running_loop().time() > deadline:
                raise ServiceTimeoutError(f"rank 0 did not load its state within {timeout_s:g} s")
            await asyncio.sleep(POLL_S)
        async with self._changing:
            return await self._registration()

    async def refresh(self) -> Registration:
        """Where the service stands now."""
        await self.start()
        async with self._changing:
            if not self._known.is_loaded:
                raise NotRegisteredError(f"service {self._config.name!r} has no job yet")
            return await self._registration()

    async def load(self, values: Sequence[Any], header: LoadHeader, request: str) -> Registration:
        """Load a state that rank 0 holds, beginning a new timeline.

        Args:
            values: References to its parts, passed on to the shards.
            header: The small part of the state.
            request: Names this load; who asks again gets it once.

        Raises:
            ServiceTimeoutError: If a rank does not register in time.
        """
        await self.start()
        if self._known.is_loaded:
            await self._await_ranks()
        async with self._changing:
            if request not in self._known.requests:
                await self._change("prepare_load", header, *values, request=request, rest=self._shards.stop)
            return await self._registration()

    async def hand_in(self, rank: int, values: Sequence[Any]) -> Registration:
        """Load the first parameters of a sharded model, of which each rank hands in its part.

        A process that took a rank's place after all had handed in gets what was loaded.
        """
        await self.start()
        async with self._changing:
            if self._known.is_loaded:
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
        await self.start()
        spec = unpack_job(job)
        async with self._changing:
            ours = self._require_spec()
            if (len(spec.params), spec.num_groups) == (len(ours.params), ours.num_groups):
                ours.require_same(spec, whose=f"rank {rank}")
                return await self._registration()
        asked, world_size, timeout_s = Asked(spec, holdings, values), ours.world_size, self._config.worker_timeout_s
        return await self._extending.arrive(rank, asked, world_size=world_size, timeout_s=timeout_s)

    async def restore(self, uri: str, request: str) -> Registration:
        """Load a checkpoint, beginning a new timeline; without a job yet, the checkpoint's own.

        All of it is read and compared with its digests while steps go on; so damage changes nothing.

        Args:
            uri: Where it is.
            request: Names this restore; who asks again gets it once.
        """
        await self.start()
        async with self._changing:
            if request not in self._known.requests:
                manifest = await asyncio.to_thread(read_complete, uri)
                await self._restore(self._spec_of(manifest, uri), uri, manifest.pack(), request)
                tell_of_other_kernels(manifest, (await self._shards.statuses())[0].kernel_identity, uri)
            return await self._registration()

    async def begin_save(self, save_id: str, uri: str, keep_last: int | None = None) -> tuple[bool, str, int]:
        """Keep the state as it is between two steps, and begin to write it while steps go on.

        Saves are written one after the other: this waits for the one before. Ranks that ask for the same one, between
        the same two steps, get it written once.

        Args:
            save_id: Names this save; who asks again gets it once.
            uri: The checkpoint's folder; or that of the run's checkpoints.
            keep_last: In the latter case, how many of them stay.

        Returns:
            Whether to wait for it with :meth:`end_save`, as it was not there already; the checkpoint's URI; and the
            number of steps in it.
        """
        await self.start()
        return await self._saves.begin(save_id, uri, keep_last)

    async def end_save(self, save_id: str, uri: str) -> None:
        """Wait until the checkpoint is complete."""
        await self.start()
        await self._saves.end(save_id, uri)

    async def status(
        self,
    ) -> tuple[ServiceConfig, JobSpec | None, Generation, int, list[ShardStatus | None], tuple[int, Recovery | None]]:
        """Settings, job, generation, epoch, every shard's status, and how often and how shards were brought back."""
        await self.start()
        shards, watch = await self._shards.statuses_now(), self._watch
        recoveries = watch.num_recoveries, watch.last_recovery
        return self._config, self._known.spec, self._shards.generation, self._shards.epoch, shards, recoveries

    async def leave(self, rank: int) -> None:
        """A worker says goodbye."""
        await self.start()
        async with self._changing:
            self._known.left.add(rank)
            if rank in self._known.workers:
                await self._shards.in_turn("leave", rank, what="the shards to note that a worker left")

    async def wait_until_left(self, ranks: Sequence[int], timeout_s: float) -> bool:
        """Wait until all of ``ranks`` have said goodbye; whether they did within ``timeout_s``."""
        await self.start()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not self._known.left.issuperset(ranks):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True

    async def _take_over(self) -> None:
        """Learn from the shards where the service stands, and bring to an end what another coordinator began."""
        shards = self._shards
        reports = await shards.claim()
        try:
            if any(report.job is None and report.was_restarted for report in reports):
                await self._watch.bring_back()
                reports = await shards.all("report", what="the shards to tell what they know")
            reports = await finish_changes(shards, reports)
            self._known = Knowledge.of(reports, is_first=self._is_first)
            if self._known.spec is None:
                kernels = await shards.all("kernel", what="the shards to look for a compiler")
                self._kernel = "eager" if "eager" in kernels else "compiled"
            else:
                self._kernel = self._known.spec.kernel
            if shards.generation == NO_GENERATION:
                await shards.form_group()
            await self._saves.take_over(reports)
        finally:
            await shards.release()
        self._watch.begin()

    # The job and its workers

    async def _await_ranks(self) -> None:
        """Wait until all ranks are here: each of them loads, and one that came after would wait for another load."""
        deadline = asyncio.get_running_loop().time() + self._config.worker_timeout_s
        while missing := set(range(self._require_spec().world_size)) - (self._known.workers.keys() - self._known.left):
            if asyncio.get_running_loop().time() > deadline:
                raise ServiceTimeoutError(
                    f"rank {min(missing)} did not register within {self._config.worker_timeout_s:g} s; "
                    "every rank makes its optimizer and loads the state dict"
                )
            await asyncio.sleep(POLL_S)

    async def _adopt(self, spec: JobSpec, rank: int) -> None:
        known = self._known
        if known.spec is None:
            if known.is_lost:
                raise CheckpointRestoreNeededError(
                    f"all processes of service {self._config.name!r} were started again, and its state, if it had any, "
                    "is gone. Restore its last checkpoint with service.restore(URI); or end it and launch it anew"
                )
            job, code = pack_job(spec), await self._compile(spec)
            await self._shards.all("register", job, code, what="the shards to allocate their buffers")
            known.spec = spec
            return
        if known.left.issuperset(known.workers) and self._covering.is_empty:
            # The workers before these have all left; what they held says nothing of these.
            known.workers, known.left = {}, set()
            wanted = dataclasses.replace(known.spec, world_size=spec.world_size, gradients=spec.gradients)
            if wanted != known.spec:
                what = "the shards to take the workers"
                await self._shards.in_turn("set_workers", spec.world_size, spec.gradients, what=what)
                known.spec = wanted
        known.spec.require_same(spec, whose=f"rank {rank}")

    async def _admit(self, workers: Mapping[int, Worker]) -> Registration:
        """Admit workers, of a sharded model if they and those that are here make it up."""
        known, ranks = self._known, ", ".join(map(str, sorted(workers)))
        _require_cover(self._require_spec(), {**known.workers, **workers})
        await self._shards.in_turn("admit", workers, what=f"the shards to admit rank {ranks}")
        known.workers.update(workers)
        known.left.difference_update(workers)
        return await self._registration()

    async def _admit_first(self, workers: Mapping[int, Worker]) -> Registration:
        async with self._changing:
            return await self._admit(workers)

    def _as_served(self, spec: JobSpec) -> JobSpec:
        """A job with what the service decides about it."""
        return dataclasses.replace(spec, chunk_numel=self._config.chunk_numel, kernel=self._kernel)

    async def _compile(self, spec: JobSpec) -> bytes:
        """A job's compiled kernels; empty if they are not compiled."""
        if spec.kernel != "compiled":
            return b""
        # By one shard: those beside it would do the same at the same time, and a new one finds the code here.
        code: bytes = await self._shards.first("compile", pack_job(spec), what="shard 0 to compile the kernels")
        return code

    async def _registration(self) -> Registration:
        spec, status = self._require_spec(), (await self._shards.statuses())[0]
        return Registration(
            spec=pack_job(spec),
            timeline=status.timeline,
            sequence=status.sequence,
            step=status.step,
            skipped_steps=status.skipped_steps,
            scalars=status.scalars,
            needs_parameters=not self._known.is_loaded,
        )

    def _require_spec(self) -> JobSpec:
        if self._known.spec is None:
            raise NotRegisteredError(f"service {self._config.name!r} has no job yet; start a training script first")
        return self._known.spec

    # Its state

    async def _change(
        self, prepare: str, *args: Any, request: str, rest: Callable[[], Awaitable[object]], spec: JobSpec | None = None
    ) -> None:
        """Change the state on all shards, or on none: see *Note: Changes that are all or nothing*.

        Args:
            prepare: The shards' method that prepares it.
            args: What that takes behind timeline and request.
            request: Names what was asked for.
            rest: Brings the shards to rest; they stay held.
            spec: The job afterwards, if it changes too.
        """
        known, timeline = self._known, self._known.timeline + 1
        try:
            await self._shards.all(prepare, timeline, request, *args, what="the shards to prepare a new state")
            await rest()
            known.timeline = timeline
            await self._shards.all("adopt", timeline, what="the shards to take the new state")
            known.spec = spec or known.spec
        finally:
            await self._shards.release()
        known.is_loaded = True
        known.requests.append(request)

    async def _load_parts(self, parts: Mapping[int, Sequence[Any]]) -> Registration:
        return await self.load([value for rank in sorted(parts) for value in parts[rank]], LoadHeader(), _new_request())

    async def _extend(self, asked: Mapping[int, Asked]) -> Registration:
        async with self._changing:
            first, known = asked[0].spec, self._known
            for rank in sorted(asked):
                first.require_same(asked[rank].spec, whose=f"rank {rank}")
            spec = self._require_spec().extended(first)
            workers = {
                rank: dataclasses.replace(each, holdings=asked[rank].holdings) for rank, each in known.workers.items()
            }
            _require_cover(spec, workers)
            values = [value for rank in sorted(asked) for value in asked[rank].values]
            args, request = (pack_job(spec), workers, *values), _new_request()
            await self._change("prepare_extension", *args, request=request, rest=self._shards.settle, spec=spec)
            known.workers = workers
            return await self._registration()

    def _spec_of(self, manifest: Manifest, uri: str) -> JobSpec:
        """The job with which a checkpoint is restored, laid out as the checkpoint's was.

        What was registered together fixes the order of sums.
        """
        if self._known.spec is None:
            return self._as_served(manifest.spec)
        check_restorable(manifest, self._known.spec, uri)
        return dataclasses.replace(self._known.spec, batches=manifest.spec.batches)

    async def _restore(self, spec: JobSpec, uri: str, manifest: bytes, request: str) -> None:
        await self._shards.await_restarts()
        await self._shards.all("verify", uri, manifest, what=f"the shards to verify {uri}")
        is_new = spec != self._known.spec or None in await self._shards.statuses_now()
        code = await self._compile(spec) if is_new else b""
        args = uri, manifest, pack_job(spec), code, self._known.workers
        await self._change("prepare_restore", *args, request=request, rest=self._shards.stop, spec=spec)


class CoordinatorActor(Coordinator):
    """A coordinator as a Ray actor: it takes the shards over whenever it is started, whether anybody calls or not."""

    def __init__(self, config: ServiceConfig) -> None:
        # Not handed over: many handles would lie in the object store, and be lost with the process that launched it.
        names = map(config.shard_name, range(config.num_shards))
        shards = [ray.get_actor(name, namespace=NAMESPACE) for name in names]
        context = ray.get_runtime_context()
        super().__init__(config, shards, is_first=not context.was_current_actor_reconstructed)
        context.current_actor.start.remote()


def _new_request() -> str:
    return uuid.uuid4().hex


def _require_cover(spec: JobSpec, workers: Mapping[int, Worker]) -> None:
    """See that the workers of a sharded model push every element exactly once; of any other there is nothing to see."""
    if spec.gradients == "sharded":
        require_exact_cover(spec.params, {rank: worker.held(spec) for rank, worker in workers.items()})
