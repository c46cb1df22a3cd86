"""Another set of shards takes a service over: all of it, or nothing of it, wherever the coordinator dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import torch

from stepwell.client.transport import join_pieces
from stepwell.server.coordinator import Coordinator
from stepwell.server.knowledge import Knowledge
from stepwell.sharding.errors import EpochError, NotRegisteredError, PlacementError
from tests.server.dying import LIMIT_S, NUM_SHARDS, Life, Service, groups_without_sockets
from tests.server.test_coordinator_death import load, register, train

FORMING_TIMEOUT_S = 2.0
REQUEST, AFTER = "resize", 3


async def resize(coordinator: Coordinator) -> None:
    await coordinator.resize(AFTER, (), REQUEST)


async def known_and_state(service: Service) -> tuple[Knowledge, dict[tuple[int, str], torch.Tensor]]:
    """What the shards know, and every slot that they own, put together."""
    assert len(service.sets) == 1, "the others have ended"
    known = Knowledge.of(await service.require_whole())
    pieces = [(*key, values) for key, values in (await service.state()).items()] if known.is_loaded else []
    return known, join_pieces(pieces)


def run(test: Callable[[Service], Coroutine[Any, Any, Any]]) -> Any:
    """Run something on an event loop beside a new service that two ranks train on."""

    async def main() -> Any:
        service = Service()
        try:
            await train(await service.start(), "")
            await load(service.coordinator, "")
            return await asyncio.wait_for(test(service), LIMIT_S)
        finally:
            for life in service.lives:
                life.bury()

    with groups_without_sockets(FORMING_TIMEOUT_S):
        return asyncio.run(main())


async def require_same(service: Service, before: tuple[Knowledge, dict[tuple[int, str], torch.Tensor]]) -> None:
    """See that nothing but the shards is another."""
    (known, state), (known_before, state_before) = await known_and_state(service), before
    for name in ("spec", "workers", "left", "timeline"):
        assert getattr(known, name) == getattr(known_before, name), name
    assert list(known.requests)[: len(known_before.requests)] == list(known_before.requests)
    assert state.keys() == state_before.keys()
    assert all(torch.equal(state[key], state_before[key]) for key in state)


async def require_resized(service: Service) -> None:
    """See that there is one other set, and that it can do what the one before could."""
    assert [number for number, _ in service.sets] == [1]
    assert len(service.actors) == service.config.num_shards == AFTER
    config, handles = await service.coordinator.locate()
    assert (config, len(handles)) == (service.config, AFTER)
    await service.coordinator.leave(1, "1-a")
    assert all(1 in report.left for report in await service.reports())


def test_new_shards_take_over_what_the_others_had() -> None:
    async def test(service: Service) -> None:
        await service.coordinator.leave(0, "0-a")
        before = await known_and_state(service)
        await resize(service.coordinator)
        await require_same(service, before)
        await resize(service.coordinator)  # who asks again
        await require_resized(service)
        await service.coordinator.resize(1, (), "another")
        assert (list(service.sets), service.config.num_shards) == ([(2, 1)], 1)

    run(test)


def test_coordinator_that_dies_leaves_all_old_shards_or_all_new_ones() -> None:
    async def die(service: Service, moment: int) -> bool:
        before = await known_and_state(service)
        service.life.end_after(moment)
        await service.until_over(resize(service.coordinator))
        was_done = not service.life.is_over.is_set()
        await service.start()
        await require_same(service, before)
        await resize(service.coordinator)
        await require_same(service, before)
        await require_resized(service)
        return was_done

    moment = 0
    while not run(lambda service: die(service, moment)):  # noqa: B023
        moment += 1
    assert moment > 3 * AFTER, "at least a death before each of the new shards' calls"


@pytest.mark.parametrize("method", ["inherit", "take_office"])
def test_coordinator_that_was_replaced_cannot_put_others_in_the_shards_place(method: str) -> None:
    """It is alive and goes on when another one has ended the shards that it had begun to put in place."""

    async def test(service: Service) -> None:
        old, before, resign = service.coordinator, await known_and_state(service), service.resign
        cut_off = CutOff(service.life, method)
        resizing = asyncio.ensure_future(resize(old))
        await cut_off.is_reached.wait()
        await service.start()
        await require_same(service, before)
        cut_off.goes_on.set()
        with pytest.raises(EpochError, match="which was replaced"):
            await resizing
        resign.assert_called()
        await require_same(service, before)
        assert list(service.sets) == [(0, 0)]

    run(test)


class CutOff:
    """Makes a coordinator wait before it calls a method of a shard."""

    def __init__(self, life: Life, method: str) -> None:
        self.is_reached, self.goes_on = asyncio.Event(), asyncio.Event()
        self._call, self._method = life.call, method
        life.call = self._wait_and_call  # type: ignore[method-assign]

    def _wait_and_call(self, method: Any, arguments: Sequence[Any]) -> asyncio.Future[Any]:
        if method.__name__ != self._method:
            return self._call(method, arguments)

        async def wait_and_call() -> Any:
            self.is_reached.set()
            await self.goes_on.wait()
            return await self._call(method, arguments)

        return asyncio.ensure_future(wait_and_call())


def test_resize_that_fails_changes_nothing() -> None:
    async def test(service: Service) -> None:
        before, service.room = await known_and_state(service), AFTER - 1
        with pytest.raises(PlacementError, match="no room for 3 shards"):
            await resize(service.coordinator)
        service.room = AFTER
        service.actors[1]._steps.job()._lost = "shard 1 was interrupted"
        with pytest.raises(NotRegisteredError, match="shard 1 was interrupted"):
            await resize(service.coordinator)
        service.actors[1]._steps.job()._lost = None
        await require_same(service, before)
        assert list(service.sets) == [(0, 0)]
        await resize(service.coordinator)
        await require_resized(service)

    run(test)


def test_service_without_a_job_or_without_parameters_takes_other_shards_or_refuses() -> None:
    async def test() -> None:
        service = Service()
        await service.start()
        await resize(service.coordinator)
        await service.require_whole()
        assert (list(service.sets), len(service.actors)) == ([(1, 1)], AFTER)
        await register(service.coordinator, "")
        with pytest.raises(NotRegisteredError, match="no parameters yet"):
            await service.coordinator.resize(NUM_SHARDS, (), "too early")
        assert list(service.sets) == [(1, 1)]

    with groups_without_sockets(FORMING_TIMEOUT_S):
        asyncio.run(test())


def test_shards_leave_a_node_that_is_drained_and_no_other() -> None:
    async def test(service: Service) -> None:
        before = await known_and_state(service)
        assert not await service.coordinator.drain("node-7", "elsewhere")
        assert list(service.sets) == [(0, 0)]
        assert await service.coordinator.drain("node-0", "drain")
        assert await service.coordinator.drain("node-0", "drain")  # who asks again
        await require_same(service, before)
        assert (list(service.sets), service.config.num_shards) == ([(1, 1)], NUM_SHARDS)

    run(test)


def test_shards_leave_a_node_that_ray_drains_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room at first."""
    monkeypatch.setattr("stepwell.server.draining.LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr("stepwell.server.draining.TRY_AGAIN_S", 0.01)

    async def test(service: Service) -> None:
        before, service.room = await known_and_state(service), 0
        service.drained = ["node-0"]
        await service.was_refused.wait()
        await require_same(service, before)
        service.room = NUM_SHARDS
        while (0, 0) in service.sets:
            await asyncio.sleep(0.001)
        await require_same(service, before)
        service.resign.assert_not_called()

    run(test)


def test_coordinator_leaves_a_node_that_ray_drains_after_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell.server.draining.LOOK_AGAIN_S", 0.01)

    async def test(service: Service) -> None:
        sets, service.here = list[object](), "node-0"
        service.resign.side_effect = lambda: sets.append(list(service.sets))
        service.drained = ["node-0"]
        while not sets:
            await asyncio.sleep(0.001)
        assert sets[0] == [(1, 1)]

    run(test)
