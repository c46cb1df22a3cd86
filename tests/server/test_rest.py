"""A shard's actor and its keepers without Ray: copies that are made though no step comes, and none begins meanwhile."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest

from stepwell.server import stepping
from stepwell.server.arrangement import Arrangement, KeeperPlace
from stepwell.server.config import ServiceConfig
from stepwell.server.keeper import Keeper
from stepwell.server.keeper_line import KeeperLine
from stepwell.server.messages import pack_target
from stepwell.server.shard_actor import ShardActor
from stepwell.sharding.errors import CheckpointRestoreNeededError, ServiceError, ShardLostError
from stepwell.sharding.vote import Decision
from tests.server.test_keeper_line import Handle
from tests.server.test_shard_actor import EPOCH, RETURNED, Line, error_of, run_test


async def keep(line: Line, node: str = "elsewhere") -> Keeper:
    """Have the line's actor, which is "here", kept by a keeper on some node; returns when there is a copy."""
    keeper = Keeper()
    place = KeeperPlace(0, Handle(keeper), node, "only")
    await line.actor.keep_with(EPOCH, Arrangement("here", (place,), frozenset((0,))))
    await until_logged(keeper, 0)
    return keeper


async def until_logged(keeper: Keeper, num_logged: int) -> None:
    """Wait until a keeper has a copy and so many steps after it."""
    while True:
        held = (await keeper.holdings()).get(0)
        if held is not None and held.step is not None and held.num_logged == num_logged:
            return
        await asyncio.sleep(0.005)


async def copied(line: Line) -> None:
    """Wait until a copy has been made, or could not be."""
    copying = line.actor._redundancy._copying
    assert copying is not None
    await asyncio.wait([copying])


async def copy_after_step(line: Line) -> None:
    """Take a step, and make a copy after it."""
    await step(line)
    assert line.steps._step is not None
    await asyncio.wait([line.steps._step])
    await line.steps.copy_at_rest()
    await copied(line)


async def step(line: Line) -> None:
    for reply in [await line.push(rank) for rank in range(2)]:
        assert (await reply).decision is Decision.COMMIT


@run_test
async def test_shard_at_rest_is_copied_when_it_is_told_of_its_keepers(line: Line) -> None:
    keeper = await keep(line)
    assert (await keeper.holdings())[0].step == 1


@run_test
async def test_gradients_are_let_go_when_no_step_comes(line: Line) -> None:
    keeper = await keep(line)
    with mock.patch.object(stepping, "IDLE_S", 0.05):
        await step(line)
        await until_logged(keeper, 0)
    assert (await keeper.holdings())[0].step == 2


@run_test
async def test_gradients_are_let_go_when_a_worker_leaves(line: Line) -> None:
    keeper = await keep(line)
    await step(line)
    await until_logged(keeper, 1)
    await line.actor.leave(EPOCH, [1])
    await until_logged(keeper, 0)


@run_test
async def test_no_step_begins_while_a_copy_is_noted(line: Line) -> None:
    keeper = await keep(line)
    await step(line)
    async with line.busy():
        copying = line.begin(line.steps.copy_at_rest())
        await line.settle()
        replies = [await line.push(rank) for rank in range(2)]
        assert not line.steps.is_stepping
    await copying
    for reply in replies:
        assert (await reply).decision is Decision.COMMIT
    await until_logged(keeper, 1)
    assert (await keeper.holdings())[0].step == 2


@run_test
async def test_shard_that_is_lost_for_good_says_what_to_restore(line: Line) -> None:
    reply = await line.push(0)
    await line.actor.give_up(EPOCH, CheckpointRestoreNeededError("restore /x"))
    with pytest.raises(Exception, match="restore /x") as caught:
        await reply
    assert isinstance(caught.value.error, CheckpointRestoreNeededError)  # type: ignore[attr-defined]
    line.steps.shard = None
    with pytest.raises(CheckpointRestoreNeededError, match="restore /x"):
        line.steps.job()


@run_test
async def test_memory_of_a_copy_that_may_not_have_been_kept_is_not_written_again(line: Line) -> None:
    """Nor is that of the copy before, which the keeper may still have."""
    await keep(line, "here")
    redundancy = line.actor._redundancy
    await copied(line)
    await copy_after_step(line)
    assert len(redundancy._memories) == 2
    with mock.patch.object(KeeperLine, "keep", side_effect=ServiceError("no answer")):
        await copy_after_step(line)
    assert redundancy._memories == []


@run_test
async def test_shard_whose_step_rests_tells_nothing_that_may_be_old(line: Line) -> None:
    await keep(line)
    line.steps.collective = mock.Mock(all_reduce=mock.Mock(side_effect=ShardLostError("a peer is lost")))
    for reply in [await line.push(rank) for rank in range(2)]:
        assert isinstance(await error_of(reply), ShardLostError)
    with pytest.raises(ShardLostError, match="shard 0: step 2 rests until lost shards are back"):
        await line.actor.parameters(0, pack_target(RETURNED))
    with pytest.raises(ShardLostError, match="step 2 rests"):
        await line.actor.export()
    # Of a worker that knows from another shard that step 2 was taken.
    assert isinstance(await error_of(await line.push(0, sequence=3)), ShardLostError)


@run_test
async def test_shard_that_was_not_told_its_keepers_is_not_given_up(line: Line) -> None:
    again = ShardActor(ServiceConfig("test", redundancy=1), 0, is_successor=True)
    with pytest.raises(ShardLostError, match="shard 0 was started again, and does not know its keepers yet"):
        await again.rebuild(EPOCH)
