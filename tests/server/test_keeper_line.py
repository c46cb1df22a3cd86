"""A shard's line to its keepers without Ray: what is shown, what is sent, and what a shard comes back with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any
from unittest import mock

import numpy as np
import pytest

from stepwell.optim import ProdigyRule
from stepwell.server import keeper_line
from stepwell.server.arrangement import Arrangement, KeeperPlace
from stepwell.server.keeper import Keeper
from stepwell.server.keeper_line import Received
from stepwell.server.messages import Exchange, Target, pack_exchange, pack_push
from stepwell.server.redundancy import Redundancy, rebuild
from stepwell.sharding.errors import SegmentError, ShardLostError
from stepwell.sharding.push import Push
from stepwell.sharding.segments import ALIGNMENT, Address, Placement, allocate
from stepwell.sharding.shard import Shard
from tests.zoo import Run, State, assert_same_state, small

LIMIT_S = 60.0
HERE, ELSEWHERE = "here", "elsewhere"
LOG_STEPS = 4


class Handle:
    """A keeper's handle. What it is asked takes as long as the event loop needs for other things."""

    def __init__(self, actor: Keeper) -> None:
        self.actor, self.is_dead, self.num_sent = actor, False, 0

    def __getattr__(self, name: str) -> Any:
        async def answer(*arguments: Any) -> Any:
            if self.is_dead:
                raise ShardLostError("the keeper is gone")
            self.num_sent += name == "put"
            return await getattr(self.actor, name)(*arguments)

        def remote(*arguments: Any) -> asyncio.Future[Any]:
            call = asyncio.ensure_future(answer(*arguments))
            call.add_done_callback(asyncio.Future.exception)  # which nobody need look at
            return call

        return mock.Mock(remote=remote)


class Kept:
    """A shard that trains, one of one, and its keepers on the nodes named.

    Args:
        nodes: Of the keepers.
        shows: Whether gradients lie in memory that keepers of the shard's node can open.
    """

    def __init__(self, *nodes: str, shows: bool = False) -> None:
        self.handles = [Handle(Keeper()) for _ in nodes]
        self.nodes, self.shows = nodes, shows
        self.run = Run(small(), ProdigyRule(d0=1e-2), world_size=2)
        self.shard = self.run.group.shards[0]
        self.redundancy = self.line_up()

    def line_up(self, node: str = HERE) -> Redundancy:
        """The shard's part, which knows its keepers; again for a process that comes back on ``node``."""
        redundancy = Redundancy(0, log_steps=LOG_STEPS, taken=tuple)
        places = (KeeperPlace(index, handle, self.nodes[index], "first") for index, handle in enumerate(self.handles))
        redundancy.arrange(Arrangement(node, tuple(places), frozenset(range(len(self.nodes)))))
        return redundancy

    async def copy(self) -> None:
        await self.redundancy.copy_now(self.shard, self.redundancy.moment(self.shard))

    async def step(self) -> None:
        """A step as an actor takes it."""
        pushes = [push for rank in range(2) for push in self.run.pushes(rank)]
        for push in pushes:
            self.redundancy.receive(push.header, self._received(push))
        await self.redundancy.log(self.shard, pushes)
        for push in pushes:
            self.run.group.push([push])
        moment = self.redundancy.moment_if_due(self.shard)
        if moment is not None:
            self.redundancy.begin_copy(self.shard, moment)

    async def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            await self.step()

    async def come_back(self, node: str = HERE) -> State:
        """Lose the shard, and have another process on ``node`` become what it was; its state then."""
        self.redundancy = self.line_up(node)
        found = await self.redundancy.fetch()
        line, most = found[0]
        shard = Shard(self.shard.spec, shard=0, num_shards=1, timeline=most.copy.status.timeline - 1)
        rebuild(shard, most.copy, await line.segment(most.copy.memory))
        async for logged in self.redundancy.steps(line, most):
            running = shard.replay(logged)
            while running.vector is not None:  # of one shard
                running.take(running.vector)
        self.redundancy.come_back(found)
        self.shard = self.run.group.shards[0] = shard
        return self.run.state()

    async def num_logged(self) -> list[int]:
        """Steps in each keeper's log; -1 where there is no copy."""
        held = [(await handle.actor.holdings()).get(0) for handle in self.handles]
        return [-1 if each is None or each.step is None else each.num_logged for each in held]

    def _received(self, push: Push) -> Received:
        placement, parts = None, list(push.gradient)
        if self.shows:
            segment, parts = allocate([(part.numel(), part.dtype) for part in push.gradient])
            for part, gradient in zip(parts, push.gradient, strict=True):
                part.copy_(gradient)
            spans = [segment.span_of(part) for part in parts]
            placement = Placement(segment.address, tuple(span for span in spans if span is not None))
        exchange = Exchange(pack_push(push.header), placement, Target("pushed", ("float32",)), 1.0)
        return Received(pack_exchange(exchange), tuple(parts), placement, {})


def run_test(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), LIMIT_S))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def settled(kept: Kept) -> None:
    """Let a copy that is under way end."""
    if kept.redundancy._copying is not None:
        await kept.redundancy._copying


@pytest.mark.parametrize("shows", [False, True])
@pytest.mark.parametrize("node", [HERE, ELSEWHERE, "a third"])
@pytest.mark.parametrize("nodes", [[HERE], [ELSEWHERE], [HERE, ELSEWHERE]])
def test_shard_comes_back_with_its_bits_from_wherever_its_keepers_are(
    nodes: list[str], node: str, shows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_line, "PIECE_BYTES", 1000)

    async def test() -> None:
        kept = Kept(*nodes, shows=shows)
        await kept.copy()
        await kept.steps(LOG_STEPS // 2 - 1)
        assert set(await kept.num_logged()) == {LOG_STEPS // 2 - 1}
        before = kept.run.state()
        assert_same_state(await kept.come_back(node), before)
        await kept.steps(LOG_STEPS)
        await settled(kept)
        before = kept.run.state()
        assert_same_state(await kept.come_back(), before)

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))


@run_test
async def test_nothing_is_sent_to_a_keeper_that_can_be_shown_it() -> None:
    kept = Kept(HERE, ELSEWHERE, shows=True)
    await kept.copy()
    await kept.step()
    near, far = kept.handles
    assert near.num_sent == 0
    assert far.num_sent == 1 + 2  # the copy, and two ranks' gradients
    assert kept.redundancy.kept_from(0, 1) == 1


@run_test
async def test_worker_memory_is_let_go_where_gradients_are_sent() -> None:
    kept = Kept(ELSEWHERE, shows=True)
    await kept.copy()
    await kept.steps(1)
    assert kept.redundancy.kept_from(0, 1) == 2


@run_test
async def test_worker_memory_stays_as_it_is_after_the_shard_came_back_elsewhere() -> None:
    kept = Kept(HERE, shows=True)
    await kept.copy()
    await kept.step()
    await kept.come_back(ELSEWHERE)
    assert kept.redundancy.kept_from(0, 1) == 1
    kept.shows = False
    await kept.steps(LOG_STEPS)
    await settled(kept)
    assert kept.redundancy.kept_from(0, kept.shard.sequence) == kept.shard.sequence + 1


@run_test
async def test_memory_of_a_keeper_elsewhere_is_reused_and_freed_at_rest() -> None:
    kept = Kept(ELSEWHERE)
    keeper = kept.handles[0].actor
    await kept.copy()
    for _ in range(3 * LOG_STEPS + 1):
        await kept.step()
        await settled(kept)
    made = len(keeper._held) + len(keeper._spare.get(0, []))
    assert made <= 2 + 2 * (LOG_STEPS + 1)  # two copies, and a log of two ranks' gradients
    moment = kept.redundancy.moment_if_due(kept.shard, at_rest=True)
    assert moment is not None
    kept.redundancy.begin_copy(kept.shard, moment)
    await settled(kept)
    assert (await kept.num_logged(), len(keeper._held), keeper._spare) == ([0], 1, {})
    assert kept.redundancy.moment_if_due(kept.shard, at_rest=True) is None


@run_test
async def test_keeper_that_is_lost_is_gone_on_without_and_gets_a_copy_when_it_is_back() -> None:
    kept = Kept(HERE, ELSEWHERE)
    await kept.copy()
    kept.handles[1].is_dead = True
    await kept.steps(LOG_STEPS)
    await settled(kept)
    before = kept.run.state()
    kept.handles[1] = Handle(Keeper())
    places = (
        KeeperPlace(index, handle, node, "second" if index else "first")
        for index, (handle, node) in enumerate(zip(kept.handles, kept.nodes, strict=True))
    )
    kept.redundancy.arrange(Arrangement(HERE, tuple(places), frozenset((0, 1))))
    moment = kept.redundancy.moment_if_due(kept.shard)
    assert moment is not None
    kept.redundancy.begin_copy(kept.shard, moment)
    await settled(kept)
    assert await kept.num_logged() == [0, 0]
    kept.handles[0] = Handle(Keeper())
    assert_same_state(await kept.come_back(), before)


@run_test
async def test_newest_of_several_keepers_counts() -> None:
    kept = Kept(ELSEWHERE, ELSEWHERE)
    await kept.copy()
    await kept.step()
    kept.handles[0].is_dead = True  # and so is never told to forget what it has
    await kept.steps(LOG_STEPS)
    await settled(kept)
    before = kept.run.state()
    kept.handles[0].is_dead = False
    assert_same_state(await kept.come_back(), before)
    assert [line.logged_after is None for line in kept.redundancy._lines.values()] == [True, False]


@run_test
async def test_keeper_that_no_longer_keeps_a_shard_does_until_another_has_all() -> None:
    kept = Kept(HERE, ELSEWHERE)
    places = tuple(KeeperPlace(index, handle, kept.nodes[index], "first") for index, handle in enumerate(kept.handles))
    kept.redundancy.arrange(Arrangement(HERE, places, frozenset((0,))))
    await kept.copy()
    kept.redundancy.arrange(Arrangement(HERE, places, frozenset((1,))))
    await kept.redundancy.log(kept.shard, [])
    assert await kept.num_logged() == [0, -1]
    await kept.step()
    await settled(kept)
    assert await kept.num_logged() == [-1, 0]


@run_test
async def test_piece_of_what_was_dropped_is_refused() -> None:
    keeper = Keeper()
    name = Address(0, -1, 3 * ALIGNMENT, b"n" * 16)
    await keeper.put(0, name, ALIGNMENT, np.ones(8, np.uint8))
    await keeper.forget(0)
    with pytest.raises(SegmentError, match="dropped"):
        await keeper.put(0, name, 2 * ALIGNMENT, np.ones(8, np.uint8))
    with pytest.raises(SegmentError, match="kept here"):
        await keeper.read(name.token, ALIGNMENT, 8)
    assert not keeper._held
