"""The coordinator without Ray, on one shard: what it tells ranks that come, come again, leave or are replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any
from unittest import mock

import pytest
import torch

from stepwell.optim import SGDRule
from stepwell.server import coordinator as coordinator_module
from stepwell.server.config import ServiceConfig
from stepwell.server.coordinator import Coordinator
from stepwell.server.messages import Registration, pack_holdings, pack_job, unpack_job
from stepwell.server.rendezvous import Rendezvous
from stepwell.server.shard_actor import ShardActor
from stepwell.server.wire import values_to_wire
from stepwell.sharding.buffers import MASTER
from stepwell.sharding.coverage import Gradients, Holdings, Range
from stepwell.sharding.errors import CoverageError, JobMismatchError, ServiceTimeoutError, ShardLostError
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import ParamSpec

LIMIT_S = 20.0
NUMEL = 600

Cut = tuple[int, int]
"""Where one rank's part of every parameter begins and ends."""
HALVES: tuple[Cut, Cut] = ((0, 300), (300, NUMEL))


class Handle:
    """An actor's handle as Ray gives it: every method has ``remote``."""

    def __init__(self, actor: ShardActor) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)
        return mock.Mock(remote=lambda *args: asyncio.ensure_future(method(*args)))


class Service:
    """A coordinator with one shard."""

    def __init__(self, worker_timeout_s: float = 5.0) -> None:
        config = ServiceConfig("test", worker_timeout_s=worker_timeout_s)
        with mock.patch("ray.util.get_node_ip_address", return_value="127.0.0.1"):
            self.actor = ShardActor(config, 0)
        self.coordinator = Coordinator(config, [Handle(self.actor)], resign=mock.Mock())

    def spec(self, *, num_groups: int = 1, gradients: Gradients = "sharded") -> JobSpec:
        params = tuple(ParamSpec(f"p{index}", (NUMEL,), "float32", index) for index in range(num_groups))
        return JobSpec(SGDRule(lr=0.1), params, num_groups, 2, gradients=gradients)

    async def register(self, rank: int, cut: Cut, *, num_groups: int = 1, incarnation: str = "a") -> Registration:
        spec = self.spec(num_groups=num_groups)
        holdings = pack_holdings(holdings_of(spec, cut))
        return await self.coordinator.register(pack_job(spec), rank, f"{rank}-{incarnation}", holdings)

    async def begin(self, cuts: Sequence[Cut] = HALVES) -> None:
        """Two ranks register and hand in their parts."""
        await asyncio.gather(*(self.register(rank, cut) for rank, cut in enumerate(cuts)))
        await asyncio.gather(*(self.hand_in(rank, cut, value=1.0) for rank, cut in enumerate(cuts)))

    async def hand_in(self, rank: int, cut: Cut, *, value: float) -> Registration:
        return await self.coordinator.hand_in(rank, [values_to_wire(part(0, cut, value))])

    async def extend(self, rank: int, cut: Cut, *, value: float = 2.0, num_groups: int = 2) -> Registration:
        spec = self.spec(num_groups=num_groups)
        values = [values_to_wire(part(1, cut, value))]
        return await self.coordinator.extend(pack_job(spec), rank, pack_holdings(holdings_of(spec, cut)), values)

    def master(self) -> torch.Tensor:
        assert self.actor._steps.shard is not None
        flat = [extent.slots[MASTER.name].view(-1)[:NUMEL] for extent in self.actor._steps.shard.buffers.extents]
        return torch.cat(flat)


def holdings_of(spec: JobSpec, cut: Cut) -> Holdings:
    ranges = tuple(Range(cut[0], cut[1] - cut[0]) for _ in spec.params)
    return Holdings(ranges, ranges)


def part(index: int, cut: Cut, value: float) -> dict[tuple[int, str, int], torch.Tensor]:
    return {(index, MASTER.name, cut[0]): torch.full((cut[1] - cut[0],), value)}


def run_test(test: Callable[[Service], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on an event loop, with a service that two ranks train on."""

    def run() -> None:
        async def main() -> None:
            service = Service()
            await service.coordinator.start()
            await service.begin()
            await asyncio.wait_for(test(service), LIMIT_S)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@run_test
async def test_rank_that_did_not_hear_of_its_group_is_told_when_it_asks_again(service: Service) -> None:
    told = await asyncio.gather(*(service.extend(rank, cut) for rank, cut in enumerate(HALVES)))
    again = await service.extend(1, HALVES[1], value=9.0)
    assert again == told[1] == told[0]
    assert unpack_job(again.spec).batches == (1, 1)
    assert torch.equal(service.master(), torch.cat((torch.full((NUMEL,), 1.0), torch.full((NUMEL,), 2.0))))


@run_test
async def test_group_that_leaves_a_gap_is_refused_and_changes_nothing(service: Service) -> None:
    cuts = HALVES[0], (400, NUMEL)
    answers = await asyncio.gather(
        *(service.extend(rank, cut) for rank, cut in enumerate(cuts)), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [CoverageError, CoverageError]
    assert service.actor._steps._held_after is None
    assert (await service.register(0, HALVES[0], incarnation="b")).timeline == 1
    told = await asyncio.gather(*(service.extend(rank, cut) for rank, cut in enumerate(HALVES)))
    assert [one.timeline for one in told] == [2, 2]


@run_test
async def test_what_a_dead_process_brought_to_a_group_is_not_taken_for_its_successors(service: Service) -> None:
    lost = asyncio.ensure_future(service.extend(0, HALVES[0]))
    await asyncio.sleep(0)
    await service.register(0, HALVES[0], incarnation="b")
    other = asyncio.ensure_future(service.extend(1, HALVES[1]))
    for waiting in (lost, other):
        with pytest.raises(ServiceTimeoutError, match="missing ranks"):
            await waiting
    assert len(unpack_job((await service.coordinator.refresh(1, "1-a")).spec).params) == 1


@run_test
async def test_process_with_other_holdings_is_refused_and_the_others_train_on(service: Service) -> None:
    with pytest.raises(CoverageError, match="overlap"):
        await service.register(1, (200, NUMEL), incarnation="b")
    assert (await service.register(1, HALVES[1], incarnation="c")).needs_parameters is False
    assert (await service.register(0, HALVES[0], incarnation="b")).needs_parameters is False


@run_test
async def test_next_job_may_be_split_otherwise_once_the_ranks_have_left(service: Service) -> None:
    for rank in range(2):
        await service.coordinator.leave(rank, f"{rank}-a")
    cuts = (0, 100), (100, NUMEL)
    told = await asyncio.gather(*(service.register(rank, cut, incarnation="b") for rank, cut in enumerate(cuts)))
    assert [one.needs_parameters for one in told] == [False, False]


@run_test
async def test_parameters_that_come_after_those_of_all_ranks_are_not_loaded(service: Service) -> None:
    told = await service.hand_in(1, HALVES[1], value=7.0)
    assert told.timeline == 1
    assert torch.equal(service.master(), torch.full((NUMEL,), 1.0))


@run_test
async def test_repeat_with_another_model_is_refused(service: Service) -> None:
    await asyncio.gather(*(service.extend(rank, cut) for rank, cut in enumerate(HALVES)))
    other = JobSpec(
        SGDRule(lr=0.1), tuple(ParamSpec("q", (5,), "float32", index) for index in range(2)), 2, 2, gradients="sharded"
    )
    with pytest.raises(JobMismatchError, match="rank 1 does not match"):
        await service.coordinator.extend(pack_job(other), 1, pack_holdings(None), [])


def test_first_try_that_runs_out_does_not_take_back_what_the_second_brought() -> None:
    async def main() -> None:
        async def act(brought: Any) -> Any:
            return dict(brought)

        rendezvous: Rendezvous[str | None, Any] = Rendezvous(act, what="the test")
        first = asyncio.ensure_future(rendezvous.arrive(0, None, ranks=range(2), timeout_s=0.01))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(rendezvous.arrive(0, None, ranks=range(2), timeout_s=LIMIT_S))
        with pytest.raises(ServiceTimeoutError):
            await first
        assert await rendezvous.arrive(1, "b", ranks=range(2), timeout_s=1.0) == {0: None, 1: "b"}
        assert await second == {0: None, 1: "b"}

    asyncio.run(main())


def test_take_over_is_tried_again_when_a_shard_is_lost_in_it() -> None:
    async def test() -> None:
        coordinator = Service().coordinator
        take_over = mock.AsyncMock(side_effect=[ShardLostError("gone"), ShardLostError("gone again"), None])
        with (
            mock.patch.object(coordinator, "_take_over", take_over),
            mock.patch.object(coordinator_module, "RETRY_S", 0),
        ):
            await asyncio.wait_for(coordinator.persist(), 20.0)
        assert take_over.await_count == 3

    asyncio.run(test())


def test_shard_that_is_cut_off_before_there_is_a_job_takes_the_first_one() -> None:
    """Nothing was lost, so nobody is told to restore a checkpoint."""

    async def test() -> None:
        service = Service()
        await service.coordinator.start()
        await service.coordinator._watch.bring_back()
        async with asyncio.timeout(LIMIT_S):
            both = await asyncio.gather(*(service.register(rank, cut) for rank, cut in enumerate(HALVES)))
        assert all(each.needs_parameters for each in both)

    asyncio.run(test())


@run_test
async def test_rank_that_waited_for_others_when_it_was_dismissed_is_not_counted(service: Service) -> None:
    await service.coordinator.dismiss()
    dismissed = asyncio.ensure_future(service.register(1, HALVES[1], incarnation="b"))
    for _ in range(20):
        await asyncio.sleep(0)
    await service.coordinator.dismiss()
    first = asyncio.ensure_future(service.register(0, HALVES[0], incarnation="c"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not first.done()
    told = await service.register(1, HALVES[1], incarnation="c")
    assert (await first).ranks == told.ranks == (0, 1)
    assert not dismissed.done()
    dismissed.cancel()
