"""Requests that come together: who is served with whom, and what each is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from simulated import SimulatedService

from stepwell.optim import SGDRule
from stepwell.server.messages import Registration, pack_holdings, pack_job
from stepwell.server.together import Together
from stepwell.sharding.errors import JobMismatchError, MessageError, ServiceError, UnknownRankError
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import ParamSpec

LIMIT_S = 20.0


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


def test_what_comes_while_others_are_served_is_served_at_once_after_them() -> None:
    served: list[list[int]] = []
    going_on = asyncio.Event()

    async def serve(asked: Sequence[int]) -> Sequence[int]:
        served.append(list(asked))
        await going_on.wait()
        return [10 * each for each in asked]

    async def test() -> None:
        together = Together(asyncio.Lock(), serve)
        asking = [asyncio.ensure_future(together.ask(0))]
        while not served:
            await asyncio.sleep(0)
        asking += [asyncio.ensure_future(together.ask(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        going_on.set()
        assert await asyncio.gather(*asking) == [0, 10, 20, 30]
        assert served == [[0], [1, 2, 3]]

    run(test)


def test_error_is_told_to_whom_it_is_for_and_who_gives_up_takes_nobody_along() -> None:
    async def serve(asked: Sequence[int]) -> Sequence[int | ServiceError]:
        await asyncio.sleep(0)
        return [ServiceError("odd") if each % 2 else each for each in asked]

    async def test() -> None:
        together = Together(asyncio.Lock(), serve)
        asking = [asyncio.ensure_future(together.ask(number)) for number in range(4)]
        await asyncio.sleep(0)
        asking[0].cancel()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(answer) for answer in answers] == [asyncio.CancelledError, ServiceError, int, ServiceError]
        assert answers[2] == 2

    run(test)


def test_failure_is_told_to_all_who_were_served_and_to_nobody_after_them() -> None:
    fails = [True]

    async def serve(asked: Sequence[int]) -> Sequence[int]:
        if fails.pop():
            raise ServiceError("no shards")
        return asked

    async def test() -> None:
        together = Together(asyncio.Lock(), serve)
        answers = await asyncio.gather(*(together.ask(number) for number in range(3)), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["no shards"] * 3
        fails.append(False)
        assert await together.ask(7) == 7

    run(test)


def test_worker_with_another_model_or_rank_is_refused_alone() -> None:
    def spec_of(num_groups: int) -> JobSpec:
        params = tuple(ParamSpec(f"p{group}", (600,), "float32", group) for group in range(num_groups))
        return JobSpec(SGDRule(lr=0.1), params, num_groups, world_size=2)

    async def test() -> None:
        service = SimulatedService(num_shards=2)
        await service.coordinator.start()
        job, other = pack_job(spec_of(1)), pack_job(spec_of(2))

        async def register(job: bytes, rank: int) -> Registration:
            return await service.coordinator.register(job, rank, f"process-{rank}", pack_holdings(None))

        asked = [(job, 0), (other, 1), (b"nonsense", 1), (job, 2), (job, 1)]
        told = await asyncio.gather(*(register(*each) for each in asked), return_exceptions=True)
        kinds = [Registration, JobMismatchError, MessageError, UnknownRankError, Registration]
        assert [type(each) for each in told] == kinds
        assert told[0] == told[4]
        reports = await service.coordinator._shards.all("report", what="the test")
        for report in reports:
            assert {rank: worker.incarnation for rank, worker in report.workers.items()} == {
                0: "process-0",
                1: "process-1",
            }
        assert service.traffic.calls["admit"] == 2, "those with the job are admitted at once"

    run(test)
