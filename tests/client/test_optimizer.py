"""The optimizer that a script holds: torch's interface, parameters changed by hand, gradients that are not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.sharding.errors import HyperparameterError, NonFiniteGradientError, UnsupportedParameterError
from tests.client.training import (
    assert_close,
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

MAKERS = [stepwell.Prodigy, stepwell.AdamW, stepwell.LAMB]


@pytest.mark.parametrize("make", MAKERS)
def test_optimizer_is_one_of_torch(make: Callable[..., stepwell.ServiceOptimizer]) -> None:
    optimizer = make(make_net().parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, stepwell.ServiceOptimizer)
    assert repr(optimizer).startswith(f"{make.__name__} (\nParameter Group 0\n")


def test_step_calls_its_closure_with_gradients_enabled() -> None:
    net, other = make_net(), make_net()
    optimizer = stepwell.AdamW(net.parameters(), lr=0.01)
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        return losses[-1]

    assert optimizer.step(closure) == losses[0]
    train(other, stepwell.AdamW(other.parameters(), lr=0.01), [0])
    assert_equal(net.parameters(), other.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_that_of_torch(set_to_none: bool) -> None:
    params = copies_of(make_net().parameters())
    oracle_params = copies_of(params)
    optimizer, oracle = stepwell.AdamW(params, lr=0.01), torch.optim.AdamW(oracle_params, lr=0.01)
    for each, its_params in ((optimizer, params), (oracle, oracle_params)):
        drive(its_params, each, [0])
        each.zero_grad(set_to_none=set_to_none)
        each.step()
    assert_close(params, oracle_params)
    assert optimizer.state_dict()["state"][0]["step"] == (1 if set_to_none else 2)


def test_grad_scaler_works_with_it() -> None:
    net, other = make_net(), make_net()
    optimizer, reference = (stepwell.AdamW(each.parameters(), lr=0.01) for each in (net, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, step)).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
    train(other, reference, range(3))
    assert_close(net.parameters(), other.parameters(), rtol=1e-6, atol=1e-7)


def test_two_optimizers_do_not_meet() -> None:
    net, other, alone = make_net(), make_net(), make_net()
    first, second = stepwell.Prodigy(net.parameters()), stepwell.AdamW(other.parameters(), lr=0.01)
    for step in range(4):
        train(net, first, [step])
        train(other, second, [step])
    train(alone, stepwell.Prodigy(alone.parameters()), range(4))
    assert_equal(net.parameters(), alone.parameters())
    assert first.service.status()["step"] == second.service.status()["step"] == 4


def test_close_ends_it_and_may_be_repeated() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters())
    train(net, optimizer, [0])
    before = values_of(net.parameters())
    optimizer.close()
    optimizer.close()
    for use in (optimizer.step, optimizer.state_dict, optimizer.refresh, lambda: optimizer.service):
        with pytest.raises(RuntimeError, match="this optimizer is closed"):
            use()
    assert_equal(net.parameters(), before)


# Parameters changed by hand


def _scale(params: list[nn.Parameter], optimizer: stepwell.ServiceOptimizer | None) -> None:
    with torch.no_grad():
        params[0].mul_(0.5)
        params[3].clamp_(-0.1, 0.1)


def _scale_data(params: list[nn.Parameter], optimizer: stepwell.ServiceOptimizer | None) -> None:
    params[0].data.mul_(0.5)
    if optimizer is not None:
        optimizer.reload_parameters()


@pytest.mark.parametrize("change", [_scale, _scale_data])
@pytest.mark.parametrize("after", [0, 3], ids=["at first", "mid-way"])
def test_change_by_hand_is_kept(change: Callable[..., None], after: int) -> None:
    params = copies_of(make_net().parameters())
    oracle_params = copies_of(params)
    optimizer, oracle = stepwell.AdamW(params, lr=0.01), torch.optim.AdamW(oracle_params, lr=0.01)
    drive(params, optimizer, range(after))
    drive(oracle_params, oracle, range(after))
    change(params, optimizer)
    change(oracle_params, None)
    drive(params, optimizer, range(after, after + 3))
    drive(oracle_params, oracle, range(after, after + 3))
    assert_close(params, oracle_params)


def test_model_load_state_dict_is_kept() -> None:
    net, other = make_net(), make_net()
    optimizer = stepwell.AdamW(net.parameters(), lr=0.01)
    train(net, optimizer, range(3))
    net.load_state_dict(other.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    train(net, optimizer, [3])
    assert_equal(net.parameters(), other.parameters())


def test_prodigy_measures_from_values_set_before_its_first_step() -> None:
    net, started = make_net(), make_net()
    optimizer = stepwell.Prodigy(net.parameters())
    with torch.no_grad():
        for each in (net, started):
            for param in each.parameters():
                param.mul_(2.0)
    train(net, optimizer, range(5))
    expected = stepwell.Prodigy(started.parameters())
    train(started, expected, range(5))
    assert_equal(net.parameters(), started.parameters())
    assert_same_state(optimizer.state_dict(), expected.state_dict())


def test_write_of_the_same_values_keeps_the_master() -> None:
    params = copies_of(make_net().parameters(), torch.bfloat16)
    untouched = copies_of(params)
    optimizer, expected = (stepwell.AdamW(each, lr=1e-4) for each in (params, untouched))
    for step in range(5):
        drive(params, optimizer, [step])
        drive(untouched, expected, [step])
        with torch.no_grad():
            params[0].copy_(params[0].clone())
        optimizer.reload_parameters()
    drive(params, optimizer, [5])
    drive(untouched, expected, [5])
    assert_same_state(optimizer.state_dict(), expected.state_dict())


def test_change_of_some_elements_keeps_the_master_of_the_others() -> None:
    params = copies_of(make_net().parameters(), torch.bfloat16)
    optimizer = stepwell.AdamW(params, lr=1e-4)
    drive(params, optimizer, range(5))
    before = optimizer.state_dict()["state"][0]["master_param"]
    with torch.no_grad():
        params[0][3] = 7.0
    optimizer.param_groups[0]["lr"] = 0.0
    drive(params, optimizer, [5])
    after = optimizer.state_dict()["state"][0]["master_param"]
    assert torch.equal(after[3], torch.full_like(after[3], 7.0))
    others = torch.arange(len(after)) != 3
    assert torch.equal(after[others], before[others])


# Gradients that are not finite


def _poison(params: list[nn.Parameter], value: float) -> None:
    set_grads(params, 99)
    assert params[2].grad is not None
    params[2].grad.view(-1)[-1] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nonfinite_gradient_is_skipped(value: float, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    params = copies_of(make_net().parameters(), dtype)
    untouched = copies_of(params)
    optimizer, expected = stepwell.Prodigy(params), stepwell.Prodigy(untouched)
    drive(params, optimizer, range(3))
    drive(untouched, expected, range(3))
    _poison(params, value)
    with caplog.at_level(logging.WARNING, logger="stepwell"):
        optimizer.step()
    assert caplog.messages == ["step 4 was skipped on all shards: the averaged gradient holds inf or NaN"]
    assert_equal(params, untouched)
    assert_same_state(optimizer.state_dict(), expected.state_dict())
    status = optimizer.service.status()
    assert (status["step"], status["skipped_steps"]) == (4, 1)
    drive(params, optimizer, range(3, 6))
    drive(untouched, expected, range(3, 6))
    assert_equal(params, untouched)


def test_nonfinite_gradient_raises_if_asked() -> None:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.AdamW(params, on_nonfinite="raise")
    before = values_of(params)
    _poison(params, float("nan"))
    with pytest.raises(NonFiniteGradientError, match="step 1 was skipped on all shards"):
        optimizer.step()
    assert_equal(params, before)
    assert optimizer.service.status()["skipped_steps"] == 1


def test_skipped_step_leaves_what_was_changed_by_hand_for_the_next() -> None:
    params = copies_of(make_net().parameters())
    untouched = copies_of(params)
    optimizer, expected = stepwell.Prodigy(params), stepwell.Prodigy(untouched)
    for each, its_params in ((optimizer, params), (expected, untouched)):
        drive(its_params, each, range(3))
        with torch.no_grad():
            its_params[0].add_(1.0)
        each.param_groups[0]["d"] = 2e-3
        if each is optimizer:
            _poison(params, float("inf"))
            optimizer.step()
        drive(its_params, each, range(3, 5))
    assert_equal(params, untouched)
    assert_same_state(optimizer.state_dict(), expected.state_dict())


def test_absent_parameter_may_hold_anything() -> None:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.AdamW(params)
    _poison(params, float("nan"))
    optimizer.step()
    set_grads(params, 0)
    params[2].grad = None
    optimizer.step()
    status = optimizer.service.status()
    assert (status["step"], status["skipped_steps"]) == (2, 1)


# What it refuses


def _complex() -> Tensor:
    return nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64))


def _integer() -> Tensor:
    return torch.zeros(2, 3, dtype=torch.int64)


def _sparse() -> Tensor:
    return torch.eye(3).to_sparse().requires_grad_()


@pytest.mark.parametrize("make", [_complex, _integer, _sparse])
def test_construction_refuses_a_parameter_it_cannot_keep(make: Callable[[], Tensor]) -> None:
    params: list[tuple[str, Tensor]] = [("fine", nn.Parameter(torch.zeros(2))), ("odd.weight", make())]
    with pytest.raises(UnsupportedParameterError, match=r"parameter 'odd.weight' \[\d, 3\]: expected .* leave it out"):
        stepwell.AdamW(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
        ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"on_nonfinite": "stop"}, "on_nonfinite: expected 'skip' or 'raise', got 'stop'"),
    ],
)
@pytest.mark.parametrize("make", MAKERS)
def test_construction_refuses_a_value(
    make: Callable[..., stepwell.ServiceOptimizer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(make_net().parameters(), **options)


def test_construction_refuses_a_value_of_a_group() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.zeros(2))]},
        {"params": [nn.Parameter(torch.zeros(2))], "lr": -2.0},
    ]
    with pytest.raises(HyperparameterError, match=r"group 1: Invalid learning rate: -2.0"):
        stepwell.AdamW(groups)


def test_construction_refuses_an_unknown_keyword() -> None:
    options: dict[str, Any] = {"momentum": 0.9}
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        stepwell.AdamW(make_net().parameters(), **options)


@pytest.mark.parametrize("make", [stepwell.AdamW, torch.optim.AdamW])
def test_empty_parameters_are_treated_as_by_torch(make: Callable[..., torch.optim.Optimizer]) -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        make([])
    only = make([{"params": []}])
    only.step()
    assert only.state_dict()["state"] == {}
    param = nn.Parameter(torch.ones(3))
    optimizer = make([{"params": []}, {"params": [param]}])
    drive([param], optimizer, range(2))
    assert list(optimizer.state_dict()["state"]) == [0]


def test_sparse_gradient_is_refused_before_anything_moves() -> None:
    embedding = nn.Embedding(6, 3, sparse=True)
    optimizer = stepwell.AdamW(embedding.parameters())
    before = values_of(embedding.parameters())
    embedding(torch.tensor([1, 4])).sum().backward()
    with pytest.raises(
        UnsupportedParameterError, match=r"expected a dense gradient, got .*sparse_coo; use sparse=False"
    ):
        optimizer.step()
    assert_equal(embedding.parameters(), before)
    embedding.weight.grad = torch.ones_like(embedding.weight)
    optimizer.step()
    assert optimizer.service.status()["step"] == 1
