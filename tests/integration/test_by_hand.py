"""What the shards make of requests that no worker should send: nothing moves, the answer says why, the job goes on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from stepwell.optim import ProdigyRule
from stepwell.server.messages import pack_push
from stepwell.server.wire import to_wire
from stepwell.sharding.errors import (
    AttemptError,
    DTypeMismatchError,
    FutureRequestError,
    HyperparameterError,
    IncarnationError,
    MessageError,
    MissingRankError,
    RequestError,
    ShapeMismatchError,
    ShardLostError,
    StaleRequestError,
    StepAbortedError,
    StepwellError,
    TimelineError,
    TruncatedMessageError,
    UnknownRankError,
    UnknownVersionError,
)
from stepwell.sharding.reports import StepResult
from stepwell.sharding.vote import Decision
from tests.integration.by_hand import HandJob, answers, are_waiting
from tests.integration.conftest import Launch
from tests.zoo import assert_same_state, small

WORKER_TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def module_job(module_launch: Launch) -> HandJob:
    job = HandJob(module_launch(3, worker_timeout_s=WORKER_TIMEOUT_S), small(), ProdigyRule(d0=0.1))
    for _ in range(3):
        job.step()
    return job


@pytest.fixture
def job(module_job: HandJob) -> Iterator[HandJob]:
    """At rest before a test and after it: whatever happened, the next step goes through and gives the oracle's bits."""
    assert_same_state(module_job.state(), module_job.oracle.state())
    yield module_job
    module_job.step(attempt=9)
    assert_same_state(module_job.state(), module_job.oracle.state())


def test_step_that_waits_for_a_rank_has_moved_nothing(job: HandJob) -> None:
    assert are_waiting(job.send(job.pushes(1)))
    assert_same_state(job.state(), job.oracle.state())
    job.step()


def test_repeated_push_counts_once(job: HandJob) -> None:
    repeats = [ref for _ in range(3) for ref in job.send(job.pushes(0))]
    other = {index: torch.ones_like(grad) for index, grad in job.oracle.gradients(0).items()}
    repeats += job.send(job.pushes(0, gradients=other))  # of the same attempt, so taken for a repeat
    assert are_waiting(repeats)
    last = [job.pushes(0), job.pushes(1)]
    job.step()
    assert answers(repeats) == [last_result(job)] * 12
    for pushes in last:
        assert answers(job.send(pushes)) == [last_result(job)] * 3
    assert_same_state(job.state(), job.oracle.state())


def last_result(job: HandJob) -> StepResult:
    shard = job.oracle.group.shards[0]
    return StepResult(shard.sequence, Decision.COMMIT, dict(shard.scalars), ranks=(0, 1))


def test_order_of_ranks_and_shards_does_not_matter(job: HandJob) -> None:
    first, second = job.pushes(0), job.pushes(1)
    sent = [*job.send(second, [2, 0]), *job.send(first, [1, 0]), *job.send(second, [1]), *job.send(first, [2])]
    job.oracle.step()
    assert answers(sent) == [last_result(job)] * 6
    assert_same_state(job.state(), job.oracle.state())


REFUSALS: dict[str, tuple[dict[str, Any], type[StepwellError]]] = {
    "a step that is long decided": ({"sequence": 1}, StaleRequestError),
    "a step after the next": ({"sequence": 1000}, FutureRequestError),
    "an old timeline": ({"timeline": 0}, TimelineError),
    "a timeline to come": ({"timeline": 77}, TimelineError),
    "another process": ({"incarnation": "worker-0-before"}, IncarnationError),
    "the other rank's process": ({"incarnation": "worker-1"}, IncarnationError),
    "a mask of another model": ({"present": b"\xff\xff\xff"}, ShapeMismatchError),
    "no hyperparameters": ({"hyper": None}, MessageError),
    "scalars of another rule": ({"scalars": {"loss": 1.0}}, HyperparameterError),
    "a step size that is none": ({"hyper": {"lr": [float("nan")] * 2}}, MessageError),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_push_is_refused_by_every_shard(job: HandJob, case: str) -> None:
    changes, error = REFUSALS[case]
    for answer in answers(job.send(job.pushes(0, **changes))):
        assert type(answer) is error
    assert_same_state(job.state(), job.oracle.state())


def test_push_of_a_rank_that_is_none_is_refused(job: HandJob) -> None:
    push = job.pushes(1)[0]
    header = dataclasses.replace(push.header, rank=2)
    sent = job.send_bytes(0, pack_push(header), [to_wire(part) for part in push.gradient])
    assert type(answers([sent])[0]) is UnknownRankError
    assert_same_state(job.state(), job.oracle.state())


def test_older_attempt_is_refused_and_the_newer_one_counts(job: HandJob) -> None:
    zeros = {index: torch.zeros_like(grad) for index, grad in job.oracle.gradients(0).items()}
    job.send(job.pushes(0, attempt=1, gradients=zeros))
    newer = job.send(job.pushes(0, attempt=3))
    assert are_waiting(newer)
    for answer in answers(job.send(job.pushes(0, attempt=2, gradients=zeros))):
        assert type(answer) is AttemptError
    last = job.send(job.pushes(1))
    job.oracle.step()
    assert answers([*newer, *last]) == [last_result(job)] * 6
    assert_same_state(job.state(), job.oracle.state())


BAD_BYTES: dict[str, tuple[Callable[[bytes], bytes], type[RequestError]]] = {
    "cut short": (lambda data: data[:-3], TruncatedMessageError),
    "of another version": (lambda data: data.replace(b"\xa7version\x01", b"\xa7version\x02"), UnknownVersionError),
    "of another kind": (lambda data: data.replace(b"\xa4kind\xa4push", b"\xa4kind\xa4pull"), MessageError),
    "random": (lambda data: b"\xc1" + data, MessageError),
    "none": (lambda data: b"", TruncatedMessageError),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bytes_that_are_no_push_are_refused(job: HandJob, case: str) -> None:
    change, error = BAD_BYTES[case]
    push = job.pushes(0)[0]
    sent = job.send_bytes(0, change(pack_push(push.header)), [to_wire(part) for part in push.gradient])
    assert type(answers([sent])[0]) is error
    assert_same_state(job.state(), job.oracle.state())


def test_gradient_of_a_wrong_form_is_refused(job: HandJob) -> None:
    push = job.pushes(1)[0]
    request, (part,) = pack_push(push.header), push.gradient
    off_by_a_tile = torch.roll(part, 1)
    cases: list[tuple[list[Any], type[RequestError]]] = [
        ([], ShapeMismatchError),
        ([to_wire(part[:-1])], ShapeMismatchError),
        ([to_wire(part), to_wire(part)], ShapeMismatchError),
        ([("int64", part.long().numpy())], DTypeMismatchError),
        ([("bfloat16", part.numpy())], DTypeMismatchError),
        ([to_wire(off_by_a_tile + 1.0)], MessageError),
        ([None], MessageError),
    ]
    for gradient, error in cases:
        assert type(answers([job.send_bytes(0, request, gradient)])[0]) is error
    assert_same_state(job.state(), job.oracle.state())


def test_wrong_shape_on_one_shard_gives_the_step_up_on_all(job: HandJob) -> None:
    """Shard 0 refuses rank 1; the others have both ranks and wait for it."""
    first, second = job.pushes(0), job.pushes(1)
    sent = job.send(first)
    assert are_waiting(sent)
    cut = [to_wire(second[0].gradient[0][:-256])]
    assert isinstance(answers([job.send_bytes(0, pack_push(second[0].header), cut)])[0], ShapeMismatchError)
    for reply in answers([*sent, *job.send(second, [1, 2])]):
        expect_abort(reply, MissingRankError, "rank 1 of 2 did not push to shard 0")
    assert_same_state(job.state(), job.oracle.state())


def expect_abort(reply: object, error: type[StepAbortedError], text: str) -> None:
    assert isinstance(reply, StepResult)
    assert reply.decision is Decision.ABORT
    assert type(reply.error) is error
    assert text in str(reply.error)


def test_missing_rank_gives_the_step_up_on_all(job: HandJob) -> None:
    began = time.monotonic()
    for reply in answers(job.send(job.pushes(1))):
        expect_abort(reply, MissingRankError, f"rank 0 of 2 did not push to shard 0 within {WORKER_TIMEOUT_S:g} s")
    assert WORKER_TIMEOUT_S / 2 < time.monotonic() - began < 10 * WORKER_TIMEOUT_S
    assert_same_state(job.state(), job.oracle.state())


def test_different_attempts_on_the_shards_give_the_step_up_at_once(job: HandJob) -> None:
    first, again, second = job.pushes(0), job.pushes(0, attempt=1), job.pushes(1)
    sent = [*job.send(first, [0]), *job.send(again, [1, 2])]
    began = time.monotonic()
    for reply in answers([*sent, *job.send(second)]):
        expect_abort(reply, StepAbortedError, "the shards hold different attempts of it")
    assert time.monotonic() - began < WORKER_TIMEOUT_S
    assert_same_state(job.state(), job.oracle.state())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_rank_with_a_gradient_that_is_not_finite_skips_the_step(job: HandJob, value: float) -> None:
    bad = {index: grad.clone() for index, grad in job.oracle.gradients(0, rank=1).items()}
    bad[max(bad)].view(-1)[-1] = value
    before = job.state()
    sent = [*job.send(job.pushes(0)), *job.send(job.pushes(1, gradients=bad))]
    assert answers(sent) == [StepResult(before.counters[0] + 1, Decision.SKIP, before.scalars, ranks=(0, 1))] * 6
    for pushes in (job.oracle.pushes(0), job.oracle.pushes(1, gradients=bad)):
        job.oracle.group.push(pushes)
    after = job.state()
    assert_same_state(after, job.oracle.state())
    assert (after.counters[0], after.counters[2]) == (before.counters[0] + 1, before.counters[2] + 1)
    for name, tensors in before.slots.items():
        for left, right in zip(after.slots[name], tensors, strict=True):
            assert torch.equal(left, right)


def test_successor_of_a_worker_takes_its_rank_over(job: HandJob) -> None:
    """The push of the process that died is replaced on every shard, even where it had come in."""
    zeros = {index: torch.zeros_like(grad) for index, grad in job.oracle.gradients(0).items()}
    replaced = job.send(job.pushes(1, gradients=zeros))
    job.register(1, "successor")
    for answer in answers(job.send(job.pushes(1))):
        assert type(answer) is IncarnationError
    sent = job.send(job.pushes(1, incarnation="successor"))
    assert are_waiting(sent)
    sent += job.send(job.pushes(0))
    job.oracle.step()
    assert answers(sent) == [last_result(job)] * 6
    assert {type(answer) for answer in answers(replaced)} == {IncarnationError}
    job.register(1)
    assert_same_state(job.state(), job.oracle.state())


def test_worker_that_died_before_it_reached_all_shards_gives_the_step_up(job: HandJob) -> None:
    """Shard 0 has both ranks and votes; the others have heard of nobody."""
    pushes = [job.pushes(0), job.pushes(1)]
    for reply in answers([ref for each in pushes for ref in job.send(each, [0])]):
        expect_abort(reply, MissingRankError, f"rank 0 of 2 did not push to shard 1 within {WORKER_TIMEOUT_S:g} s")
    assert_same_state(job.state(), job.oracle.state())


def test_load_frees_a_shard_from_a_step_that_the_others_will_not_begin(launch: Launch) -> None:
    """Shard 0 has both ranks and waits for the vote of others, who go on to another timeline."""
    job = HandJob(launch(3), small(), ProdigyRule(d0=0.1))
    pushes = [job.pushes(0), job.pushes(1)]
    sent = [ref for each in pushes for ref in job.send(each, [0])]
    job.load()
    assert all(isinstance(answer, (ShardLostError, TimelineError)) for answer in answers(sent))
    job.step()
    assert_same_state(job.state(), job.oracle.state())
