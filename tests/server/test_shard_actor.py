"""A shard's actor without Ray: what is told to whom, whatever order pushes and everything else come in.

The data thread is held up where a test needs something to come while a step or a load waits for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import subprocess
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from stepwell.optim import SGDRule
from stepwell.server.collective import Collective, Generation
from stepwell.server.config import ServiceConfig
from stepwell.server.keeper_line import Received
from stepwell.server.meeting import Meeting
from stepwell.server.messages import (
    Exchange,
    PieceHeader,
    Target,
    pack_exchange,
    pack_holdings,
    pack_job,
    pack_piece,
    pack_push,
    pack_target,
)
from stepwell.server.shard_actor import ShardActor
from stepwell.server.wire import from_wire, to_wire
from stepwell.server.workers import Worker
from stepwell.sharding.buffers import StateSource
from stepwell.sharding.errors import (
    AttemptError,
    CheckpointError,
    IncarnationError,
    MessageError,
    MissingRankError,
    RequestError,
    SegmentError,
    ShapeMismatchError,
    StepwellError,
    TimelineError,
)
from stepwell.sharding.push import Push
from stepwell.sharding.reports import StepResult
from stepwell.sharding.segments import Placement, Span, allocate
from stepwell.sharding.vote import Decision
from tests.zoo import Run, assert_same_tensors, small, state_source

LIMIT_S = 20.0
RETURNED = Target("pushed", ("float32",))
GENERATION = Generation(1, 1)
EPOCH = 1


def run_test(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test on an event loop, beside an actor with two workers after one step."""

    def run() -> None:
        async def main() -> None:
            with mock.patch("ray.util.get_node_ip_address", return_value="127.0.0.1"):
                line = Line(ShardActor(ServiceConfig("test"), 0))
            for reply in [await line.push(rank) for rank in range(2)]:
                assert (await reply).decision is Decision.COMMIT
            await asyncio.wait_for(test(line), LIMIT_S)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


class Refused(Exception):
    """A reply that is an error."""

    def __init__(self, error: StepwellError) -> None:
        super().__init__(str(error))
        self.error = error


Reply = asyncio.Future[StepResult]


async def error_of(reply: Reply) -> StepwellError:
    """Why a push was refused, or what befell its step."""
    with pytest.raises(Refused) as caught:
        await reply
    return caught.value.error


class Line:
    """The line to an actor on whose shard a :class:`tests.zoo.Run` trains."""

    def __init__(self, actor: ShardActor) -> None:
        self.actor, self.steps = actor, actor._steps
        self.run = Run(small(), SGDRule(lr=0.1), world_size=2)
        self.shard = self.steps.shard = self.run.group.shards[0]
        self.steps.collective = Collective(
            GENERATION, 0, 1, host="", meeting=Meeting(), forming_timeout_s=1.0, timeout_s=1.0
        )

    async def push(self, rank: int, **header: Any) -> Reply:
        """Begin an exchange, and let the actor take the push; what comes of it."""
        return await self.send(self.run.pushes(rank, **header)[0])

    async def send(self, push: Push, *, gradient: Placement | None = None, target: Target = RETURNED) -> Reply:
        async def exchange() -> StepResult:
            request = pack_exchange(Exchange(pack_push(push.header), gradient, target, LIMIT_S))
            wires = [] if gradient is not None else [to_wire(part) for part in push.gradient]
            reply, self.returned, _ = await self.actor.exchange(request, wires)
            if isinstance(reply, StepwellError):
                raise Refused(reply)
            return reply

        reply = asyncio.ensure_future(exchange())
        await self.settle()
        return reply

    def begin(self, call: Awaitable[Any]) -> asyncio.Future[Any]:
        return asyncio.ensure_future(call)

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Within this block the data thread is at work on something else."""
        free = threading.Event()
        self.steps._data.submit(free.wait, LIMIT_S)
        try:
            yield
        finally:
            free.set()

    async def settle(self) -> None:
        """Let the event loop do all that it can without the data thread."""
        for _ in range(20):
            await asyncio.sleep(0)


def params_after(num_steps: int) -> list[torch.Tensor]:
    """The parameters after steps that nothing disturbs."""
    run = Run(small(), SGDRule(lr=0.1), world_size=2)
    for _ in range(num_steps):
        run.step()
    return run.params()


# Pushes that come between a step's beginning and its first look at them


@run_test
async def test_newer_attempt_comes_too_late_for_a_step_that_has_begun(line: Line) -> None:
    expected = params_after(2)
    async with line.busy():
        replies = [await line.push(rank) for rank in range(2)]
        zeros = {index: grad * 0.0 for index, grad in line.run.gradients(1, 1).items()}
        assert isinstance(await error_of(await line.push(1, attempt=1, gradients=zeros)), AttemptError)
    for reply in replies:
        assert (await reply).decision is Decision.COMMIT
    assert_same_tensors(line.run.params(), expected)


@run_test
async def test_rank_comes_too_late_for_a_step_that_is_given_up(line: Line) -> None:
    async with line.busy():
        first = await line.push(0)
        await line.actor.attend(GENERATION, 2)
        await line.settle()
        assert isinstance(await error_of(await line.push(1)), AttemptError)
    assert isinstance((await first).error, MissingRankError)
    for reply in [await line.push(rank, attempt=1) for rank in range(2)]:
        assert (await reply).decision is Decision.COMMIT


# Repeats


@run_test
async def test_repeat_is_told_what_the_first_is_before_during_and_after_the_step(line: Line) -> None:
    expected = params_after(2)
    replies = [await line.push(0), await line.push(0)]
    async with line.busy():
        replies.append(await line.push(1))
        replies += [await line.push(rank) for rank in range(2)]
        assert not any(reply.done() for reply in replies)
    results = [await reply for reply in replies]
    results += [await (await line.send(line.run.pushes(0, sequence=2)[0]))]
    assert {result.decision for result in results} == {Decision.COMMIT}
    assert {result.sequence for result in results} == {2}
    assert_same_tensors(line.run.params(), expected)


@run_test
async def test_repeat_of_a_push_that_was_given_up_is_a_new_try(line: Line) -> None:
    reply = await line.push(0)
    await line.actor.attend(GENERATION, 2)
    assert (await reply).decision is Decision.ABORT
    replies = [await line.push(0), await line.push(1)]
    for each in replies:
        assert (await each).decision is Decision.COMMIT


# Successors


@run_test
async def test_successor_is_not_told_what_became_of_its_predecessors_push(line: Line) -> None:
    """Both count their attempts from 0."""
    first = await line.push(1)
    await line.actor.attend(GENERATION, 2)
    assert (await first).decision is Decision.ABORT
    await line.actor.admit(EPOCH, {1: Worker("successor", pack_holdings(None))})
    reply = await line.push(1, incarnation="successor")
    assert not reply.done()
    await line.push(0)
    assert (await reply).decision is Decision.COMMIT


@run_test
async def test_worker_whose_push_a_successor_replaced_is_not_told_that_it_was_taken(line: Line) -> None:
    reply = await line.push(1)
    await line.actor.admit(EPOCH, {1: Worker("successor", pack_holdings(None))})
    taken = await line.push(1, incarnation="successor")
    await line.push(0)
    assert isinstance(await error_of(reply), IncarnationError)
    assert (await taken).decision is Decision.COMMIT
    late = await line.push(1, sequence=2)
    assert isinstance(await error_of(late), IncarnationError), "one that comes after the decision"


@run_test
async def test_attempt_that_was_replaced_is_not_told_that_it_was_taken(line: Line) -> None:
    reply = await line.push(1)
    taken = await line.push(1, attempt=1)
    await line.push(0)
    assert isinstance(await error_of(reply), AttemptError)
    assert (await taken).decision is Decision.COMMIT
    assert isinstance(await error_of(await line.push(1, sequence=2)), AttemptError)


@run_test
async def test_attempt_that_comes_while_the_last_one_is_given_up_is_the_next_trys(line: Line) -> None:
    async with line.busy():
        first = await line.push(0)
        await line.actor.attend(GENERATION, 2)
        await line.settle()
        assert isinstance(await error_of(await line.push(0, attempt=1)), AttemptError)
    assert (await first).decision is Decision.ABORT
    for reply in [await line.push(rank, attempt=1) for rank in range(2)]:
        assert (await reply).decision is Decision.COMMIT


@run_test
async def test_exchange_that_its_caller_cancels_leaves_the_push(line: Line) -> None:
    reply = await line.push(0)
    reply.cancel()
    await line.settle()
    assert (await (await line.push(1))).decision is Decision.COMMIT


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


# Gradients that come ahead of their push


@run_test
async def test_pieces_and_what_comes_with_the_push_are_one_gradient(line: Line) -> None:
    """For the step and for the log; in pieces of a few tiles."""
    expected, push = params_after(2), line.run.pushes(0)[0]
    pieces = [to_wire(piece) for piece in torch.split(push.gradient[0], 512)]
    logged: list[Received] = []
    with (
        mock.patch("stepwell.sharding.push.PIECE_NUMEL", 512),
        mock.patch.object(line.actor._redundancy, "receive", lambda header, it: logged.append(it)),
    ):
        for number, piece in enumerate(pieces[:-1]):
            assert (
                await line.actor.hold_piece(pack_piece(PieceHeader(0, "worker-0", number, number + 1)), piece) is None
            )
        serials = (*range(1, len(pieces)), 0)
        request = pack_exchange(Exchange(pack_push(push.header), None, RETURNED, LIMIT_S, serials))
        reply = line.begin(line.actor.exchange(request, pieces[-1:]))
        await line.settle()
        await line.push(1)
    assert (await reply)[0].decision is Decision.COMMIT
    assert torch.equal(torch.cat(list(logged[0].gradient)), push.gradient[0])
    assert_same_tensors(line.run.params(), expected)


@run_test
async def test_pieces_are_dropped_with_their_sender(line: Line) -> None:
    part = line.run.pushes(0)[0].gradient[0]
    ways: list[Callable[[], Awaitable[None]]] = [
        lambda: line.actor.forget(0),
        lambda: line.actor.admit(EPOCH, {0: Worker("another", pack_holdings(None))}),
    ]
    for way in ways:
        header = pack_piece(PieceHeader(0, "worker-0", 0, 1))
        assert await line.actor.hold_piece(header, to_wire(part)) is None
        await way()
        assert line.actor._ahead._held == {}
    assert isinstance(await line.actor.hold_piece(header, to_wire(part)), IncarnationError)


# Memory that worker and shard share


class Memory:
    """What one rank's worker shares with the actor: memory for its gradient and for parameters."""

    def __init__(self, line: Line) -> None:
        self.numel = line.shard.buffers.extents[0].numel
        self.segment, (self.gradient, self.params) = allocate(
            [(self.numel, torch.float32), (self.numel, torch.float32)]
        )

    def place(self, tensor: torch.Tensor) -> Placement:
        span = self.segment.span_of(tensor)
        assert span is not None
        return Placement(self.segment.address, (span,))

    async def send(self, line: Line, push: Push, **changes: Any) -> Reply:
        self.gradient.copy_(push.gradient[0])
        target = Target("pushed", ("float32",), self.place(self.params))
        return await line.send(push, **{"gradient": self.place(self.gradient), "target": target, **changes})


def mapped_segments() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/memfd:stepwell")


@run_test
async def test_shared_memory_gives_what_messages_give(line: Line) -> None:
    expected = params_after(3)
    memory = Memory(line)
    for _ in range(2):
        memory.params.fill_(-1.0)
        replies = [await memory.send(line, line.run.pushes(0)[0]), await line.push(1)]
        for reply in replies:
            assert (await reply).decision is Decision.COMMIT
        assert torch.equal(memory.params, line.shard.buffers.extents[0].slots["master_param"].flatten())
        assert torch.equal(from_wire(line.returned[0]), memory.params)
    assert_same_tensors(line.run.params(), expected)


@run_test
async def test_step_that_is_skipped_leaves_memory_for_parameters_alone(line: Line) -> None:
    memory = Memory(line)
    memory.params.fill_(7.0)
    gradients = {index: grad * float("nan") for index, grad in line.run.gradients(1, 0).items()}
    reply = await memory.send(line, line.run.pushes(0, gradients=gradients)[0])
    await line.push(1)
    assert (await reply).decision is Decision.SKIP
    assert torch.equal(memory.params, torch.full((memory.numel,), 7.0))


@run_test
async def test_newer_attempt_in_memory_of_its_own_is_what_counts(line: Line) -> None:
    expected = params_after(2)
    first, second = Memory(line), Memory(line)
    wrong = {index: grad * 100.0 for index, grad in line.run.gradients(1, 0).items()}
    replaced = await first.send(line, line.run.pushes(0, gradients=wrong)[0])
    reply = await second.send(line, line.run.pushes(0, attempt=1)[0])
    first.gradient.fill_(float("nan"))
    await line.push(1)
    assert (await reply).decision is Decision.COMMIT
    assert isinstance(await error_of(replaced), AttemptError)
    assert_same_tensors(line.run.params(), expected)
    assert torch.equal(second.params, line.shard.buffers.extents[0].slots["master_param"].flatten())
    assert not first.params.any()


@run_test
async def test_repeat_after_the_decision_has_its_parameters_delivered(line: Line) -> None:
    first, again = Memory(line), Memory(line)
    reply = await first.send(line, line.run.pushes(0)[0])
    await line.push(1)
    await reply
    assert (await (await again.send(line, line.run.pushes(0, sequence=2)[0]))).decision is Decision.COMMIT
    assert torch.equal(first.params, again.params)
    assert again.params.any()


@run_test
async def test_memory_of_wrong_sizes_is_refused_and_nothing_changes(line: Line) -> None:
    memory, before, push = Memory(line), line.run.params(), line.run.pushes(0)[0]
    place = memory.place(memory.gradient)
    (span,) = place.spans
    short = Placement(place.address, (Span(span.offset, span.numel - 256, span.dtype),))
    far = Placement(place.address, (Span(memory.segment.address.size_bytes - 256, span.numel, span.dtype),))
    wrong: list[tuple[dict[str, Any], type[RequestError]]] = [
        ({"gradient": short}, ShapeMismatchError),
        ({"gradient": far}, MessageError),
        ({"target": Target("pushed", ("float32",), short)}, MessageError),
        ({"target": Target("pushed", ("float32",), far)}, MessageError),
        ({"target": Target("pushed", (), Placement(place.address, ()))}, MessageError),
    ]
    for changes, error in wrong:
        assert isinstance(await error_of(await memory.send(line, push, **changes)), error)
    assert line.shard.missing_ranks == [0, 1]
    assert_same_tensors(line.run.params(), before)


@run_test
async def test_memory_that_cannot_be_reached_is_told_and_nothing_changes(line: Line) -> None:
    memory, push = Memory(line), line.run.pushes(0)[0]
    place = memory.place(memory.gradient)
    address = dataclasses.replace(place.address, token=bytes(16))
    reply = await memory.send(line, push, gradient=Placement(address, place.spans))
    assert isinstance(await error_of(reply), SegmentError)
    assert line.shard.missing_ranks == [0, 1]


@run_test
async def test_nothing_is_mapped_for_who_may_not_push(line: Line) -> None:
    memory, before = Memory(line), mapped_segments()
    for header in ({"incarnation": "another"}, {"sequence": 9}, {"timeline": 9}):
        await error_of(await memory.send(line, line.run.pushes(0, **header)[0]))
        assert mapped_segments() == before


@run_test
async def test_memory_is_given_up_when_the_worker_leaves_or_is_replaced(line: Line) -> None:
    ways: list[Callable[[], Awaitable[None]]] = [
        lambda: line.actor.forget(0),
        lambda: line.actor.admit(EPOCH, {0: Worker("successor", pack_holdings(None))}),
    ]
    memory, before = Memory(line), mapped_segments()
    for give_up in ways:
        await line.actor.parameters(0, pack_target(Target("pushed", ("float32",), memory.place(memory.params))))
        assert torch.equal(memory.params, line.shard.buffers.extents[0].slots["master_param"].flatten())
        assert mapped_segments() == before + 1
        await give_up()
        assert mapped_segments() == before


@run_test
async def test_memory_is_given_up_when_the_workers_process_ends(line: Line) -> None:
    """A child that shares this process's segment, as far as the actor can tell, and then ends."""
    memory, before = Memory(line), mapped_segments()
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[memory.segment.address.fd])
    place = memory.place(memory.params)
    address = dataclasses.replace(place.address, pid=child.pid)
    target = Target("pushed", ("float32",), Placement(address, place.spans))
    await line.actor.parameters(0, pack_target(target))
    assert mapped_segments() == before + 1
    child.kill()
    deadline = time.monotonic() + LIMIT_S
    while mapped_segments() > before:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    child.communicate()


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
    assert await line.actor.hold(EPOCH) == 2
    assert (await line.actor.settle(EPOCH, 2, LIMIT_S)).sequence == 2
    await line.actor.release(EPOCH)


@run_test
async def test_step_that_is_given_up_while_the_shard_is_held_is_not_tried_again_before_its_release(line: Line) -> None:
    """What a restore stops must not begin anew, as workers push again, before the checkpoint is taken."""
    given_up = await line.push(0)
    async with line.busy():
        await line.actor.attend(GENERATION, 2)
        assert await line.actor.hold(EPOCH) == 2
    assert (await given_up).decision is Decision.ABORT
    await line.actor.end_step(EPOCH, LIMIT_S)
    replies = [await line.push(rank, attempt=1) for rank in range(2)]
    assert not line.steps.is_stepping
    await line.actor.release(EPOCH)
    for reply in replies:
        assert (await reply).decision is Decision.COMMIT


@run_test
async def test_shard_that_is_called_to_vote_while_it_is_held_votes_when_it_may(line: Line) -> None:
    reply = await line.push(0)
    assert await line.actor.hold(EPOCH) == 1
    await line.actor.attend(GENERATION, 2)
    await line.settle()
    assert not line.steps.is_stepping
    status = await line.actor.settle(EPOCH, 2, LIMIT_S)
    assert status.sequence == 1
    assert isinstance((await reply).error, MissingRankError)
    await line.actor.release(EPOCH)


@run_test
async def test_call_to_vote_that_comes_late_begins_no_other_try(line: Line) -> None:
    given_up = await line.push(0)
    await line.actor.attend(GENERATION, 2)
    assert (await given_up).decision is Decision.ABORT
    reply = await line.push(0, attempt=1)
    await line.actor.attend(GENERATION, 2)
    assert not line.steps.is_stepping
    await line.push(1)
    assert (await reply).decision is Decision.COMMIT


# Loads


@run_test
async def test_no_step_begins_while_a_load_waits_for_its_turn(line: Line) -> None:
    checkpoint = line.run.params()
    async with line.busy():
        loaded = line.begin(line.steps.load(lambda: line.run.group.load(state_of(line), timeline=2)))
        await line.settle()
        replies = [await line.push(rank) for rank in range(2)]
        assert not any(reply.done() for reply in replies)
    await loaded
    for reply in replies:
        assert isinstance(await error_of(reply), TimelineError)
    assert (line.shard.timeline, line.shard.sequence) == (2, 1)
    assert_same_tensors(line.run.params(), checkpoint)


@run_test
async def test_push_and_question_that_come_within_a_load_are_told_of_the_new_timeline(line: Line) -> None:
    begun, goes_on, load = threading.Event(), threading.Event(), line.shard.buffers.load

    def slow(source: StateSource) -> None:
        begun.set()
        assert goes_on.wait(LIMIT_S)
        load(source)

    with mock.patch.object(line.shard.buffers, "load", slow):
        loaded = line.begin(line.steps.load(lambda: line.run.group.load(state_of(line), timeline=2)))
        await asyncio.to_thread(begun.wait, LIMIT_S)
        reply, question = await line.push(0), line.begin(line.actor.decided(1, 1, LIMIT_S))
        await line.settle()
        assert not reply.done()
        goes_on.set()
        await loaded
    assert isinstance(await error_of(reply), TimelineError)
    assert isinstance(await question, TimelineError)


def state_of(line: Line) -> StateSource:
    values = {(index, "master_param"): value for index, value in enumerate(line.run.params())}
    return state_source(values, sequence=1, step=1)


@run_test
async def test_load_that_fails_tells_those_whose_pushes_it_swept_away(line: Line) -> None:
    reply = await line.push(0)

    def fail() -> None:
        with mock.patch.object(line.shard.buffers, "load", side_effect=CheckpointError("damaged")):
            line.shard.load(state_of(line), timeline=2)

    with pytest.raises(CheckpointError):
        await line.steps.load(fail)
    assert isinstance(await error_of(reply), TimelineError)
    await line.actor.release(EPOCH)
    assert not line.steps.is_stepping


@run_test
async def test_load_that_fails_before_it_changes_anything_leaves_the_pushes(line: Line) -> None:
    reply = await line.push(0)
    job = pack_job(line.shard.spec)
    with pytest.raises(CheckpointError, match="/nowhere"):
        await line.actor.prepare_restore(EPOCH, 2, "request", "/nowhere", b"", job, b"", {}, None)
    await line.push(1)
    assert (await reply).decision is Decision.COMMIT


# A rank that is slow


@run_test
async def test_tries_of_a_worker_leave_nothing_behind_while_another_is_slow(line: Line) -> None:
    """However often a worker tries, of its pushes one is held, and one call waits."""
    line.actor._redundancy.is_on = True
    expected, gradients = params_after(2), []
    waiting: asyncio.Future[Any] | None = None
    for attempt in range(30):
        push = line.run.pushes(0, attempt=attempt)[0]
        request = pack_exchange(Exchange(pack_push(push.header), None, RETURNED, LIMIT_S))
        wire = to_wire(push.gradient[0].clone())
        gradients.append(weakref.ref(wire[1]))
        before, waiting = waiting, line.begin(line.actor.exchange(request, [wire]))
        del wire
        await line.settle()
        if before is not None:
            assert before.done(), "it is told at once that it was replaced"
            assert isinstance(before.result()[0], AttemptError)
    del before
    gc.collect()
    assert len(line.shard._inbox.ranks) == len(line.actor._redundancy._received) == 1
    assert [gradient() is not None for gradient in gradients] == [False] * 29 + [True]
    await line.push(1)
    assert waiting is not None
    assert (await waiting)[0].decision is Decision.COMMIT
    assert_same_tensors(line.run.params(), expected)


@run_test
async def test_worker_whose_rank_another_process_takes_is_told_at_once(line: Line) -> None:
    reply = await line.push(1)
    await line.actor.admit(EPOCH, {1: Worker("successor", pack_holdings(None))})
    await line.settle()
    assert reply.done()
    assert isinstance(await error_of(reply), IncarnationError)


@run_test
async def test_successor_that_comes_while_the_step_is_taken_does_not_take_it_from_its_predecessor(line: Line) -> None:
    async with line.busy():
        replies = [await line.push(rank) for rank in range(2)]
        admitted = line.begin(line.actor.admit(EPOCH, {1: Worker("successor", pack_holdings(None))}))
        await line.settle()
        assert not any(reply.done() for reply in (*replies, admitted)), "it is told of the state after the step"
    for reply in replies:
        assert (await reply).decision is Decision.COMMIT
    await admitted
