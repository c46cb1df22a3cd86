"""A service in this process whose coordinator dies at a declared moment, while its shards and workers live on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Coroutine, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from stepwell.optim import SGDRule
from stepwell.server.collective import NO_GENERATION, Generation
from stepwell.server.config import ServiceConfig
from stepwell.server.coordinator import Coordinator
from stepwell.server.knowledge import ShardReport
from stepwell.server.meeting import Meeting
from stepwell.server.messages import pack_holdings, pack_job
from stepwell.server.resizing import ShardSet, ShardSets
from stepwell.server.shard_actor import ShardActor
from stepwell.server.standby import ActorState
from stepwell.server.wire import from_wire, values_to_wire
from stepwell.sharding.coverage import Gradients
from stepwell.sharding.errors import PlacementError, ShardLostError
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import ParamSpec
from tests.server.test_coordinator import HALVES, NUMEL, holdings_of, part

LIMIT_S = 60.0
NUM_SHARDS = 2


class Life:
    """One coordinator's, which may end before a call to a shard."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._is_buried = False
        self._unanswered: list[asyncio.Future[Any]] = []
        self.num_calls = 0
        self.is_over = asyncio.Event()

    def end_after(self, num_calls: int) -> None:
        """End after so many calls more."""
        self._last = self.num_calls + num_calls

    def call(self, method: Any, arguments: Sequence[Any]) -> asyncio.Future[Any]:
        """Deliver a call, or after the end none."""
        if self._last == self.num_calls or self.is_over.is_set():
            self.is_over.set()
            unanswered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._unanswered.append(unanswered)
            if self._is_buried:
                unanswered.cancel()
            return unanswered
        self.num_calls += 1
        answer: asyncio.Future[Any] = asyncio.ensure_future(method(*arguments))
        return answer

    def bury(self) -> None:
        """Let what waits for answers end, so that the event loop can."""
        self._is_buried = True
        self.is_over.set()
        for future in self._unanswered:
            future.cancel()


class Group:
    """A generation that is formed when all its members have come, in place of a process group."""

    def __init__(self, generation: Generation, shard: int, num_shards: int, **options: Any) -> None:
        self.generation, self.is_open = generation, True
        meeting: Meeting = options["meeting"]
        meeting.set(str(shard), b"here")
        try:
            meeting.wait([str(index) for index in range(num_shards)])
        except TimeoutError:
            raise ShardLostError(f"shard {shard}: generation {generation} did not come together") from None

    def close(self) -> None:
        self.is_open = False


class Handle:
    """A shard's handle as one coordinator holds it."""

    def __init__(self, actor: ShardActor, life: Life) -> None:
        self._actor, self._life, self._loop = actor, life, asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)
        if name == "rows":  # called by other shards
            return mock.Mock(remote=lambda run: asyncio.ensure_future(method(run)))
        if name == "meet":  # called by the other shards, in their own threads
            return mock.Mock(remote=lambda *arguments: asyncio.run_coroutine_threadsafe(method(*arguments), self._loop))
        return mock.Mock(remote=lambda *arguments: self._life.call(method, arguments))


class Sets(ShardSets):
    """The sets of shards of a service in this process, as one coordinator reaches them."""

    def __init__(self, service: Service) -> None:
        self._service, self._life = service, service.life

    async def found(self) -> list[ShardSet]:
        return [
            ShardSet(config, list(self._service.handles(actors)), [])
            for _, (config, actors) in sorted(self._service.sets.items())
        ]

    async def start(self, config: ServiceConfig, avoid: Collection[str]) -> ShardSet:
        async def start() -> list[ShardActor]:
            if config.num_shards > self._service.room:
                self._service.was_refused.set()
                raise PlacementError(f"no room for {config.num_shards} shards")
            return self._service.make_set(config)

        actors = await self._life.call(start, ())
        return ShardSet(config, list(self._service.handles(actors)), [])

    async def end(self, config: ServiceConfig) -> None:
        async def end() -> None:
            self._service.sets.pop(config.shard_set, None)

        await self._life.call(end, ())

    async def nodes(self, config: ServiceConfig) -> list[str]:
        return [f"node-{config.shard_set[0]}"] * config.num_shards

    async def drained(self) -> list[str]:
        return self._service.drained

    def here(self) -> str:
        return self._service.here

    async def states(self, actors: Sequence[Any]) -> list[ActorState]:
        return [ActorState.RUNS] * len(actors)

    async def replace(self, config: ServiceConfig, index: int, lost: Any, node: str) -> Any:
        raise PlacementError("there is no other place")


class Service:
    """Two shards, and one coordinator after the other. The shards' own threads are real.

    Attributes:
        sets: The sets of shards, by number, each with its settings. One that has ended is not among them; as those of a
            node that is cut off its shards live on.
        room: How many shards another set may have.
        was_refused: Set when another set had no room.
        drained: Nodes that are about to go; each set is on one of its own, "node-0" and so on.
        here: The coordinator's node.
    """

    def __init__(self, *, elastic: bool = False) -> None:
        self.sets: dict[tuple[int, int], tuple[ServiceConfig, list[ShardActor]]] = {}
        options: dict[str, Any] = {"kernel": "eager", "worker_timeout_s": LIMIT_S, "elastic": elastic}
        self.make_set(ServiceConfig("test", num_shards=NUM_SHARDS, **options))
        self.room = 8
        self.drained, self.here, self.was_refused = list[str](), "elsewhere", asyncio.Event()
        self.lives: list[Life] = []

    @property
    def config(self) -> ServiceConfig:
        """Of the oldest set."""
        return self.sets[min(self.sets)][0]

    @property
    def actors(self) -> list[ShardActor]:
        """Of the oldest set."""
        return self.sets[min(self.sets)][1]

    def make_set(self, config: ServiceConfig) -> list[ShardActor]:
        """Start another set."""
        with mock.patch("ray.util.get_node_ip_address", return_value="127.0.0.1"):
            actors = [ShardActor(config, index) for index in range(config.num_shards)]
        self.sets[config.shard_set] = config, actors
        return actors

    def handles(self, actors: Sequence[ShardActor]) -> list[Handle]:
        """As the coordinator that lives now holds them."""
        return [Handle(actor, self.life) for actor in actors]

    async def start(self, num_calls: int | None = None) -> Coordinator:
        """Start the next coordinator; returns when it has taken over, or is dead after ``num_calls`` calls."""
        self.life = Life()
        self.lives.append(self.life)
        self.resign = mock.Mock()
        self.coordinator = Coordinator(self.config, self.handles(self.actors), sets=Sets(self), resign=self.resign)
        if num_calls is not None:
            self.life.end_after(num_calls)
        await self.until_over(self.coordinator.start())
        return self.coordinator

    async def until_over(self, asked: Coroutine[Any, Any, object]) -> None:
        """Wait until a coordinator has done what it was asked for, or is dead."""
        over = asyncio.ensure_future(self.life.is_over.wait())
        asking = asyncio.ensure_future(asked)
        await asyncio.wait([asking, over], return_when=asyncio.FIRST_COMPLETED)
        if not over.done():
            over.cancel()
            await asking

    async def reports(self) -> list[ShardReport]:
        return [await actor.report(actor.fence.epoch) for actor in self.actors]

    async def state(self) -> dict[tuple[int, str, int], torch.Tensor]:
        """Everything that the shards own."""
        exports = [await actor.export() for actor in self.actors]
        return {
            (param, slot, offset): from_wire(wire).clone()
            for pieces, _ in exports
            for param, slot, offset, wire in pieces
        }

    async def require_whole(self) -> list[ShardReport]:
        """See that the shards agree in everything, have one group, and that nothing holds them or is left undone."""
        reports = await self.reports()
        for report, actor in zip(reports, self.actors, strict=True):
            assert report.prepared is None
            assert not report.saves
            assert actor._steps._held_after is None
            assert report.generation == reports[0].generation != NO_GENERATION
            assert report.requests == reports[0].requests
        if any(report.job is None for report in reports):
            assert {report.timeline for report in reports} == {0}, "a job that has parameters is on all shards"
            return reports
        for report in reports:
            assert report.job == reports[0].job
            assert report.workers == reports[0].workers
            assert report.left == reports[0].left
            assert report.world == reports[0].world
            assert report.timeline == reports[0].timeline
        return reports


@contextlib.contextmanager
def groups_without_sockets(forming_timeout_s: float) -> Iterator[None]:
    """Within this block shards form groups that meet in this process."""
    with (
        mock.patch("stepwell.server.coordinated_shard.Collective", Group),
        mock.patch("stepwell.server.shards.FORMING_TIMEOUT_S", forming_timeout_s),
    ):
        yield


class Ranks:
    """What the ranks of a sharded model ask for; each of them has half of each parameter."""

    def __init__(self, *, num_groups: int = 1, world_size: int = 2, gradients: Gradients = "sharded") -> None:
        params = tuple(ParamSpec(f"p{index}", (NUMEL,), "float32", index) for index in range(num_groups))
        self.spec = JobSpec(SGDRule(lr=0.1, momentum=0.9), params, num_groups, world_size, gradients=gradients)

    async def register(self, coordinator: Coordinator, ranks: Sequence[int] = (0, 1), incarnation: str = "a") -> None:
        async def register(rank: int) -> None:
            await coordinator.register(pack_job(self.spec), rank, f"{rank}-{incarnation}", self._held(rank))

        await asyncio.gather(*map(register, ranks))

    async def hand_in(self, coordinator: Coordinator, value: float) -> None:
        parts = [[values_to_wire(part(0, cut, value + rank))] for rank, cut in enumerate(HALVES)]
        await asyncio.gather(*(coordinator.hand_in(rank, values) for rank, values in enumerate(parts)))

    async def extend(self, coordinator: Coordinator, value: float) -> None:
        parts = [[values_to_wire(part(1, cut, value + rank))] for rank, cut in enumerate(HALVES)]
        job = pack_job(self.spec)
        await asyncio.gather(
            *(coordinator.extend(job, rank, self._held(rank), values) for rank, values in enumerate(parts))
        )

    def _held(self, rank: int) -> bytes:
        return pack_holdings(holdings_of(self.spec, HALVES[rank]) if self.spec.gradients == "sharded" else None)
