"""An elastic service without Ray, on one shard: workers that leave, join, stay away, come back or are replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any
from unittest import mock

import pytest
import torch

from stepwell.optim import SGDRule
from stepwell.server.config import ServiceConfig
from stepwell.server.coordinator import Coordinator
from stepwell.server.messages import (
    Exchange,
    LoadHeader,
    Registration,
    Target,
    pack_exchange,
    pack_holdings,
    pack_job,
    pack_push,
)
from stepwell.server.shard_actor import ShardActor
from stepwell.server.wire import from_wire, to_wire, values_to_wire
from stepwell.sharding.buffers import MASTER
from stepwell.sharding.coverage import Gradients
from stepwell.sharding.errors import (
    IncarnationError,
    JobMismatchError,
    RankExcludedError,
    StepwellError,
    UnknownRankError,
)
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import ParamSpec
from stepwell.sharding.push import PushHeader, pack_present
from stepwell.sharding.reports import StepResult
from stepwell.sharding.vote import Decision
from tests.gated_files import Gate, gated
from tests.server.test_coordinator import Handle

LIMIT_S = 20.0
PATIENT_S, IMPATIENT_S = 60.0, 0.05
NUMEL, LR = 256, 0.5


def gradient(rank: int) -> float:
    return 3.0 * 2.0**rank


class Job:
    """An elastic service whose one parameter counts: with each step it falls by the mean of the ranks' gradients.

    Rank r's gradient is 3 * 2^r everywhere, so the mean of up to four says who was there, and has no rounding.
    """

    def __init__(self, *, worker_timeout_s: float = PATIENT_S, elastic: bool = True) -> None:
        config = ServiceConfig("test", worker_timeout_s=worker_timeout_s, elastic=elastic, kernel="eager", redundancy=0)
        with mock.patch("ray.util.get_node_ip_address", return_value="127.0.0.1"):
            self.actor = ShardActor(config, 0)
        self.coordinator = Coordinator(config, [Handle(self.actor)], resign=mock.Mock())
        self.registered: dict[int, Registration] = {}

    async def register(
        self, rank: int, world_size: int, *, process: str = "a", gradients: Gradients = "local"
    ) -> Registration:
        spec = JobSpec(SGDRule(lr=LR), (ParamSpec("p", (NUMEL,), "float32", 0),), 1, world_size, gradients=gradients)
        told = await self.coordinator.register(pack_job(spec), rank, f"{rank}-{process}", pack_holdings(None))
        self.registered[rank] = told
        return told

    async def begin(self, world_size: int) -> None:
        """All ranks register, rank 0 loads."""
        for rank in range(world_size):
            await self.register(rank, world_size)
        values = {(0, MASTER.name, 0): torch.zeros(NUMEL)}
        await self.coordinator.load([values_to_wire(values)], LoadHeader(), "load")

    def push(self, rank: int, *, process: str = "a", sequence: int | None = None) -> asyncio.Future[StepResult]:
        """What comes of a rank's push for the next step."""
        shard = self.actor._steps.job()
        hyper = {name: [value] for name, value in SGDRule(lr=LR).hyper(SGDRule(lr=LR).defaults()).items()}
        header = PushHeader(
            timeline=shard.timeline,
            sequence=shard.sequence + 1 if sequence is None else sequence,
            rank=rank,
            incarnation=f"{rank}-{process}",
            attempt=0,
            present=pack_present([True]),
            hyper=hyper if shard.world.is_heard(rank) else None,
        )

        async def exchange() -> StepResult:
            request = pack_exchange(Exchange(pack_push(header), None, Target("held", ("float32",)), LIMIT_S))
            answer, _, _ = await self.actor.exchange(request, [to_wire(torch.full((NUMEL,), gradient(rank)))])
            if isinstance(answer, StepwellError):
                raise answer
            return answer

        return asyncio.ensure_future(exchange())

    async def step(self, ranks: Sequence[int]) -> None:
        """These ranks push, and the step is taken with just them."""
        before = await self.value()
        for result in await asyncio.gather(*map(self.push, ranks)):
            assert (result.decision, result.ranks) == (Decision.COMMIT, tuple(sorted(ranks)))
        await self.require_stepped(before, ranks)

    async def require_stepped(self, before: float, ranks: Sequence[int]) -> None:
        assert await self.value() == before - LR * sum(map(gradient, ranks)) / len(ranks)

    async def value(self) -> float:
        pieces, _ = await self.actor.export()
        (values,) = (from_wire(wire) for _, slot, _, wire in pieces if slot == MASTER.name)
        assert torch.equal(values, values[:1].expand(NUMEL))
        return float(values[0])

    async def ranks(self) -> tuple[int, ...]:
        status = await self.actor.status()
        assert status is not None
        return status.world.ranks

    async def waiting(self, *ranks: int) -> list[asyncio.Future[StepResult]]:
        """Pushes that wait for other ranks."""
        pushed = [self.push(rank) for rank in ranks]
        for _ in range(20):
            await asyncio.sleep(0)
        assert not any(each.done() for each in pushed)
        return pushed


def run_test(
    worker_timeout_s: float = PATIENT_S, *, elastic: bool = True
) -> Callable[[Callable[[Job], Coroutine[Any, Any, None]]], Callable[[], None]]:
    """Run a test on an event loop."""

    def decorate(test: Callable[[Job], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        def run() -> None:
            async def main() -> None:
                job = Job(worker_timeout_s=worker_timeout_s, elastic=elastic)
                await asyncio.wait_for(test(job), LIMIT_S)

            asyncio.run(main())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


@run_test()
async def test_workers_join_and_leave_between_steps(job: Job) -> None:
    await job.begin(2)
    await job.step((0, 1))
    told = await job.register(2, 3)
    assert (told.sequence, told.ranks, told.needs_parameters) == (1, (0, 1, 2), False)
    await job.step((0, 1, 2))
    await job.coordinator.leave(1, "1-a")
    await job.coordinator.leave(0, "0-a")
    await job.step((2,))
    await job.register(0, 1, process="b")
    assert await job.ranks() == (0, 2)


@run_test()
async def test_step_that_waits_for_a_worker_is_taken_when_it_leaves(job: Job) -> None:
    await job.begin(2)
    (waiting,) = await job.waiting(0)
    await job.coordinator.leave(1, "1-a")
    assert (await waiting).ranks == (0,)
    await job.require_stepped(0.0, [0])


@run_test()
async def test_step_that_others_wait_in_waits_for_a_worker_that_joins(job: Job) -> None:
    await job.begin(2)
    waiting = await job.waiting(1)
    told = await job.register(2, 3)
    assert (told.sequence, told.ranks) == (0, (0, 1, 2))
    waiting += await job.waiting(0)
    for reply in [*waiting, job.push(2)]:
        assert (await reply).ranks == (0, 1, 2)
    await job.require_stepped(0.0, [0, 1, 2])


@run_test(IMPATIENT_S)
async def test_worker_that_stays_away_is_excluded_and_joins_again(job: Job) -> None:
    await job.begin(3)
    results = await asyncio.gather(job.push(0), job.push(2))
    assert [result.ranks for result in results] == [(0, 2)] * 2
    await job.require_stepped(0.0, [0, 2])
    status = await job.actor.status()
    assert status is not None
    assert status.world.excluded == {1: 1}
    for sequence in (1, 2):
        with pytest.raises(RankExcludedError, match="from step 1 on the job goes on with ranks 0, 2"):
            await job.push(1, sequence=sequence)
    await job.step((0, 2))
    told = await job.coordinator.refresh(1, "1-a")
    assert (told.sequence, told.ranks) == (2, (0, 1, 2))
    await job.step((0, 1, 2))


@run_test(IMPATIENT_S)
async def test_successor_of_a_worker_that_was_excluded_joins(job: Job) -> None:
    await job.begin(2)
    assert (await job.push(0)).ranks == (0,)
    told = await job.register(1, 2, process="b")
    assert (told.sequence, told.ranks) == (1, (0, 1))
    replies = job.push(0), job.push(1, process="b")
    for reply in replies:
        assert (await reply).ranks == (0, 1)
    assert (await job.coordinator.refresh(1, "1-a")).ranks == (0, 1)
    with pytest.raises(IncarnationError, match="another process has registered as this rank since"):
        await job.push(1)


@run_test(IMPATIENT_S, elastic=False)
async def test_service_that_is_not_elastic_is_of_one_size_and_waits_for_all(job: Job) -> None:
    await job.begin(1)
    with pytest.raises(JobMismatchError, match="world_size: the service has 1, rank 1 has 2"):
        await job.register(1, 2)
    await job.coordinator.leave(0, "0-a")
    assert await job.ranks() == (0,)


@pytest.mark.parametrize("gradients", ["replicated", "sharded"])
def test_gradients_that_are_not_local_are_refused_with_the_reason(gradients: Gradients) -> None:
    @run_test()
    async def refuse(job: Job) -> None:
        with pytest.raises(JobMismatchError, match=f"service 'test' is elastic, .*Got gradients='{gradients}'; leave"):
            await job.register(0, 2, gradients=gradients)
        assert (await job.actor.status()) is None
        await job.begin(1)

    refuse()


@run_test()
async def test_two_processes_of_one_rank_the_older_one_is_told_and_cannot_say_goodbye_for_it(job: Job) -> None:
    await job.begin(2)
    (waiting,) = await job.waiting(1)
    await job.register(1, 2, process="b")
    with pytest.raises(IncarnationError, match="rank 1: expected a push of process 1-b, got one of 1-a"):
        await job.push(1)
    await job.coordinator.leave(1, "1-a")
    assert await job.ranks() == (0, 1)
    replies = job.push(1, process="b"), job.push(0)
    for reply in replies:
        assert (await reply).ranks == (0, 1)
    with pytest.raises(IncarnationError):
        await waiting


@run_test()
async def test_worker_that_left_is_refused(job: Job) -> None:
    await job.begin(2)
    await job.coordinator.leave(1, "1-a")
    with pytest.raises(UnknownRankError, match="expected one of ranks 0 to 0, got 1"):
        await job.push(1)
    assert (await job.coordinator.refresh(1, "1-a")).ranks == (0,)


@run_test()
async def test_next_workers_may_be_of_another_number_once_all_have_left(job: Job) -> None:
    await job.begin(2)
    await job.step((0, 1))
    for rank in range(2):
        await job.coordinator.leave(rank, f"{rank}-a")
    assert (await job.register(0, 3, process="b")).ranks == (0, 1, 2)
    for rank in (1, 2):
        await job.register(rank, 3, process="b")
    for reply in [job.push(rank, process="b") for rank in range(3)]:
        assert (await reply).ranks == (0, 1, 2)


@run_test(IMPATIENT_S)
async def test_workers_that_were_excluded_count_as_gone_for_the_next_ones(job: Job) -> None:
    await job.begin(2)
    assert (await job.push(0)).ranks == (0,)
    await job.coordinator.leave(0, "0-a")
    assert (await job.register(0, 3, process="b")).ranks == (0, 1, 2)
    assert (await job.coordinator.refresh(1, "1-a")).ranks == (0, 1, 2)
    with pytest.raises(IncarnationError, match="no worker has registered as this rank since"):
        await job.push(1)


@run_test()
async def test_first_step_waits_for_all_that_the_first_worker_spoke_of(job: Job) -> None:
    await job.register(0, 2)
    values = {(0, MASTER.name, 0): torch.zeros(NUMEL)}
    await job.coordinator.load([values_to_wire(values)], LoadHeader(), "load")
    (waiting,) = await job.waiting(0)
    await job.register(1, 2)
    assert (await job.push(1)).ranks == (await waiting).ranks == (0, 1)


@run_test()
async def test_group_is_added_by_those_that_are_there(job: Job) -> None:
    await job.begin(3)
    await job.coordinator.leave(1, "1-a")
    params = tuple(ParamSpec("p", (NUMEL,), "float32", group) for group in range(2))
    spec = pack_job(JobSpec(SGDRule(lr=LR), params, 2, 3))
    values = [values_to_wire({(1, MASTER.name, 0): torch.ones(NUMEL)})]
    told = await asyncio.gather(
        *(job.coordinator.extend(spec, rank, pack_holdings(None), values if rank == 0 else []) for rank in (0, 2))
    )
    assert [each.ranks for each in told] == [(0, 2)] * 2
    assert [each.timeline for each in told] == [2, 2]


def test_worker_joins_while_a_checkpoint_is_written() -> None:
    async def save(job: Job, gate: Gate, uri: str) -> None:
        await job.begin(2)
        await job.step((0, 1))
        before = await job.value()
        assert await job.coordinator.begin_save("save", uri) == (True, uri, 1)
        await asyncio.to_thread(gate.wait_until_reached)
        assert (await job.register(2, 3)).ranks == (0, 1, 2)
        await job.step((0, 1, 2))
        await job.coordinator.leave(0, "0-a")
        await job.step((1, 2))
        gate.open()
        await job.coordinator.end_save("save", uri)
        told = await job.coordinator.restore(uri, "restore")
        assert (told.step, told.ranks) == (1, (1, 2))
        assert await job.value() == before
        await job.step((1, 2))

    with gated(num_files=1) as (gate, uri):
        run_test()(lambda job: save(job, gate, uri))()
