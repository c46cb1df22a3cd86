"""The job and its workers: who registers, adds to the job, leaves, and what they have to wait for."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from ..sharding.compiling import Kernel, require_same_kernels
from ..sharding.coverage import require_exact_cover
from ..sharding.errors import (
    CheckpointRestoreNeededError,
    JobMismatchError,
    NotRegisteredError,
    ServiceTimeoutError,
    StepwellError,
    UnknownRankError,
)
from ..sharding.job import JobSpec
from ..sharding.world import World
from .config import ServiceConfig
from .knowledge import Knowledge
from .messages import LoadHeader, Registration, pack_job, unpack_job
from .rendezvous import Rendezvous
from .shards import POLL_S, Shards
from .together import Together
from .two_phase import change_state
from .workers import Arrival, Asked, Worker


class Roster:
    """The coordinator's part of it; lives on its event loop.

    Args:
        config: The service's settings.
        shards: The shards.
        changing: Held by what changes the job or its state.
        load: Loads a state: its parts, the small part, and what names the request.

    Attributes:
        known: What the coordinator knows of the service.
        kernel: How passes run.
    """

    def __init__(
        self,
        config: ServiceConfig,
        shards: Shards,
        changing: asyncio.Lock,
        load: Callable[[Sequence[Any], LoadHeader, str], Awaitable[Registration]],
    ) -> None:
        self._config, self._shards, self._changing, self._load = config, shards, changing, load
        self.known = Knowledge()
        self.kernel: Kernel = "eager"
        self._arriving = Together[Arrival, Registration | None](changing, self._register)
        self._telling = Together[None, Registration](changing, self._tell)
        self._leaving = Together[tuple[int, str], None](changing, self._leave)
        self._covering = Rendezvous(self._admit_all, what="all ranks to register")
        self._starting = Rendezvous(self._load_parts, what="all ranks to hand in their parameters")
        self._extending = Rendezvous(self._extend, what="all ranks to add a parameter group")

    async def take_over(self, known: Knowledge) -> None:
        """Go on from what the shards know."""
        self.known = known
        if known.spec is None:
            kernels = await self._shards.all("kernel", what="the shards to look for a compiler")
            self.kernel = "eager" if "eager" in kernels else "compiled"
        else:
            self.kernel = known.spec.kernel

    async def register(self, job: bytes, rank: int, worker: Worker) -> Registration:
        """See :meth:`Coordinator.register`."""
        told = await self._arriving.ask(Arrival(job, rank, worker))
        if told is not None:
            return told
        ranks, timeout_s = range(self.require_spec().world_size), self._config.worker_timeout_s
        return await self._covering.arrive(rank, worker, ranks=ranks, timeout_s=timeout_s)

    async def tell(self) -> Registration:
        """Where the service stands now.

        Raises:
            NotRegisteredError: If there is nothing to tell.
        """
        return await self._telling.ask(None)

    async def refresh(self, rank: int, incarnation: str) -> Registration:
        """See :meth:`Coordinator.refresh`."""
        if self._config.elastic:
            async with self._changing:
                if self._is_admitted(rank, incarnation) and rank not in self.known.left:
                    what = f"rank {rank} to be back"
                    await self._tell_shards("admit", {}, change=lambda world: world.joined(rank), what=what)
        return await self.tell()

    async def hand_in(self, rank: int, values: Sequence[Any]) -> Registration:
        """See :meth:`Coordinator.hand_in`."""
        async with self._changing:  # a load that is under way ends first
            is_loaded = self.known.is_loaded
        if is_loaded:
            return await self.tell()
        ranks, timeout_s = range(self.require_spec().world_size), self._config.worker_timeout_s
        return await self._starting.arrive(rank, values, ranks=ranks, timeout_s=timeout_s)

    async def extend(self, spec: JobSpec, rank: int, holdings: bytes, values: Sequence[Any]) -> Registration:
        """See :meth:`Coordinator.extend`."""
        async with self._changing:
            ours, ranks = self.require_spec(), await self._ranks()
            spec = self._sized(spec)
            if (len(spec.params), spec.num_groups) == (len(ours.params), ours.num_groups):
                ours.require_same(spec, whose=f"rank {rank}")
                return await self.registration()
        asked, timeout_s = Asked(spec, holdings, values), self._config.worker_timeout_s
        return await self._extending.arrive(rank, asked, ranks=ranks, timeout_s=timeout_s)

    async def leave(self, rank: int, incarnation: str) -> None:
        """See :meth:`Coordinator.leave`. What another process says that had this rank before changes nothing."""
        await self._leaving.ask((rank, incarnation))

    async def dismiss(self) -> None:
        """See :meth:`Coordinator.dismiss`."""
        async with self._changing:
            if self.known.spec is None and self.known.is_lost:
                raise self._lost()
            self.require_spec()
            if self.known.is_loaded:
                try:
                    await self._shards.all("require_whole", what="the shards to tell whether they have a state")
                except NotRegisteredError as error:
                    raise CheckpointRestoreNeededError(f"service {self._config.name!r}: {error}") from error
            await self._shards.in_turn("dismiss", what="the shards to dismiss the workers")
            self.known.left.update(self.known.workers)
            for rendezvous in (self._covering, self._starting, self._extending):
                rendezvous.forget_all()

    async def wait_until_left(self, ranks: Sequence[int], timeout_s: float) -> bool:
        """See :meth:`Coordinator.wait_until_left`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not self.known.left.issuperset(ranks):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True

    async def await_ranks(self) -> None:
        """Wait until all ranks are here: each of them loads, and one that came after would wait for another load."""
        deadline = asyncio.get_running_loop().time() + self._config.worker_timeout_s
        while missing := set(await self._ranks()) - (self.known.workers.keys() - self.known.left):
            if asyncio.get_running_loop().time() > deadline:
                raise ServiceTimeoutError(
                    f"rank {min(missing)} did not register within {self._config.worker_timeout_s:g} s; "
                    "every rank makes its optimizer and loads the state dict"
                )
            await asyncio.sleep(POLL_S)

    async def registration(self) -> Registration:
        """Where the service stands, as a worker is told."""
        spec, status = self.require_spec(), (await self._shards.statuses())[0]
        return Registration.of(spec, status, needs_parameters=not self.known.is_loaded)

    def require_spec(self) -> JobSpec:
        """The job.

        Raises:
            NotRegisteredError: If there is none yet.
        """
        if self.known.spec is None:
            raise NotRegisteredError(f"service {self._config.name!r} has no job yet; start a training script first")
        return self.known.spec

    def as_served(self, spec: JobSpec) -> JobSpec:
        """A job with what the service decides about it."""
        return dataclasses.replace(spec, chunk_numel=self._config.chunk_numel, kernel=self.kernel)

    async def compile(self, spec: JobSpec) -> bytes:
        """A job's compiled kernels; empty if they are not compiled.

        Raises:
            KernelError: If they cannot be, or the shards are on machines of different kinds.
        """
        identities = await self._shards.all("kernel_identity", spec.kernel, what="the shards to tell of their kernels")
        for shard, identity in enumerate(identities):
            require_same_kernels(identities[0], identity, whose=f"shard {shard}")
        if spec.kernel != "compiled":
            return b""
        # By one shard: those beside it would do the same at the same time, and a new one finds the code here.
        code: bytes = await self._shards.first("compile", pack_job(spec), what="shard 0 to compile the kernels")
        return code

    async def world(self) -> World | None:
        """The ranks that the next step waits for; None if no shard knows, as all were started again."""
        statuses = [status for status in await self._shards.statuses_now() if status is not None]
        newest = max(statuses, key=lambda of: (of.timeline, of.sequence), default=None)
        return None if newest is None else newest.world

    # Within

    async def _tell(self, asked: Sequence[None]) -> Sequence[Registration | StepwellError]:
        if not self.known.is_loaded:
            raise NotRegisteredError(f"service {self._config.name!r} has no job yet")
        return [await self.registration()] * len(asked)

    async def _leave(self, goodbyes: Sequence[tuple[int, str]]) -> Sequence[None]:
        known = self.known
        ranks = [rank for rank, process in goodbyes if rank not in known.workers or self._is_admitted(rank, process)]
        known.left.update(ranks)
        if here := sorted(known.workers.keys() & set(ranks)):
            await self._tell_shards(
                "leave",
                here,
                change=lambda world: functools.reduce(World.left, here, world),
                what="the shards to note that workers left",
            )
        return [None] * len(goodbyes)

    async def _register(self, arrivals: Sequence[Arrival]) -> Sequence[Registration | StepwellError | None]:
        """Register those who came together, job by job.

        Returns:
            For each what it is told, an error, or None if it is to wait for the other ranks.
        """
        told: dict[int, Registration | StepwellError | None] = {}
        by_job: dict[bytes, list[int]] = {}
        for place, arrival in enumerate(arrivals):
            by_job.setdefault(arrival.job, []).append(place)
        for job, places in by_job.items():
            try:
                told.update(await self._register_same(unpack_job(job), {place: arrivals[place] for place in places}))
            except StepwellError as error:
                told.update(dict.fromkeys(places, error))
        return [told[place] for place in range(len(arrivals))]

    async def _register_same(
        self, spec: JobSpec, arrivals: Mapping[int, Arrival]
    ) -> dict[int, Registration | StepwellError | None]:
        """Those with one job; by the place of each."""
        spec, told = self.as_served(spec), dict[int, Registration | StepwellError | None]()
        known = {place: each for place, each in arrivals.items() if 0 <= each.rank < spec.world_size}
        for place in arrivals.keys() - known.keys():
            expected = f"expected a rank from 0 to {spec.world_size - 1}"
            told[place] = UnknownRankError(f"{expected}, got {arrivals[place].rank}")
        if not known:
            return told
        if self._config.elastic:
            self._require_elastic(spec)
        await self._adopt(spec, min(each.rank for each in known.values()))
        for each in known.values():
            self._extending.forget(each.rank)
        if spec.gradients != "sharded":
            registration = await self._admit({each.rank: each.worker for each in known.values()})
            return {**told, **dict.fromkeys(known, registration)}
        for place, each in known.items():
            told[place] = await self._register_sharded(spec, each)
        return told

    async def _register_sharded(self, spec: JobSpec, arrival: Arrival) -> Registration | StepwellError | None:
        """A rank that takes a lost one's place, which has to hold what the others leave over; others wait for all."""
        if not self.known.workers.keys() >= set(range(spec.world_size)) - {arrival.rank}:
            return None
        try:
            return await self._admit({arrival.rank: arrival.worker})
        except StepwellError as error:
            return error

    def _require_elastic(self, spec: JobSpec) -> None:
        if spec.gradients != "local":
            raise JobMismatchError(
                f"service {self._config.name!r} is elastic, which needs gradients='local': of others a rank that is "
                f"missing takes its part with it. Got gradients={spec.gradients!r}; leave DDP's or FSDP's wrapper off, "
                "or launch the service with elastic=False"
            )

    async def _ranks(self) -> Collection[int]:
        world = await self.world() if self._config.elastic else None
        return range(self.require_spec().world_size) if world is None else world.ranks

    async def _gone(self) -> set[int]:
        """Ranks that have said goodbye, and those that an elastic job goes on without."""
        world = await self.world() if self._config.elastic else None
        return self.known.left if world is None else self.known.left | world.excluded.keys()

    def _is_admitted(self, rank: int, incarnation: str) -> bool:
        return rank in self.known.workers and self.known.workers[rank].incarnation == incarnation

    async def _tell_shards(self, method: str, *args: Any, change: Callable[[World], World], what: str) -> None:
        """Tell the shards of workers, the first one before the others; in an elastic job between two steps.

        Args:
            method: The shards' method.
            args: What it takes before the world.
            change: From the world before to that of an elastic job after it.
            what: Names the wait in messages.
        """
        if not self._config.elastic:
            await self._shards.in_turn(method, *args, what=what)
            return
        try:
            if self.known.is_loaded:
                await self._shards.settle()
            world = (await self._shards.statuses())[0].world
            await self._shards.in_turn(method, *args, change(world), what=what)
        finally:
            await self._shards.release()

    def _sized(self, spec: JobSpec) -> JobSpec:
        """A worker's job, where an elastic one is of no certain size."""
        ours = self.known.spec
        if ours is None or not self._config.elastic:
            return spec
        return dataclasses.replace(spec, world_size=ours.world_size)

    async def _adopt(self, spec: JobSpec, rank: int) -> None:
        known = self.known
        if known.spec is None:
            if known.is_lost:
                raise self._lost()
            job, code = pack_job(spec), await self.compile(spec)
            await self._shards.all("register", job, code, what="the shards to allocate their buffers")
            known.spec = spec
            return
        if known.workers.keys() <= await self._gone() and self._covering.is_empty:
            # The workers before these have all left; what they held says nothing of these.
            known.workers, known.left = {}, set()
            wanted = dataclasses.replace(known.spec, world_size=spec.world_size, gradients=spec.gradients)
            if wanted != known.spec or self._config.elastic:
                await self._set_workers(wanted)
        sized = self._sized(spec)
        if sized.world_size != known.spec.world_size:
            here = ", ".join(map(str, sorted(known.workers.keys() - await self._gone()))) or "none"
            raise JobMismatchError(
                f"world_size: the service has {known.spec.world_size}, rank {rank} has {spec.world_size}. Others may "
                f"be of another number once all of these have left; ranks that have not: {here}. If their processes "
                "are gone, call service.dismiss_workers() once, before any of the others makes its optimizer"
            )
        known.spec.require_same(sized, whose=f"rank {rank}")

    def _lost(self) -> CheckpointRestoreNeededError:
        return CheckpointRestoreNeededError(
            f"all processes of service {self._config.name!r} were started again, and its state, if it had any, "
            "is gone. Restore its last checkpoint with service.restore(URI); or end it and launch it anew"
        )

    async def _set_workers(self, spec: JobSpec) -> None:
        try:
            await self._shards.stop()
            what = "the shards to take the workers"
            await self._shards.in_turn("set_workers", spec.world_size, spec.gradients, what=what)
            self.known.spec = spec
        finally:
            await self._shards.release()

    async def _admit(self, workers: Mapping[int, Worker]) -> Registration:
        """Admit workers, of a sharded model if they and those that are here make it up."""
        known, who = self.known, f"{len(workers)} workers, rank {min(workers)} among them"
        _require_cover(self.require_spec(), {**known.workers, **workers})
        await self._tell_shards(
            "admit",
            workers,
            change=lambda world: functools.reduce(World.joined, workers, world),
            what=f"the shards to admit {who}",
        )
        known.workers.update(workers)
        known.left.difference_update(workers)
        return await self.registration()

    async def _admit_all(self, workers: Mapping[int, Worker]) -> Registration:
        async with self._changing:
            return await self._admit(workers)

    async def _load_parts(self, parts: Mapping[int, Sequence[Any]]) -> Registration:
        values = [value for rank in sorted(parts) for value in parts[rank]]
        return await self._load(values, LoadHeader(), uuid.uuid4().hex)

    async def _extend(self, asked: Mapping[int, Asked]) -> Registration:
        async with self._changing:
            first, known = asked[min(asked)].spec, self.known
            for rank in sorted(asked):
                first.require_same(asked[rank].spec, whose=f"rank {rank}")
            spec = self.require_spec().extended(first)
            workers = {
                rank: dataclasses.replace(each, holdings=asked[rank].holdings)
                for rank, each in known.workers.items()
                if rank in asked
            }
            _require_cover(spec, workers)
            values = [value for rank in sorted(asked) for value in asked[rank].values]
            args, request = (pack_job(spec), workers, *values), uuid.uuid4().hex
            rest = self._shards.settle
            await change_state(self._shards, known, "prepare_extension", *args, request=request, rest=rest, spec=spec)
            known.workers = workers
            return await self.registration()


def _require_cover(spec: JobSpec, workers: Mapping[int, Worker]) -> None:
    """See that the workers of a sharded model push every element exactly once; of any other there is nothing to see."""
    if spec.gradients == "sharded":
        require_exact_cover(spec.params, {rank: worker.held(spec) for rank, worker in workers.items()})
