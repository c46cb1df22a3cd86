"""The coordinator: registers the job and its workers, forms the shards' group, saves and restores.

It is on no step's path and holds nothing that the shards do not know: a step needs the shards alone, and a coordinator
that is started again asks them. See *Note: Epochs* in docs/design.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import ray

from ..sharding.errors import ServiceTimeoutError, ShardLostError
from ..sharding.folder import read_complete
from ..sharding.job import JobSpec
from ..sharding.manifest import Manifest, check_restorable, tell_of_other_kernels
from ..sharding.saved import SavedCheckpoint
from .adopting import Adoption
from .collective import NO_GENERATION
from .config import ServiceConfig
from .draining import Draining
from .keepers import Keepers
from .knowledge import Knowledge, ServiceStatus
from .logs import Context, begin_logs
from .messages import LoadHeader, Registration, pack_job, unpack_job
from .resizing import OneSet, Resizing, ShardSets
from .roster import Roster
from .saves import Saves
from .shard_sets import SetsInRay
from .shards import POLL_S, Shards
from .standby import Standby
from .takeover import finish_changes
from .two_phase import change_state
from .watch import RETRY_S, Watch
from .workers import Worker

logger = logging.getLogger("stepwell")


def end_process() -> None:
    """What a coordinator does that was replaced; if Ray knows no other, it starts the next one."""
    os._exit(1)


class Coordinator:
    """One per service; every method is called through Ray, on its event loop.

    Args:
        config: The service's settings.
        shards: The shards' handles, by index.
        keepers: The keepers', by index.
        spares: The spares'; where there are some the shards may have changed places with them.
        is_first: Whether the service has had no coordinator before.
        sets: Where other sets of shards come from; None if there are none but these.
        resign: Called when the shards obey another coordinator.
    """

    def __init__(
        self,
        config: ServiceConfig,
        shards: Sequence[Any],
        *,
        keepers: Sequence[Any] = (),
        spares: Sequence[Any] = (),
        is_first: bool = True,
        sets: ShardSets | None = None,
        resign: Callable[[], None] = end_process,
    ) -> None:
        self._config, self._is_first = config, is_first
        self._shards = Shards(config, shards, resign=resign, spares=spares)
        self._keepers = Keepers(keepers, self._shards, config.redundancy)
        self._changing = asyncio.Lock()
        self._roster = Roster(config, self._shards, self._changing, self.load)
        self._saves = Saves(self._shards, self._changing, self._roster.require_spec)
        self._taking_over: asyncio.Task[None] | None = None
        sets = sets or OneSet()
        self._adoption = Adoption(self._shards, self._keepers, sets)
        self._watch = Watch(
            config, self._shards, self._keepers, self._changing, self._what_is_there, self._adoption.place_lost
        )
        self._resizing = Resizing(
            self._shards,
            self._keepers,
            sets,
            saves=self._saves,
            watch=self._watch,
            changing=self._changing,
            known=lambda: self._known,
            resign=resign,
        )
        self._draining = Draining(self._resizing, sets)
        self._standby = Standby(self._shards, sets.states, lambda: self._known.spec)

    @property
    def _known(self) -> Knowledge:
        return self._roster.known

    async def start(self) -> None:
        """Take the shards over, if that was not done yet: all else waits for it.

        Raises:
            ShardLostError: If a shard cannot be reached; the next call tries again.
        """
        task = self._taking_over
        if task is None or (task.done() and task.exception() is not None):
            self._taking_over = task = asyncio.create_task(self._take_over())
        await asyncio.shield(task)

    async def persist(self) -> None:
        """Take the shards over, again if one is lost meanwhile; called by the actor itself, as nobody else may call."""
        while True:
            try:
                await self.start()
            except (ShardLostError, ServiceTimeoutError) as error:
                logger.warning("service %r: its shards are not taken over: %s", self._config.name, error)
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def describe(self) -> tuple[ServiceConfig, list[Any]]:
        """The settings and the shards' handles, at once."""
        return self._shards.config, self._shards.handles

    async def locate(self) -> tuple[ServiceConfig, list[Any]]:
        """As :meth:`describe`, once no others are about to take their place."""
        await self.start()
        await self._standby.until_seated()
        async with self._changing:
            return await self.describe()

    async def register(self, job: bytes, rank: int, incarnation: str, holdings: bytes) -> Registration:
        """Register a worker; the first one's job is the service's, every other must be the same.

        With a sharded model it returns when all ranks are in and cover every parameter exactly once. Else it returns as
        soon as rank 0 may send its parameters; other ranks wait with :meth:`wait_for_timeline`.

        A rank that is new in an elastic job is waited for from the next step on.

        Raises:
            JobMismatchError: Naming the first difference.
            CoverageError: If the ranks leave a gap, or overlap.
            UnknownRankError: If the rank is not below the world size.
        """
        await self.start()
        return await self._roster.register(job, rank, Worker(incarnation, holdings))

    async def wait_for_timeline(self, after: int, timeout_s: float) -> Registration:
        """Wait until the service is on a later timeline than ``after``: what other ranks do while rank 0 loads."""
        await self.start()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._known.timeline <= after or not self._known.is_loaded:
            if asyncio.get_running_loop().time() > deadline:
                raise ServiceTimeoutError(f"rank 0 did not load its state within {timeout_s:g} s")
            await asyncio.sleep(POLL_S)
        return await self._roster.tell()

    async def refresh(self, rank: int, incarnation: str) -> Registration:
        """Where the service stands now; an elastic job that goes on without this worker waits for it again."""
        await self.start()
        return await self._roster.refresh(rank, incarnation)

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
            await self._roster.await_ranks()
        async with self._changing:
            if request not in self._known.requests:
                rest = self._shards.stop
                await change_state(
                    self._shards, self._known, "prepare_load", header, *values, request=request, rest=rest
                )
            return await self._roster.registration()

    async def hand_in(self, rank: int, values: Sequence[Any]) -> Registration:
        """Load the first parameters of a sharded model, of which each rank hands in its part.

        A process that took a rank's place after all had handed in gets what was loaded.
        """
        await self.start()
        return await self._roster.hand_in(rank, values)

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
        return await self._roster.extend(unpack_job(job), rank, holdings, values)

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
            return await self._roster.registration()

    async def resize(self, num_shards: int, avoid: Sequence[str], request: str) -> None:
        """Go on with other shards, see :meth:`Resizing.to`."""
        await self.start()
        await self._resizing.to(num_shards, request, avoid)

    async def drain(self, node: str, request: str) -> bool:
        """Go on without shards on a node, see :meth:`Resizing.leave`."""
        await self.start()
        return await self._resizing.leave([node], request)

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

    async def status(self) -> ServiceStatus:
        """Where the service stands."""
        await self.start()
        return ServiceStatus(
            self._shards.config,
            self._known.spec,
            self._shards.generation,
            self._shards.epoch,
            await self._shards.statuses_now(),
            await self._keepers.holdings(),
            self._watch.recoveries,
            await self._standby.num_ready(),
        )

    async def leave(self, rank: int, incarnation: str) -> None:
        """A worker says goodbye; from the next step on an elastic job does not wait for it."""
        await self.start()
        await self._roster.leave(rank, incarnation)

    async def dismiss(self) -> None:
        """Note that all workers are gone, without a goodbye; others, of any number, may register then.

        Raises:
            NotRegisteredError: If there is no job yet.
            CheckpointRestoreNeededError: If there is no state to go on with.
            ShardLostError: If a shard is being brought back.
        """
        await self.start()
        await self._roster.dismiss()

    async def wait_until_left(self, ranks: Sequence[int], timeout_s: float) -> bool:
        """Wait until all of ``ranks`` have said goodbye; whether they did within ``timeout_s``."""
        await self.start()
        return await self._roster.wait_until_left(ranks, timeout_s)

    async def _take_over(self) -> None:
        """Learn from the shards where the service stands, and bring to an end what another coordinator began."""
        shards = self._shards
        await self._resizing.decide()
        if shards.config.redundancy:
            await self._adoption.place_lost()
        reports = await shards.claim()
        try:
            self._roster.known = Knowledge.of(reports, is_first=self._is_first)
            self._saves.learn(reports)
            await self._keepers.arrange()
            if any(report.job is None and report.was_restarted for report in reports):
                await self._watch.bring_back()
                reports = await shards.all("report", what="the shards to tell what they know")
            reports = await finish_changes(shards, reports)
            await self._roster.take_over(Knowledge.of(reports, is_first=self._is_first))
            if shards.generation == NO_GENERATION:
                await shards.form_group()
            await self._saves.take_over(reports)
        finally:
            await shards.release()
        self._watch.begin()
        self._standby.begin()
        if shards.config.detached:
            self._draining.begin()

    def _what_is_there(self) -> tuple[bool, SavedCheckpoint | None]:
        """Whether there is a job, or was one as far as is known, and the last checkpoint that was saved of it."""
        return self._known.spec is not None or self._known.is_lost, self._saves.saved

    def _spec_of(self, manifest: Manifest, uri: str) -> JobSpec:
        """The job with which a checkpoint is restored, laid out as the checkpoint's was.

        What was registered together fixes the order of sums.
        """
        if self._known.spec is None:
            return self._roster.as_served(manifest.spec)
        check_restorable(manifest, self._known.spec, uri)
        return dataclasses.replace(self._known.spec, batches=manifest.spec.batches)

    async def _restore(self, spec: JobSpec, uri: str, manifest: bytes, request: str) -> None:
        await self._shards.await_restarts()
        await self._shards.all("verify", uri, manifest, what=f"the shards to verify {uri}")
        is_new = spec != self._known.spec or None in await self._shards.statuses_now()
        code = await self._roster.compile(spec) if is_new else b""
        args = uri, manifest, pack_job(spec), code, self._known.workers, await self._roster.world()
        rest = self._shards.stop
        await change_state(self._shards, self._known, "prepare_restore", *args, request=request, rest=rest, spec=spec)


class CoordinatorActor(Coordinator):
    """A coordinator as a Ray actor: it takes the shards over whenever it is started, whether anybody calls or not."""

    def __init__(self, config: ServiceConfig) -> None:
        # Not handed over: many handles would lie in the object store, and be lost with the process that launched it.
        context, sets = ray.get_runtime_context(), SetsInRay(config)
        oldest = next(found for found in sets.found_now() if found.is_whole)
        is_first = not context.was_current_actor_reconstructed
        super().__init__(
            oldest.config, oldest.shards, keepers=oldest.keepers, spares=oldest.spares, is_first=is_first, sets=sets
        )
        begin_logs(oldest.config.log_format, self._log_context)
        context.current_actor.persist.remote()

    def _log_context(self) -> Context:
        epoch, generation = self._shards.epoch, str(self._shards.generation)
        return {"service": self._config.name, "coordinator": epoch, "generation": generation}
