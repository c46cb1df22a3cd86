"""Every scheduler of torch's, unmodified: the same learning rates, momenta and parameters as torch's optimizers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import prodigyopt
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

import stepwell
from stepwell.optim import RULES
from tests.client.training import assert_close, assert_equal, decaying, loss_of, make_net, train, values_of

Make = Callable[[torch.optim.Optimizer], LRScheduler]


def _sequential(optimizer: torch.optim.Optimizer) -> LRScheduler:
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, lr_scheduler.ExponentialLR(optimizer, 0.8)], milestones=[3])


def _chained(optimizer: torch.optim.Optimizer) -> LRScheduler:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer=optimizer)


SCHEDULERS: dict[str, Make] = {
    "ChainedScheduler": _chained,
    "ConstantLR": functools.partial(lr_scheduler.ConstantLR, factor=0.25, total_iters=4),
    "CosineAnnealingLR": functools.partial(lr_scheduler.CosineAnnealingLR, T_max=8),
    "CosineAnnealingWarmRestarts": functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "CyclicLR": functools.partial(lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.02, step_size_up=3),
    "ExponentialLR": functools.partial(lr_scheduler.ExponentialLR, gamma=0.8),
    "LambdaLR": functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step),
    "LinearLR": functools.partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=6),
    "MultiStepLR": functools.partial(lr_scheduler.MultiStepLR, milestones=[2, 5], gamma=0.3),
    "MultiplicativeLR": functools.partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.95),
    "OneCycleLR": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.02, total_steps=14),
    "PolynomialLR": functools.partial(lr_scheduler.PolynomialLR, total_iters=7, power=2.0),
    "ReduceLROnPlateau": functools.partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=1),
    "SequentialLR": _sequential,
    "StepLR": functools.partial(lr_scheduler.StepLR, step_size=3, gamma=0.5),
    "SWALR": functools.partial(swa_utils.SWALR, swa_lr=0.005, anneal_epochs=5),
}
CYCLING = {"CyclicLR", "OneCycleLR"}
"""Those that change momentum or betas too."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "RMSprop": {"lr": 0.002, "momentum": 0.5},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01},
}


def _advance(scheduler: LRScheduler) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def test_every_scheduler_of_torch_is_here() -> None:
    classes = [each for module in (lr_scheduler, swa_utils) for each in vars(module).values() if isinstance(each, type)]
    names = {each.__name__ for each in classes if issubclass(each, LRScheduler)} - {"LRScheduler", "_LRScheduler"}
    assert names == set(SCHEDULERS)


@pytest.mark.parametrize("make_lr", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scheduler_gives_the_same_as_with_torch(name: str, scheduler: str, make_lr: Callable[[float], Any]) -> None:
    net, oracle_net, options = make_net(), make_net(), OPTIMIZERS[name]
    optimizer = vars(stepwell)[name](net.parameters(), **{**options, "lr": make_lr(options["lr"])})
    oracle = vars(torch.optim)[name](oracle_net.parameters(), **{**options, "lr": make_lr(options["lr"])})
    before = copy.deepcopy(optimizer.state_dict()["param_groups"][0])
    schedulers = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](oracle)
    changed = set()
    for step in range(12):
        train(net, optimizer, [step])
        train(oracle_net, oracle, [step])
        for each in schedulers:
            _advance(each)
        group, expected = optimizer.state_dict()["param_groups"][0], oracle.state_dict()["param_groups"][0]
        assert group == {**expected, **{key: group[key] for key in group.keys() - expected.keys()}}
        changed |= {key for key in ("lr", "betas", "momentum") if key in group and group[key] != before[key]}
    assert changed == {"lr"} | ({"betas" if "betas" in before else "momentum"} if scheduler in CYCLING else set())
    assert_close(net.parameters(), oracle_net.parameters())


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS.keys() - CYCLING - {"SWALR"}))
def test_prodigy_follows_a_scheduler(scheduler: str) -> None:
    net, oracle_net = make_net(), make_net()
    optimizer, oracle = stepwell.Prodigy(net.parameters()), prodigyopt.Prodigy(oracle_net.parameters())
    schedulers = [SCHEDULERS[scheduler](each) for each in (optimizer, oracle)]
    for step in range(12):
        train(net, optimizer, [step])
        train(oracle_net, oracle, [step])
        for each in schedulers:
            _advance(each)
    assert optimizer.param_groups[0]["lr"] == oracle.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["d"] == pytest.approx(oracle.param_groups[0]["d"], rel=1e-4)
    assert_close(net.parameters(), oracle_net.parameters(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RULES.names())
def test_schedule_resumes_to_the_bit(name: str) -> None:
    def start() -> tuple[nn.Sequential, Any, LRScheduler]:
        net = make_net()
        optimizer = vars(stepwell)[name](net.parameters(), lr=0.01)
        return net, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)

    def go_on(net: nn.Sequential, optimizer: Any, scheduler: LRScheduler, steps: range) -> None:
        for step in steps:
            train(net, optimizer, [step])
            scheduler.step()

    straight, resumed = start(), start()
    go_on(*straight, range(4))
    for each, saved in zip(resumed, [copy.deepcopy(part.state_dict()) for part in straight], strict=True):
        each.load_state_dict(saved)
    go_on(*straight, range(4, 8))
    go_on(*resumed, range(4, 8))
    assert resumed[1].param_groups[0]["lr"] == straight[1].param_groups[0]["lr"] < 0.01
    assert_equal(resumed[0].parameters(), straight[0].parameters())


@pytest.mark.parametrize("name", RULES.names())
def test_optimizer_stands_still_at_lr_0(name: str) -> None:
    net = make_net()
    optimizer = decaying(name, net.parameters())
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: float(step not in (0, 3)))
    before = values_of(net.parameters())
    train(net, optimizer, [0])
    assert_equal(net.parameters(), before)
    for step in range(1, 3):
        scheduler.step()
        train(net, optimizer, [step])
    before = values_of(net.parameters())
    scheduler.step()
    train(net, optimizer, [3])
    assert_equal(net.parameters(), before)
    scheduler.step()
    train(net, optimizer, [4])
    assert not torch.equal(next(net.parameters()), before[0])
    assert optimizer.service.status()["step"] == 5


# torch.optim.swa_utils

avg_fn: Callable[[float], Any] = swa_utils.get_ema_avg_fn
multi_avg_fn: Callable[[float], Any] = swa_utils.get_ema_multi_avg_fn


def _with_batch_norm() -> nn.Sequential:
    net = make_net()
    return nn.Sequential(net[0], nn.BatchNorm1d(40), nn.Tanh(), net[2])


@pytest.mark.parametrize(
    "averaging",
    [{}, {"multi_avg_fn": multi_avg_fn(0.8)}, {"avg_fn": avg_fn(0.8)}],
    ids=["mean", "EMA", "EMA one by one"],
)
def test_weight_averaging_gives_the_same_as_with_torch(averaging: dict[str, Any]) -> None:
    averages = []
    for make in (stepwell.SGD, torch.optim.SGD):
        net = _with_batch_norm()
        optimizer: torch.optim.Optimizer = make(net.parameters(), lr=0.05, momentum=0.9)
        average = swa_utils.AveragedModel(net, **averaging)
        scheduler = swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=4)
        for step in range(8):
            optimizer.zero_grad()
            loss_of(net, step).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            average.update_parameters(net)
            scheduler.step()
        swa_utils.update_bn([torch.randn(16, 12, generator=torch.Generator().manual_seed(9))], average)
        averages.append(average)
    ours, theirs = averages
    assert_close(ours.parameters(), theirs.parameters())
    assert_close(ours.buffers(), theirs.buffers(), rtol=1e-4, atol=1e-5)


def test_weights_swapped_for_their_average_and_back_train_on_to_the_bit() -> None:
    net, other = make_net(torch.bfloat16), make_net(torch.bfloat16)
    optimizer, undisturbed = (stepwell.AdamW(each.parameters(), lr=1e-3) for each in (net, other))
    average = swa_utils.AveragedModel(net, multi_avg_fn=multi_avg_fn(0.5))
    for step in range(6):
        train(net, optimizer, [step])
        train(other, undisturbed, [step])
        average.update_parameters(net)
        own = copy.deepcopy(net.state_dict())
        net.load_state_dict(average.module.state_dict())
        net.load_state_dict(own)
    assert_equal(net.parameters(), other.parameters())
    states = [each.state_dict()["state"] for each in (optimizer, undisturbed)]
    assert_equal(*([state[index]["master_param"] for index in range(4)] for state in states))
