"""Clipping, skipped steps and accumulated gradients, as a training script meets them."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.sharding.errors import HyperparameterError, NonFiniteGradientError, ServiceTimeoutError
from tests.client.lines import Fault, FaultyTransport, SharedShards, reached_by
from tests.client.test_worker_ranks import Workers
from tests.client.training import assert_close, assert_equal, copies_of, loss_of, make_net, set_grads, values_of


def test_clipping_is_that_of_torch() -> None:
    net, other = make_net(), make_net()
    optimizer = stepwell.AdamW(net.parameters(), lr=0.01, eps=0.1, max_grad_value=0.05, max_grad_norm=0.2)
    reference = torch.optim.AdamW(other.parameters(), lr=0.01, eps=0.1)
    for step in range(20):
        for each, its_net in ((optimizer, net), (reference, other)):
            each.zero_grad()
            loss_of(its_net, step).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_value_(other.parameters(), 0.05)
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.2)
        optimizer.step()
        reference.step()
        assert optimizer.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert_close(net.parameters(), other.parameters(), rtol=1e-4, atol=1e-5)


def test_limits_are_live_and_leave_the_gradient_alone() -> None:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.Prodigy(params)
    assert (optimizer.max_grad_norm, optimizer.max_grad_value, optimizer.grad_norm) == (None, None, None)
    set_grads(params, 0)
    grads = [param.grad.clone() for param in params if param.grad is not None]
    exact = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    norms = []
    for limit in (None, 0.5, math.inf, None):
        optimizer.max_grad_norm = limit
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert norms == [None, pytest.approx(exact), pytest.approx(exact), None]
    optimizer.max_grad_value = 0.25
    optimizer.step()
    clipped = math.sqrt(sum(grad.clamp(-0.25, 0.25).double().square().sum().item() for grad in grads))
    assert optimizer.grad_norm == pytest.approx(clipped)
    assert_equal([param.grad for param in params if param.grad is not None], grads)


WRONG: list[Any] = [0.0, -1.0, math.nan, "1", True]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", ["max_grad_norm", "max_grad_value"])
def test_limit_that_is_no_positive_number_is_refused(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    message = rf"{name}: expected a positive number, got {value!r}"
    with pytest.raises(ValueError, match=message):
        stepwell.AdamW(make_net().parameters(), **options)
    params = copies_of(make_net().parameters())
    optimizer = stepwell.AdamW(params)
    before = values_of(params)
    setattr(optimizer, name, value)
    set_grads(params, 0)
    with pytest.raises(HyperparameterError, match=message):
        optimizer.step()
    assert_equal(params, before)
    assert optimizer.service.status()["step"] == 0


def test_limits_of_rank_0_count_and_every_rank_is_told_the_norm() -> None:
    def make(params: Any, *, rank: int, **options: Any) -> stepwell.ServiceOptimizer:
        limits: dict[str, Any] = (
            {"max_grad_norm": 0.5} if rank == 0 else {"max_grad_norm": 1e-4, "max_grad_value": 1e-4}
        )
        return stepwell.AdamW(params, rank=rank, lr=0.01, eps=0.1, **limits, **options)

    workers = Workers(SharedShards(num_shards=3), make)
    expected = copies_of(make_net().parameters())
    reference = torch.optim.AdamW(expected, lr=0.01, eps=0.1)
    for step in range(5):
        for param, mean in zip(expected, workers.set_grads(step), strict=True):
            param.grad = mean
        norm = nn.utils.clip_grad_norm_(expected, 0.5)
        workers.step()
        reference.step()
        first, second = (optimizer.grad_norm for optimizer in workers.optimizers)
        assert first == second == pytest.approx(norm.item(), rel=1e-5)
    assert_equal(workers.params[0], workers.params[1])
    assert_close(workers.params[0], expected)


def test_norm_of_a_step_that_failed_here_is_taken_over() -> None:
    params = copies_of(make_net().parameters())
    fault = Fault("step", 2, "after", ServiceTimeoutError("the line broke"))
    service = stepwell.InProcessService(num_shards=2)
    transport = FaultyTransport(stepwell.client.inprocess.InProcessTransport(service), fault)
    with reached_by(lambda _: transport):
        optimizer = stepwell.AdamW(params, max_grad_norm=math.inf)
    set_grads(params, 0)
    optimizer.step()
    before = optimizer.grad_norm
    set_grads(params, 1)
    with pytest.raises(ServiceTimeoutError):
        optimizer.step()
    assert optimizer.grad_norm == before
    optimizer.state_dict()
    assert optimizer.grad_norm == pytest.approx(
        math.sqrt(sum(param.grad.double().square().sum().item() for param in params if param.grad is not None))
    )


# Skipped steps


def test_skipped_steps_are_told_and_counted_alike_on_all_ranks() -> None:
    workers = Workers(SharedShards(num_shards=3), world_size=3)
    told: list[tuple[bool, int]] = []
    for step in range(4):
        workers.set_grads(step)
        if step in (1, 3):
            (grad,) = (param.grad for param in [workers.params[step % 3][2]])
            assert grad is not None
            grad.view(-1)[-1] = math.inf
        workers.step()
        seen = {(each.step_was_skipped, each.num_skipped_steps) for each in workers.optimizers}
        assert len(seen) == 1
        told += seen
    assert told == [(False, 0), (True, 1), (False, 1), (True, 2)]
    workers.add(2, copies_of(make_net().parameters()))
    assert workers.optimizers[2].num_skipped_steps == 2
    assert not workers.optimizers[2].step_was_skipped


def test_skipped_steps_are_counted_on_after_a_restore(tmp_path: Any) -> None:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.AdamW(params)
    for param in params:
        param.grad = torch.full_like(param, math.nan)
    optimizer.step()
    optimizer.service.save(str(tmp_path))
    optimizer.step()
    assert (optimizer.num_skipped_steps, optimizer.step_was_skipped) == (2, True)
    optimizer.service.restore(str(tmp_path))
    optimizer.refresh()
    assert (optimizer.num_skipped_steps, optimizer.step_was_skipped) == (1, False)


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_average_that_overflows_is_skipped_or_raises_on_all_ranks(
    on_nonfinite: Literal["skip", "raise"], caplog: pytest.LogCaptureFixture
) -> None:
    def make(params: Any, **options: Any) -> stepwell.ServiceOptimizer:
        return stepwell.AdamW(params, on_nonfinite=on_nonfinite, max_grad_norm=1.0, **options)

    workers = Workers(SharedShards(num_shards=2), make)
    before = values_of(workers.params[0])
    for params in workers.params:
        for param in params:
            param.grad = torch.full_like(param, 3e38)

    def step(rank: int) -> None:
        if on_nonfinite == "skip":
            workers.optimizers[rank].step()
        else:
            with pytest.raises(NonFiniteGradientError, match="step 1 was skipped on all shards"):
                workers.optimizers[rank].step()

    with caplog.at_level(logging.WARNING, logger="stepwell"):
        workers.on_all(step)
    assert len(caplog.messages) == (2 if on_nonfinite == "skip" else 0)
    for params, optimizer in zip(workers.params, workers.optimizers, strict=True):
        assert (optimizer.step_was_skipped, optimizer.num_skipped_steps) == (True, 1)
        assert_equal(params, before)


# Accumulated gradients


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 12, generator=generator), torch.randn(16, 5, generator=generator)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_accumulated_gradients_are_those_of_one_large_batch(num_parts: int) -> None:
    net = make_net()
    other = copy.deepcopy(net)
    optimizer = stepwell.AdamW(net.parameters(), lr=0.01, eps=0.1, max_grad_norm=0.5)
    reference = torch.optim.AdamW(other.parameters(), lr=0.01, eps=0.1)
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        for part, wanted in zip(x.chunk(num_parts), y.chunk(num_parts), strict=True):
            loss = nn.functional.mse_loss(net(part), wanted) / num_parts
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        reference.zero_grad()
        nn.functional.mse_loss(other(x), y).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        reference.step()
    assert_close(net.parameters(), other.parameters(), rtol=1e-4, atol=1e-5)
