"""A shard's actor without Ray: what is told to whom, whatever order pushes, pulls and everything else come in.

The data thread is held up where a test needs something to come while a step or a load waits for it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import pytest

from stepwell.optim import SGDRule
from stepwell.server.collective import Collective
from stepwell.server.config import ServiceConfig
from stepwell.server.messages import pack_holdings, pack_push, to_wire
from stepwell.server.shard_actor import ShardActor
from stepwell.sharding.buffers import StateSource
from stepwell.sharding.errors import (
    AttemptError,
    CheckpointError,
    IncarnationError,
    MissingRankError,
    StepwellError,
    TimelineError,
)
from stepwell.sharding.push import Push
from stepwell.sharding.reports import StepResult
from stepwell.sharding.vote import Decision
from tests.zoo import Run, assert_same_tensors, small, state_source

LIMIT_S = 20.0


def run_test(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on an event loop, beside an actor with two workers after one step."""

    def run() -> None:
        async def main() -> None:
            with mock.patch("ray.util.get_node_ip_address", return_value="127.0.0.1"):
                line = Line(ShardActor(ServiceConfig("test"), 0))
            for rank in range(2):
                await line.push(rank)
            for rank in range(2):
                assert (await line.pull(rank, sequence=1)).decision is Decision.COMMIT
            await asyncio.wait_for(test(line), LIMIT_S)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


class Line:
    """The line to an actor on whose shard a :class:`tests.zoo.Run` trains."""

    def __init__(self, actor: ShardActor) -> None:
        self.actor = actor
        self.run = Run(small(), SGDRule(lr=0.1), world_size=2)
        self.shard = actor._shard = self.run.group.shards[0]
        actor._collective = Collective(1, 0, 1, host="", store_address=("", 0), forming_timeout_s=1.0, timeout_s=1.0)

    async def push(self, rank: int, **header: Any) -> str | StepwellError:
        return await self.send(self.run.pushes(rank, **header)[0])

    async def send(self, push: Push) -> str | StepwellError:
        return await self.actor.push(pack_push(push.header), [to_wire(part) for part in push.gradient])

    async def reply(
        self, rank: int, *, sequence: int = 2, attempt: int = 0, incarnation: str | None = None
    ) -> StepResult | StepwellError:
        sender = incarnation or f"worker-{rank}"
        pulled = self.actor.pull(1, sequence, rank, sender, attempt, ["float32"], "pushed", LIMIT_S)
        return (await pulled)[0]

    async def pull(self, rank: int, **which: Any) -> StepResult:
        reply = await self.reply(rank, **which)
        assert isinstance(reply, StepResult), reply
        return reply

    def begin(self, call: Awaitable[Any]) -> asyncio.Future[Any]:
        return asyncio.ensure_future(call)

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Within this block the data thread is at work on something else."""
        free = threading.Event()
        self.actor._data.submit(free.wait, LIMIT_S)
        try:
            yield
        finally:
            free.set()

    async def settle(self) -> None:
        """Let the event loop do all that it can without the data thread."""
        for _ in range(20):
            await asyncio.sleep(0)


# Pushes that come between a step's beginning and its first look at them


@run_test
async def test_newer_attempt_comes_too_late_for_a_step_that_has_begun(line: Line) -> None:
    oracle = Run(small(), SGDRule(lr=0.1), world_size=2).steps(1)
    oracle.step()
    async with line.busy():
        await line.push(0)
        assert await line.push(1) == "complete"
        await line.settle()
        zeros = {index: grad * 0.0 for index, grad in line.run.gradients(1, 1).items()}
        answer = await line.push(1, attempt=1, gradients=zeros)
        assert isinstance(answer, AttemptError), answer
    assert (await line.pull(0)).decision is Decision.COMMIT
    assert (await line.pull(1)).decision is Decision.COMMIT
    assert_same_tensors(line.run.params(), oracle.params())


@run_test
async def test_rank_comes_too_late_for_a_step_that_is_given_up(line: Line) -> None:
    async with line.busy():
        await line.push(0)
        await line.actor.attend(1, 2)
        await line.settle()
        assert isinstance(await line.push(1), AttemptError)
    assert isinstance((await line.pull(0)).error, MissingRankError)
    for rank in range(2):
        await line.push(rank, attempt=1)
    for rank in range(2):
        assert (await line.pull(rank, attempt=1)).decision is Decision.COMMIT


# Successors


@run_test
async def test_successor_is_not_told_what_became_of_its_predecessors_push(line: Line) -> None:
    """Both count their attempts from 0; the successor's pull comes before its push."""
    await line.push(1)
    await line.actor.attend(1, 2)
    assert (await line.pull(1)).decision is Decision.ABORT
    await line.actor.admit(1, "successor", pack_holdings(None))
    pulled = line.begin(line.pull(1, incarnation="successor"))
    await line.settle()
    assert not pulled.done()
    await line.push(0)
    await line.push(1, incarnation="successor")
    assert (await pulled).decision is Decision.COMMIT


@run_test
async def test_worker_whose_push_a_successor_replaced_is_not_told_that_it_was_taken(line: Line) -> None:
    await line.push(1)
    pulled = line.begin(line.reply(1))
    await line.settle()
    await line.actor.admit(1, "successor", pack_holdings(None))
    await line.push(1, incarnation="successor")
    await line.push(0)
    assert isinstance(await pulled, IncarnationError)
    assert (await line.pull(1, incarnation="successor")).decision is Decision.COMMIT
    assert isinstance(await line.reply(1), IncarnationError), "a pull that comes after the decision"


@run_test
async def test_attempt_that_was_replaced_is_not_told_that_it_was_taken(line: Line) -> None:
    await line.push(1)
    pulled = line.begin(line.reply(1))
    await line.settle()
    await line.push(1, attempt=1)
    await line.push(0)
    assert isinstance(await pulled, AttemptError)
    assert isinstance(await line.reply(1), AttemptError)
    assert (await line.pull(1, attempt=1)).decision is Decision.COMMIT


# Pulls before and after


@run_test
async def test_pull_may_come_before_its_push_and_after_the_decision(line: Line) -> None:
    pulled = line.begin(line.pull(0))
    await line.settle()
    for rank in range(2):
        await line.push(rank)
    assert (await pulled).decision is Decision.COMMIT
    assert await line.pull(1) == await pulled


@run_test
async def test_pull_of_the_next_attempt_may_come_while_this_one_is_given_up(line: Line) -> None:
    async with line.busy():
        await line.push(0)
        await line.actor.attend(1, 2)
        pulled = line.begin(line.pull(0, attempt=1))
        await line.settle()
    assert (await line.pull(0)).decision is Decision.ABORT
    assert not pulled.done()
    for rank in range(2):
        await line.push(rank, attempt=1)
    assert (await pulled).decision is Decision.COMMIT


@run_test
async def test_decided_waits_for_a_step_that_is_under_way_and_for_no_other(line: Line) -> None:
    await line.push(0)
    assert await line.actor.decided(1, 2, LIMIT_S) is None
    async with line.busy():
        await line.push(1)
        asked = line.begin(line.actor.decided(1, 2, LIMIT_S))
        await line.settle()
        assert not asked.done()
    assert (await asked).decision is Decision.COMMIT


# Holding


@run_test
async def test_hold_counts_a_step_once_that_ends_at_that_moment(line: Line) -> None:
    """The data thread is done with it, and the event loop does not know yet."""
    async with line.busy():
        for rank in range(2):
            await line.push(rank)
        await line.settle()
    deadline = time.monotonic() + LIMIT_S
    while line.shard.sequence < 2:
        assert time.monotonic() < deadline
    assert await line.actor.hold() == 2
    assert (await line.actor.settle(2, LIMIT_S)).sequence == 2
    await line.actor.release()


@run_test
async def test_shard_that_is_called_to_vote_while_it_is_held_votes_when_it_may(line: Line) -> None:
    await line.push(0)
    assert await line.actor.hold() == 1
    pulled = line.begin(line.reply(0))
    await line.actor.attend(1, 2)
    await line.settle()
    assert not line.actor._is_stepping
    status = await line.actor.settle(2, LIMIT_S)
    assert status.sequence == 1
    result = await pulled
    assert isinstance(result.error, MissingRankError)
    await line.actor.release()


@run_test
async def test_call_to_vote_that_comes_late_begins_no_other_try(line: Line) -> None:
    await line.push(0)
    await line.actor.attend(1, 2)
    assert (await line.pull(0)).decision is Decision.ABORT
    await line.push(0, attempt=1)
    await line.actor.attend(1, 2)
    assert not line.actor._is_stepping
    await line.push(1)
    assert (await line.pull(0, attempt=1)).decision is Decision.COMMIT


# Loads


@run_test
async def test_no_step_begins_while_a_load_waits_for_its_turn(line: Line) -> None:
    checkpoint = line.run.params()
    async with line.busy():
        loaded = line.begin(line.actor._load(lambda: line.run.group.load(state_of(line), timeline=2)))
        await line.settle()
        answers = [await line.push(rank) for rank in range(2)]
        assert answers == ["waiting", "complete"]
        await line.settle()
        pulled = [line.begin(line.reply(rank)) for rank in range(2)]
        await line.settle()
    await loaded
    for reply in pulled:
        assert isinstance(await reply, TimelineError)
    assert (line.shard.timeline, line.shard.sequence) == (2, 1)
    assert_same_tensors(line.run.params(), checkpoint)


def state_of(line: Line) -> StateSource:
    values = {(index, "master_param"): value for index, value in enumerate(line.run.params())}
    return state_source(values, sequence=1, step=1)


@run_test
async def test_load_that_fails_tells_those_whose_pushes_it_swept_away(line: Line) -> None:
    await line.push(0)
    pulled = line.begin(line.reply(0))
    await line.settle()

    def fail() -> None:
        with mock.patch.object(line.shard.buffers, "load", side_effect=CheckpointError("damaged")):
            line.shard.load(state_of(line), timeline=2)

    with pytest.raises(CheckpointError):
        await line.actor._load(fail)
    assert isinstance(await pulled, TimelineError)
    await line.actor.release()
    assert not line.actor._is_stepping


@run_test
async def test_load_that_fails_before_it_changes_anything_leaves_the_pushes(line: Line) -> None:
    await line.push(0)
    pulled = line.begin(line.pull(0))
    with pytest.raises(CheckpointError, match="/nowhere"):
        await line.actor.restore("/nowhere", 2)
    await line.push(1)
    assert (await pulled).decision is Decision.COMMIT
