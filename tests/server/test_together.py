"""Requests that come together: who is served with whom, and what each is told."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from stepwell.server.messages import Registration, pack_holdings, pack_job
from stepwell.server.together import Together
from stepwell.sharding.errors import JobMismatchError, ServiceError, UnknownRankError
from tests.server.test_coordinator import LIMIT_S, Service


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
    async def test() -> None:
        service = Service()
        await service.coordinator.start()
        spec = dataclasses.replace(service.spec(), gradients="local")
        other = dataclasses.replace(service.spec(num_groups=2), gradients="local")

        async def register(job: bytes, rank: int) -> Registration:
            return await service.coordinator.register(job, rank, f"{rank}", pack_holdings(None))

        asked = [(pack_job(spec), 0), (pack_job(other), 1), (b"nonsense", 1), (pack_job(spec), 2), (pack_job(spec), 1)]
        told = await asyncio.gather(*(register(*each) for each in asked), return_exceptions=True)
        assert isinstance(told[1], JobMismatchError)
        assert isinstance(told[2], Exception)
        assert isinstance(told[3], UnknownRankError)
        assert isinstance(told[0], Registration)
        assert told[0] == told[4]
        (status,) = await service.coordinator._shards.statuses()
        assert status.timeline == 0
        shard = service.actor._steps.shard
        assert shard is not None
        assert {rank: member.incarnation for rank, member in shard.members.by_rank.items()} == {0: "0", 1: "1"}

    run(test)
