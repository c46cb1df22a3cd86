"""Mixed precision: torch's gradient scaler and ours, on one worker and on several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.client.inprocess import InProcessTransport
from stepwell.sharding.errors import HyperparameterError, NonFiniteGradientError, ServiceTimeoutError
from tests.client.lines import Fault, FaultyTransport, SharedShards, reached_by
from tests.client.test_worker_ranks import Workers
from tests.client.training import assert_close, assert_equal, copies_of, loss_of, make_net, set_grads, values_of

SCALERS: list[type[torch.amp.GradScaler]] = [torch.amp.GradScaler, stepwell.GradScaler]
each_scaler = pytest.mark.parametrize("scaler_type", SCALERS, ids=["torch", "stepwell"])

BAD_STEPS = (0, 3, 4, 11)


def make_scaler(scaler_type: type[torch.amp.GradScaler], **options: Any) -> torch.amp.GradScaler:
    """One whose scale rises after two good steps."""
    return scaler_type("cpu", **{"init_scale": 2.0**10, "growth_interval": 2, **options})


def scale_grads(scaler: torch.amp.GradScaler, params: Sequence[Tensor]) -> None:
    """Multiply the gradients by the scale, as a backward of the scaled loss does."""
    scale = scaler.scale(torch.ones(()))
    for param in params:
        if param.grad is not None:
            param.grad.mul_(scale.item())


def poison(params: Sequence[Tensor], value: float) -> None:
    assert params[2].grad is not None
    params[2].grad.view(-1)[-1] = value


def drive(params: Sequence[Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> Iterator[float]:
    """Scaled steps with made-up gradients, some of them not finite; the scale before each."""
    for step in range(12):
        set_grads(params, step)
        for param in params:  # as if the gradient had come in float16, on both sides of a comparison
            assert param.grad is not None
            param.grad.copy_(param.grad.half())
        yield scaler.get_scale()
        scale_grads(scaler, params)
        if step in BAD_STEPS:
            poison(params, math.inf if step % 2 else math.nan)
        scaler.step(optimizer)
        scaler.update()


@each_scaler
def test_one_worker_is_scaled_as_torch_scales(scaler_type: type[torch.amp.GradScaler]) -> None:
    params = copies_of(make_net().parameters())
    expected = copies_of(params)
    scales = list(drive(params, stepwell.AdamW(params, lr=0.01), make_scaler(scaler_type)))
    wanted = list(drive(expected, torch.optim.AdamW(expected, lr=0.01), make_scaler(torch.amp.GradScaler)))
    assert scales == wanted
    assert scales[-3:] == [1024.0, 1024.0, 2048.0], "it has moved both ways"
    assert_close(params, expected, rtol=1e-5, atol=1e-6)


@each_scaler
def test_float16_parameters_are_scaled_as_torch_scales(scaler_type: type[torch.amp.GradScaler]) -> None:
    """torch unscales float16 in its fused optimizers alone. The masters follow float32 parameters of torch's."""
    params = copies_of(make_net().parameters(), torch.float16)
    fused, exact = copies_of(params), copies_of(params, torch.float32)
    optimizer = stepwell.AdamW(params, lr=0.01)
    scales = list(drive(params, optimizer, make_scaler(scaler_type)))
    in_torch = make_scaler(torch.amp.GradScaler)
    assert scales == list(drive(fused, torch.optim.AdamW(fused, lr=0.01, fused=True), in_torch))
    list(drive(exact, torch.optim.AdamW(exact, lr=0.01), make_scaler(torch.amp.GradScaler)))
    masters = [state["master_param"] for state in optimizer.state_dict()["state"].values()]
    assert_close(masters, exact, rtol=1e-5, atol=1e-5)
    assert_equal(params, [master.half() for master in masters])


@each_scaler
def test_autocast_trains_as_with_torch(scaler_type: type[torch.amp.GradScaler]) -> None:
    net, other = make_net(), make_net()
    optimizer = stepwell.AdamW(net.parameters(), lr=0.01)
    reference = torch.optim.AdamW(other.parameters(), lr=0.01)
    for each, its_net, scaler in (
        (optimizer, net, make_scaler(scaler_type)),
        (reference, other, make_scaler(torch.amp.GradScaler)),
    ):
        for step in range(10):
            each.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(its_net, step)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(each)
            scaler.update()
    assert_close(net.parameters(), other.parameters(), rtol=1e-3, atol=1e-3)


@each_scaler
def test_unscale_then_clip_is_that_of_torch(scaler_type: type[torch.amp.GradScaler]) -> None:
    params = copies_of(make_net().parameters())
    expected = copies_of(params)

    def train(
        params: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> list[float]:
        scales = []
        for step in range(10):
            set_grads(params, step)
            scale_grads(scaler, params)
            if step in BAD_STEPS:
                poison(params, math.inf)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 0.5)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    scales = train(params, stepwell.AdamW(params, lr=0.01, eps=0.1), make_scaler(scaler_type))
    wanted = train(expected, torch.optim.AdamW(expected, lr=0.01, eps=0.1), make_scaler(torch.amp.GradScaler))
    assert scales == wanted
    assert_close(params, expected, rtol=1e-5, atol=1e-6)


@each_scaler
def test_services_clipping_is_of_the_unscaled_gradient(scaler_type: type[torch.amp.GradScaler]) -> None:
    params, plain = copies_of(make_net().parameters()), copies_of(make_net().parameters())
    optimizer, expected = (stepwell.AdamW(each, eps=0.1, max_grad_norm=0.5) for each in (params, plain))
    scaler = make_scaler(scaler_type)
    for step in range(3):
        set_grads(params, step)
        set_grads(plain, step)
        scale_grads(scaler, params)
        scaler.step(optimizer)
        scaler.update()
        expected.step()
        assert optimizer.grad_norm == expected.grad_norm
    assert_equal(params, plain)


# Several workers


def scaled_steps(workers: Workers, scalers: Sequence[torch.amp.GradScaler], bad: dict[int, int]) -> list[list[float]]:
    """Six steps with a bad gradient on rank ``bad[step]``; each rank's scales."""
    scales: list[list[float]] = [[] for _ in scalers]
    for step in range(6):
        workers.set_grads(step)
        for rank, scaler in enumerate(scalers):
            scale_grads(scaler, workers.params[rank])
            if bad.get(step) == rank:
                poison(workers.params[rank], math.inf)

        def take(rank: int) -> None:
            scalers[rank].step(workers.optimizers[rank])
            scalers[rank].update()
            scales[rank].append(scalers[rank].get_scale())

        workers.on_all(take)
    return scales


def undisturbed(skipped: Sequence[int]) -> Workers:
    """Workers that were given the same gradients, unscaled, but for the skipped steps."""
    workers = Workers(SharedShards(), stepwell.AdamW)
    for step in range(6):
        workers.set_grads(step)
        if step not in skipped:
            workers.step()
    return workers


def test_all_ranks_keep_one_scale() -> None:
    workers = Workers(SharedShards(num_shards=2), stepwell.AdamW)
    first, second = scaled_steps(workers, [make_scaler(stepwell.GradScaler) for _ in range(2)], {1: 1, 4: 0})
    assert first == second == [1024.0, 512.0, 512.0, 1024.0, 512.0, 512.0]
    assert [optimizer.num_skipped_steps for optimizer in workers.optimizers] == [2, 2]
    for params in workers.params:
        assert_equal(params, undisturbed([1, 4]).params[0])


def test_torch_s_scaler_parts_the_scales_and_stays_correct() -> None:
    workers = Workers(SharedShards(num_shards=2), stepwell.AdamW)
    first, second = scaled_steps(workers, [make_scaler(torch.amp.GradScaler) for _ in range(2)], {1: 1, 4: 0})
    assert first == [1024.0, 2048.0, 2048.0, 4096.0, 2048.0, 2048.0]
    assert second == [1024.0, 512.0, 512.0, 1024.0, 1024.0, 2048.0]
    for params in workers.params:
        assert_equal(params, undisturbed([1, 4]).params[0])


def test_overflow_of_the_average_lowers_every_scale() -> None:
    """Every rank's own gradient is finite: torch's scaler would let its scale rise."""
    workers = Workers(SharedShards(), stepwell.AdamW)
    scalers = [make_scaler(stepwell.GradScaler, init_scale=1.0) for _ in range(2)]
    for rank, scaler in enumerate(scalers):
        scaler.scale(torch.ones(()))
        for param in workers.params[rank]:
            param.grad = torch.full_like(param, 3e38)
    workers.on_all(lambda rank: scalers[rank].step(workers.optimizers[rank]))
    for scaler in scalers:
        scaler.update()
        assert scaler.get_scale() == 0.5


def test_rank_without_any_gradient_keeps_the_scale_too() -> None:
    workers = Workers(SharedShards(), stepwell.AdamW)
    scalers = [make_scaler(stepwell.GradScaler) for _ in range(2)]
    workers.set_grads(0, absent=[(1, index) for index in range(len(workers.params[0]))])
    for rank, scaler in enumerate(scalers):
        scale_grads(scaler, workers.params[rank])
    poison(workers.params[0], math.inf)
    workers.on_all(lambda rank: scalers[rank].step(workers.optimizers[rank]))
    for scaler in scalers:
        scaler.update()
        assert scaler.get_scale() == 512.0


# When something is amiss


@each_scaler
@pytest.mark.parametrize("when", ["before", "after"])
def test_step_that_failed_leaves_no_scale_behind(
    scaler_type: type[torch.amp.GradScaler], when: Literal["before", "after"]
) -> None:
    """Else torch multiplies the next step's with it."""
    params, plain = copies_of(make_net().parameters()), copies_of(make_net().parameters())
    fault = Fault("step", 2, when, ServiceTimeoutError("the line broke"))
    transport = FaultyTransport(InProcessTransport(stepwell.InProcessService()), fault)
    with reached_by(lambda _: transport):
        optimizer = stepwell.AdamW(params, eps=0.1)
    undisturbed = stepwell.AdamW(plain, eps=0.1)
    scaler = make_scaler(scaler_type, growth_interval=100)
    for step in range(3):
        set_grads(params, step)
        set_grads(plain, step)
        undisturbed.step()
        scale_grads(scaler, params)
        if step == 1:
            with pytest.raises(ServiceTimeoutError, match="the line broke"):
                scaler.step(optimizer)
        if step != 1 or when == "before":
            scaler.step(optimizer)
        scaler.update()
    assert {header.grad_scale for header in transport.headers} == {1024.0}
    assert_equal(params, plain)


def test_skip_that_raises_lowers_the_scale() -> None:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.AdamW(params, on_nonfinite="raise")
    scaler = make_scaler(stepwell.GradScaler)
    set_grads(params, 0)
    scale_grads(scaler, params)
    poison(params, math.inf)
    with pytest.raises(NonFiniteGradientError):
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0


@each_scaler
def test_closure_is_treated_as_by_torch(scaler_type: type[torch.amp.GradScaler]) -> None:
    optimizer = stepwell.AdamW(make_net().parameters())
    scaler = make_scaler(scaler_type)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported if GradScaler is enabled"):
        scaler.step(optimizer, closure=lambda: 0.0)
    assert make_scaler(scaler_type, enabled=False).step(optimizer, closure=lambda: 7.0) == 7.0


def test_scaler_without_effect_changes_nothing() -> None:
    params, plain = copies_of(make_net().parameters()), copies_of(make_net().parameters())
    optimizer, expected = stepwell.AdamW(params), stepwell.AdamW(plain)
    scaler = make_scaler(stepwell.GradScaler, enabled=False)
    set_grads(params, 0)
    set_grads(plain, 0)
    scaler.step(optimizer)
    scaler.update()
    expected.step()
    assert_equal(params, plain)


def test_other_optimizers_are_scaled_as_by_torch() -> None:
    """One scaler for two optimizers: either's overflow lowers the scale."""
    ours, theirs = copies_of(make_net().parameters()), copies_of(make_net().parameters())
    optimizers: list[tuple[list[nn.Parameter], torch.optim.Optimizer]] = [
        (ours, stepwell.AdamW(ours)),
        (theirs, torch.optim.AdamW(theirs)),
    ]
    scaler = make_scaler(stepwell.GradScaler)
    for bad in (0, 1):
        before = [values_of(params) for params, _ in optimizers]
        for index, (params, optimizer) in enumerate(optimizers):
            set_grads(params, 0)
            scale_grads(scaler, params)
            if index == bad:
                poison(params, math.nan)
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024.0 / 2 ** (bad + 1)
        assert_equal(optimizers[bad][0], before[bad])
        assert not torch.equal(optimizers[1 - bad][0][0], before[1 - bad][0])


@pytest.mark.parametrize("scale", [0.0, -2.0, math.inf, math.nan])
def test_scale_that_cannot_be_undone_is_refused(scale: float) -> None:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.AdamW(params)
    set_grads(params, 0)
    vars(optimizer)["grad_scale"] = torch.tensor(scale)
    with pytest.raises(HyperparameterError, match=rf"grad_scale: expected a positive number, got {scale}"):
        optimizer.step()
    optimizer.step()
    assert optimizer.service.status()["step"] == 1


@pytest.mark.parametrize("found_inf", [True, torch.ones(()), 1.0])
def test_infinity_that_a_scaler_found_skips_the_step(found_inf: object) -> None:
    params = copies_of(make_net().parameters())
    before = values_of(params)
    optimizer = stepwell.AdamW(params)
    set_grads(params, 0)
    vars(optimizer)["found_inf"] = found_inf
    optimizer.step()
    assert optimizer.step_was_skipped
    assert_equal(params, before)
