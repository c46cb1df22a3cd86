"""What a shard makes of a push: taken once or not at all, and every refusal leaves all of its state as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepwell.optim import AdamWRule, ProdigyRule, Rule
from stepwell.sharding.errors import (
    AttemptError,
    DTypeMismatchError,
    FutureRequestError,
    HyperparameterError,
    IncarnationError,
    MessageError,
    NotRegisteredError,
    ShapeMismatchError,
    StaleRequestError,
    StepwellError,
    TimelineError,
    UnknownRankError,
)
from stepwell.sharding.job import JobSpec
from stepwell.sharding.push import Push, pack_present, unpack_present
from stepwell.sharding.reports import Receipt
from stepwell.sharding.shard import Shard
from stepwell.sharding.vote import Decision
from tests.zoo import Run, assert_same_state, assert_same_tensors, constant, initial_state, small, state_source

NUM_SHARDS = 3


def ready(rule: Rule | None = None, *, world_size: int = 2) -> Run:
    """A run after three steps."""
    run = Run(small(), rule or ProdigyRule(d0=1e-3), num_shards=NUM_SHARDS, world_size=world_size)
    return run.steps(3, schedule=constant)


def refused(run: Run, pushes: list[Push], error: type[StepwellError], match: str) -> None:
    """Every shard refuses its push with exactly this error, and neither state nor inbox nor buffers change."""
    before, buffers = run.state(), run.buffers()
    inboxes = [shard.missing_ranks for shard in run.group.shards]
    for shard, push in zip(run.group.shards, pushes, strict=True):
        with pytest.raises(error, match=match) as caught:
            shard.receive(push)
        assert type(caught.value) is error
    assert [shard.missing_ranks for shard in run.group.shards] == inboxes
    assert_same_tensors(run.buffers(), buffers)
    assert_same_state(run.state(), before)


def edited(push: Push, **fields: Any) -> Push:
    """A push with fields of its own or its header replaced."""
    header = {key: fields.pop(key) for key in list(fields) if key not in ("gradient", "reloaded")}
    return dataclasses.replace(push, header=dataclasses.replace(push.header, **header), **fields)


# Exactly once


def test_repeated_push_counts_once() -> None:
    run, untroubled = ready(), ready()
    first, second = run.pushes(0), run.pushes(1)
    for _ in range(3):
        assert run.group.push(first) is None
    result = run.group.push(second)
    assert result is not None
    untroubled.step()
    assert_same_state(run.state(), untroubled.state())


def test_repeat_of_an_attempt_does_not_replace_it() -> None:
    """Else shards that saw the one and shards that saw the other would agree in the vote and not in the gradient."""
    run, untroubled = ready(), ready()
    wrong = {index: torch.ones_like(gradient) for index, gradient in run.gradients(3).items()}
    run.group.push(run.pushes(0))
    run.group.push(run.pushes(0, gradients=wrong))
    run.group.push(run.pushes(1))
    untroubled.step()
    assert_same_state(run.state(), untroubled.state())


def test_repeat_of_a_decided_step_gets_the_same_answer_and_moves_nothing() -> None:
    run = ready()
    pushes = [run.pushes(rank) for rank in (0, 1)]
    run.group.push(pushes[0])
    result = run.group.push(pushes[1])
    before, buffers = run.state(), run.buffers()
    for rank in (1, 0, 1):
        assert run.group.push(pushes[rank]) == result
        assert [shard.receive(push) for shard, push in zip(run.group.shards, pushes[rank], strict=True)] == [
            Receipt.DECIDED
        ] * NUM_SHARDS
    assert_same_tensors(run.buffers(), buffers)
    assert_same_state(run.state(), before)


def test_pushes_in_any_order_over_shards_and_ranks_make_the_same_step() -> None:
    run, untroubled = ready(), ready()
    pushes = [run.pushes(rank) for rank in (0, 1)]
    for shard, rank in ((2, 1), (0, 0), (1, 1), (2, 0), (1, 0)):
        run.group.shards[shard].receive(pushes[rank][shard])
    assert run.group.shards[0].receive(pushes[1][0]) is Receipt.COMPLETE
    assert run.group.run_step().decision is Decision.COMMIT
    untroubled.step()
    assert_same_state(run.state(), untroubled.state())


def test_newer_attempt_replaces_an_older_one() -> None:
    run, untroubled = ready(), ready()
    wrong = {index: torch.ones_like(gradient) for index, gradient in run.gradients(3).items()}
    run.group.push(run.pushes(0, gradients=wrong, attempt=0))
    run.group.push(run.pushes(0, attempt=1))
    run.group.push(run.pushes(1))
    untroubled.step()
    assert_same_state(run.state(), untroubled.state())


def test_older_attempt_is_refused_once_a_newer_one_is_there() -> None:
    run = ready()
    run.group.push(run.pushes(0, attempt=2))
    refused(run, run.pushes(0, attempt=1), AttemptError, "attempt 1 came after attempt 2")


def test_new_attempt_at_a_step_that_was_taken_is_refused() -> None:
    """It holds another gradient, which was not taken: its sender must learn so."""
    run = ready()
    late = run.pushes(1, attempt=1)
    run.step()
    refused(run, late, AttemptError, "was taken with another push of rank 1")


def test_new_process_replaces_what_its_predecessor_pushed() -> None:
    run, untroubled = ready(), ready()
    wrong = {index: torch.ones_like(gradient) for index, gradient in run.gradients(3).items()}
    run.group.push(run.pushes(1, gradients=wrong, attempt=5))
    run.group.admit(1, "successor")
    assert run.group.shards[0].missing_ranks == [0, 1]
    refused(
        run, run.pushes(1, attempt=6), IncarnationError, "expected a push of process successor, got one of worker-1"
    )
    run.group.push(run.pushes(0))
    run.group.push(run.pushes(1, incarnation="successor"))
    untroubled.step()
    assert_same_state(run.state(), untroubled.state())


def test_push_that_comes_while_its_step_is_decided_waits_if_it_is_a_repeat() -> None:
    run = ready()
    pushes = [run.pushes(rank) for rank in (0, 1)]
    for part in pushes:
        for shard, push in zip(run.group.shards, part, strict=True):
            shard.receive(push)
    steps = [shard.step() for shard in run.group.shards]
    for step in steps:
        next(step)
    assert run.group.shards[0].receive(pushes[1][0]) is Receipt.WAITING
    refused(run, run.pushes(1, attempt=1), AttemptError, "being decided without attempt 1")
    run.group.admit(1, "successor")
    refused(run, run.pushes(1, incarnation="successor"), AttemptError, "being decided without")
    for step in steps:
        step.close()


def test_push_of_a_rank_that_comes_while_its_step_is_given_up_is_refused() -> None:
    """With rank 1 missing, rank 2's push is the second that is held; it must not stand for rank 1's."""
    run = Run(small(), ProdigyRule(), world_size=3)
    shard = run.group.shards[0]
    for rank in (0, 2):
        shard.receive(run.pushes(rank)[0])
    step = shard.step()
    next(step)
    with pytest.raises(AttemptError):
        shard.receive(run.pushes(1)[0])
    assert shard.receive(run.pushes(2)[0]) is Receipt.WAITING
    step.close()


# Refusals


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"sequence": 2}, StaleRequestError, "expected step 4, got 2"),
        ({"sequence": 0}, StaleRequestError, "expected step 4, got 0"),
        ({"sequence": 5}, FutureRequestError, "expected step 4, got 5"),
        ({"timeline": 0}, TimelineError, "timeline 1 .*, the request on 0"),
        ({"timeline": 2}, TimelineError, "timeline 1 .*, the request on 2"),
        ({"rank": 2}, UnknownRankError, "one of ranks 0 to 1, got 2"),
        ({"rank": -1}, UnknownRankError, "one of ranks 0 to 1, got -1"),
        ({"incarnation": "stranger"}, IncarnationError, "expected a push of process worker-0, got one of stranger"),
        ({"rank": 1}, IncarnationError, "rank 1: expected a push of process worker-1, got one of worker-0"),
        ({"present": b""}, ShapeMismatchError, "mask of 1 bytes for 8 tensors, got 0 bytes"),
        ({"present": b"\xff\xff"}, ShapeMismatchError, "mask of 1 bytes for 8 tensors, got 2 bytes"),
        ({"hyper": None}, MessageError, "from rank 0 alone"),
        ({"hyper": {}}, MessageError, r"got \[\]"),
        ({"hyper": {"momentum": [0.9, 0.9]}}, MessageError, "momentum"),
        ({"scalars": {"e": 1.0}}, HyperparameterError, "e is no scalar of Prodigy"),
        ({"scalars": {"d": float("nan")}}, HyperparameterError, "Invalid d value: nan"),
        ({"scalars": {"d": -1.0}}, HyperparameterError, "Invalid d value: -1.0"),
        ({"scalars": {"d": 0.0}}, HyperparameterError, "Invalid d value: 0.0"),
    ],
    ids=str,
)
def test_header_that_does_not_fit_is_refused(fields: dict[str, Any], error: type[StepwellError], match: str) -> None:
    run = ready()
    refused(run, [edited(push, **fields) for push in run.pushes(0)], error, match)


def test_hyperparameters_that_do_not_fit_are_refused() -> None:
    run = ready()
    (push, *_) = run.pushes(0)
    assert push.header.hyper is not None
    hyper = {name: list(values) for name, values in push.header.hyper.items()}

    def pushes(changed: dict[str, Any]) -> list[Push]:
        return [edited(push, hyper=changed) for push in run.pushes(0)]

    refused(run, pushes({**hyper, "lr": [1.0]}), ShapeMismatchError, "lr: expected 2 values, one per group, got 1")
    refused(run, pushes({**hyper, "lr": [1.0, float("nan")]}), HyperparameterError, "lr: .*nan")
    refused(run, pushes({**hyper, "extra": [1.0, 1.0]}), MessageError, "extra")
    refused(run, pushes({name: values for name, values in hyper.items() if name != "eps"}), MessageError, "eps")
    second = [edited(push, hyper=hyper) for push in run.pushes(1)]
    refused(run, second, MessageError, "rank 1 is off")
    refused(run, run.pushes(1, scalars={"d": 1.0}), MessageError, "from rank 0 alone, got some from rank 1")


GRADIENTS: dict[str, tuple[Callable[[torch.Tensor], tuple[torch.Tensor, ...]], type[StepwellError], str]] = {
    "a tile too many": (lambda part: (torch.zeros(part.numel() + 256),), ShapeMismatchError, "elements per extent"),
    "an element too few": (lambda part: (part[:-1],), ShapeMismatchError, "elements per extent"),
    "no extent": (lambda part: (), ShapeMismatchError, r"got \[\]"),
    "an extent too many": (lambda part: (part, part), ShapeMismatchError, "elements per extent"),
    "a cut within a tile": (lambda part: (part[:100], part[100:]), ShapeMismatchError, "elements per extent"),
    "a piece too few": (lambda part: (part[:256], part[512:]), ShapeMismatchError, "elements per extent"),
    "padding in a piece": (lambda part: (part[:256], torch.ones_like(part[256:])), MessageError, "zeros between"),
    "int64": (lambda part: (part.long(),), DTypeMismatchError, "got torch.int64"),
    "bool": (lambda part: (part.bool(),), DTypeMismatchError, "got torch.bool"),
    "complex64": (lambda part: (part.to(torch.complex64),), DTypeMismatchError, "got torch.complex64"),
    "padding": (lambda part: (torch.ones_like(part),), MessageError, "zeros between tensors"),
    "NaN in padding": (lambda part: (torch.full_like(part, torch.nan),), MessageError, "zeros between tensors"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_that_does_not_fit_is_refused(name: str) -> None:
    change, error, match = GRADIENTS[name]
    run = ready()
    refused(run, [edited(push, gradient=change(push.gradient[0])) for push in run.pushes(1)], error, match)


@pytest.mark.parametrize(
    ("index", "value", "match"),
    [
        (-1, torch.zeros(257), "parameter -1"),
        (8, torch.zeros(257), "parameter 8"),
        (2, torch.zeros(256), r"parameter 2 of shape \[256\]"),
        (2, torch.zeros(257, 1), r"parameter 2 of shape \[257, 1\]"),
        (2, torch.full((257,), torch.nan), "inf or NaN"),
        (2, torch.full((257,), torch.inf), "inf or NaN"),
    ],
    ids=["negative", "unknown", "short", "not flat", "NaN", "inf"],
)
def test_parameter_changed_by_hand_that_does_not_fit_is_refused(index: int, value: torch.Tensor, match: str) -> None:
    run = ready()
    refused(run, run.pushes(0, reloaded={index: value}), MessageError, match)


def test_parameter_changed_by_hand_comes_from_rank_0_alone() -> None:
    run = ready()
    refused(run, run.pushes(1, reloaded={2: torch.zeros(257)}), MessageError, "from rank 0 alone")


def test_refused_push_does_not_stand_in_the_way_of_a_good_one() -> None:
    run, untroubled = ready(), ready()
    bad = [edited(push, gradient=(push.gradient[0].long(),)) for push in run.pushes(1)]
    refused(run, bad, DTypeMismatchError, "got torch.int64")
    run.step()
    untroubled.step()
    assert_same_state(run.state(), untroubled.state())


# Before, between and after


def test_shard_without_parameters_refuses_everything() -> None:
    run = ready()
    empty = Shard(JobSpec(ProdigyRule(), run.problem.specs(), 2, 2), num_shards=1)
    empty.admit(0, "worker-0")
    with pytest.raises(NotRegisteredError, match="no parameters yet"):
        empty.receive(edited(run.pushes(0)[0], sequence=1, timeline=0))
    with pytest.raises(NotRegisteredError):
        empty.result(0, 0)


def test_load_begins_a_timeline_and_older_requests_are_errors() -> None:
    run = ready()
    old = [run.pushes(rank) for rank in (0, 1)]
    run.group.push(old[0])
    run.group.load(initial_state(run.problem), timeline=2)
    assert run.group.shards[0].missing_ranks == [0, 1]
    for pushes in old:
        refused(run, pushes, TimelineError, "Call refresh")
    for timeline in (1, 2):
        with pytest.raises(TimelineError, match="expected a timeline after 2"):
            run.group.shards[0].load(initial_state(run.problem), timeline=timeline)
    with pytest.raises(TimelineError):
        run.group.shards[0].result(1, 3)


def test_step_that_was_decided_before_this_timeline_is_not_answered_from_memory() -> None:
    run = ready()
    source = initial_state(run.problem)
    run.group.load(dataclasses.replace(source, sequence=3, step=3), timeline=2)
    assert run.group.shards[0].result(2, 3) is None
    refused(run, run.pushes(0, sequence=3), StaleRequestError, "decided before this timeline began")
    assert run.step().sequence == 4


def test_result_is_told_for_the_last_step_alone() -> None:
    run = ready()
    shard = run.group.shards[0]
    last = shard.result(1, 3)
    assert last is not None
    assert (last.sequence, last.decision) == (3, Decision.COMMIT)
    assert shard.result(1, 4) is None
    with pytest.raises(StaleRequestError):
        shard.result(1, 2)
    with pytest.raises(FutureRequestError):
        shard.result(1, 5)


def test_interrupted_load_leaves_the_shard_lost() -> None:
    run = ready(AdamWRule())

    def broken(param: int, slot: str, offset: int, out: torch.Tensor) -> None:
        raise OSError("the disk is gone")

    source = dataclasses.replace(state_source({(0, "master_param"): torch.zeros(520)}), read=broken)
    with pytest.raises(OSError, match="the disk is gone"):
        run.group.shards[0].load(source, timeline=2)
    with pytest.raises(NotRegisteredError, match="interrupted while it loaded"):
        run.group.shards[0].receive(run.pushes(0)[0])
    run.group.load(initial_state(run.problem), timeline=2)
    run.step()


@pytest.mark.parametrize("num_tensors", [0, 1, 7, 8, 9, 64])
def test_presence_mask_survives_packing(num_tensors: int) -> None:
    present = [bool(index % 3) for index in range(num_tensors)]
    packed = pack_present(present)
    assert len(packed) == -(-num_tensors // 8)
    assert unpack_present(packed, num_tensors).tolist() == present


def test_presence_mask_has_the_first_tensor_in_the_highest_bit() -> None:
    assert pack_present([True] + [False] * 8 + [True]) == b"\x80\x40"
