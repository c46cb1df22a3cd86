"""What a worker does when a step fails on the way: it is applied once or not at all, and no gradient is taken twice."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Literal

import pytest
import torch
from torch import nn

import stepwell
from stepwell.client.inprocess import InProcessService, InProcessTransport
from stepwell.sharding.errors import (
    CheckpointRestoreNeededError,
    ServiceError,
    ServiceTimeoutError,
    ShardLostError,
    StepAbortedError,
)
from tests.client.lines import Fault, FaultyTransport, reached_by
from tests.client.training import (
    assert_equal,
    assert_same_state,
    copies_of,
    drive,
    loss_of,
    make_net,
    set_grads,
    train,
    values_of,
)

FAILED_STEP = 3

Disturbed = tuple[list[nn.Parameter], stepwell.Prodigy, FaultyTransport]


def _disturbed(*faults: Fault) -> Disturbed:
    params = copies_of(make_net().parameters())
    transport = FaultyTransport(InProcessTransport(InProcessService(num_shards=2)), *faults)
    with reached_by(lambda rank: transport):
        return params, stepwell.Prodigy(params), transport


def _undisturbed(steps: Iterable[int]) -> tuple[list[nn.Parameter], stepwell.Prodigy]:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.Prodigy(params)
    drive(params, optimizer, steps)
    return params, optimizer


def _drive_on(disturbed: Disturbed, steps: Iterable[int], *, again: bool) -> list[BaseException]:
    """Take steps as a script does that catches errors, and then tries the same gradient again, or goes on."""
    params, optimizer, _ = disturbed
    caught: list[BaseException] = []
    for step in steps:
        try:
            drive(params, optimizer, [step])
        except (ServiceError, StepAbortedError, KeyboardInterrupt) as error:
            caught.append(error)
            if again:
                drive(params, optimizer, [step])
    return caught


ERRORS = [ServiceTimeoutError("no answer"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("again", [True, False])
def test_step_that_failed_before_its_push_is_not_taken(error: BaseException, again: bool) -> None:
    disturbed = _disturbed(Fault("step", FAILED_STEP, "before", error))
    params, optimizer, transport = disturbed
    assert _drive_on(disturbed, range(6), again=again) == [error]
    expected_params, expected = _undisturbed(range(6) if again else [0, 1, 3, 4, 5])
    assert_equal(params, expected_params)
    assert_same_state(optimizer.state_dict(), expected.state_dict())
    pushes = [(header.sequence, header.attempt) for header in transport.headers]
    assert pushes[:5] == [(1, 0), (2, 0), (3, 0), (3, 1), (4, 0)]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_step_that_failed_after_it_was_taken_is_taken_over(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    disturbed = _disturbed(Fault("step", FAILED_STEP, "after", error))
    params, optimizer, transport = disturbed
    with caplog.at_level(logging.WARNING, logger="stepwell"):
        assert _drive_on(disturbed, range(6), again=False) == [error]
    assert caplog.messages == ["step 3 had been decided although it failed here; going on after it"]
    expected_params, expected = _undisturbed(range(6))
    assert_equal(params, expected_params)
    assert_same_state(optimizer.state_dict(), expected.state_dict())
    assert [(header.sequence, header.attempt) for header in transport.headers] == [(t, 0) for t in range(1, 7)]


def test_failed_step_leaves_parameters_and_groups_as_they_were() -> None:
    """One that no shard has taken; else its parameters are in the model as soon as a shard has them."""
    params, optimizer, _ = _disturbed(Fault("step", FAILED_STEP, "before", ServiceTimeoutError("no answer")))
    drive(params, optimizer, range(2))
    before, shown = values_of(params), dict(optimizer.param_groups[0])
    with pytest.raises(ServiceTimeoutError):
        drive(params, optimizer, [2])
    assert_equal(params, before)
    assert optimizer.param_groups[0] == shown


def test_gradient_of_a_closure_is_taken_at_the_parameters_taken_over() -> None:
    net, other = make_net(), make_net()
    transport = FaultyTransport(
        InProcessTransport(InProcessService()), Fault("step", FAILED_STEP, "after", ServiceTimeoutError("no answer"))
    )
    with reached_by(lambda rank: transport):
        optimizer = stepwell.AdamW(net.parameters(), lr=0.01)
    train(net, optimizer, range(2))
    with pytest.raises(ServiceTimeoutError):
        train(net, optimizer, [2])

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(net, 3)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    optimizer.step(closure)
    train(other, stepwell.AdamW(other.parameters(), lr=0.01), range(4))
    assert_equal(net.parameters(), other.parameters())


def test_state_dict_after_a_failed_step_is_that_of_one_moment() -> None:
    params, optimizer, _ = _disturbed(Fault("step", FAILED_STEP, "after", ServiceTimeoutError("no answer")))
    drive(params, optimizer, range(2))
    with pytest.raises(ServiceTimeoutError):
        drive(params, optimizer, [2])
    expected_params, expected = _undisturbed(range(3))
    assert_same_state(optimizer.state_dict(), expected.state_dict())
    assert_equal(params, expected_params)


@pytest.mark.parametrize("method", ["decided", "read_parameters"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_taking_over_may_fail_too(method: str, when: Literal["before", "after"]) -> None:
    call = {"decided": 1, "read_parameters": 2}[method]  # the first reading is the registration's
    disturbed = _disturbed(
        Fault("step", FAILED_STEP, "after", ServiceTimeoutError("no answer")),
        Fault(method, call, when, ServiceTimeoutError("still none")),
    )
    params, optimizer, transport = disturbed
    expected_params = copies_of(params)
    expected = stepwell.Prodigy(expected_params)
    for each, its_params in ((optimizer, params), (expected, expected_params)):
        drive(its_params, each, range(2))
        with torch.no_grad():
            its_params[0].mul_(0.5)
    caught = _drive_on(disturbed, range(2, 6), again=False)
    assert [str(error) for error in caught] == ["no answer", "still none"]
    drive(expected_params, expected, [2, 4, 5])  # the gradient of 3 was never pushed
    assert transport.reloaded == [set(), set(), {0}, set(), set()]
    assert_equal(params, expected_params)
    assert_same_state(optimizer.state_dict(), expected.state_dict())


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_was_changed_by_hand_goes_with_one_step(when: Literal["before", "after"]) -> None:
    disturbed = _disturbed(Fault("step", FAILED_STEP, when, ServiceTimeoutError("no answer")))
    params, optimizer, _ = disturbed
    expected_params = copies_of(params)
    expected = stepwell.Prodigy(expected_params)
    for each, its_params in ((optimizer, params), (expected, expected_params)):
        drive(its_params, each, range(2))
        each.param_groups[0]["d"] = each.param_groups[0]["d_max"] = 2e-3
        with torch.no_grad():
            its_params[0].mul_(0.5)
    _drive_on(disturbed, range(2, 6), again=when == "before")
    drive(expected_params, expected, range(2, 6))
    assert_equal(params, expected_params)
    assert_same_state(optimizer.state_dict(), expected.state_dict())


def test_skipped_step_that_failed_here_is_taken_over() -> None:
    params, optimizer, transport = _disturbed(Fault("step", 2, "after", ServiceTimeoutError("no answer")))
    expected_params, expected = _undisturbed(range(1))
    drive(params, optimizer, range(1))
    for its_params in (params, expected_params):
        with torch.no_grad():
            its_params[0].mul_(0.5)
    set_grads(params, 1)
    assert params[0].grad is not None
    params[0].grad[0] = float("nan")
    with pytest.raises(ServiceTimeoutError):
        optimizer.step()
    drive(params, optimizer, range(2, 4))
    drive(expected_params, expected, range(2, 4))
    assert_equal(params, expected_params)
    assert [header.sequence for header in transport.headers] == [1, 2, 3, 4]
    assert optimizer.service.status()["skipped_steps"] == 1


def test_load_state_dict_after_a_failed_step_begins_anew() -> None:
    params, optimizer, _ = _disturbed(Fault("step", FAILED_STEP, "after", ServiceTimeoutError("no answer")))
    drive(params, optimizer, range(2))
    saved, values = optimizer.state_dict(), values_of(params)
    with pytest.raises(ServiceTimeoutError):
        drive(params, optimizer, [2])
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
    drive(params, optimizer, range(2, 5))
    expected_params, expected = _undisturbed(range(5))
    assert_equal(params, expected_params)
    assert_same_state(optimizer.state_dict(), expected.state_dict())


@pytest.mark.parametrize("method", ["register", "read_parameters", "step", "read_state"])
def test_worker_waits_for_a_lost_shard_whatever_it_is_at(method: str) -> None:
    params = copies_of(make_net().parameters())
    lost = [Fault(method, call, "before", ShardLostError("a shard died")) for call in (1, 2)]
    transport = FaultyTransport(InProcessTransport(InProcessService(num_shards=2)), *lost)
    transport.recovery_timeout_s = 60.0
    with reached_by(lambda rank: transport):
        optimizer = stepwell.Prodigy(params)
    drive(params, optimizer, range(3))
    expected_params, expected = _undisturbed(range(3))
    assert_equal(params, expected_params)
    assert_same_state(optimizer.state_dict(), expected.state_dict())


@pytest.mark.parametrize("method", ["register", "read_parameters", "step", "read_state"])
def test_worker_does_not_wait_for_what_nobody_has(method: str) -> None:
    params = copies_of(make_net().parameters())
    lost = Fault(method, 1, "before", CheckpointRestoreNeededError("nobody has it; restore"))
    transport = FaultyTransport(InProcessTransport(InProcessService(num_shards=2)), lost)
    transport.recovery_timeout_s = 60.0

    def state_after_three_steps() -> None:
        optimizer = stepwell.Prodigy(params)
        drive(params, optimizer, range(3))
        optimizer.state_dict()

    with reached_by(lambda rank: transport), pytest.raises(CheckpointRestoreNeededError, match="nobody has it"):
        state_after_three_steps()
