"""State dicts: interchangeable with the references', exact for every dtype, and refused whole when they do not fit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import prodigyopt
import pytest
import torch
from torch import nn

import stepwell
from stepwell.sharding.errors import HyperparameterError, JobMismatchError
from tests.client.training import (
    assert_close,
    assert_equal,
    assert_same_state,
    copies_of,
    drive,
    make_net,
    set_grads,
    train,
    values_of,
)

REFERENCES: dict[type[stepwell.ServiceOptimizer], Any] = {
    stepwell.Prodigy: prodigyopt.Prodigy,
    stepwell.AdamW: torch.optim.AdamW,
}
CASES: list[tuple[Any, dict[str, Any]]] = [
    (stepwell.Prodigy, {}),
    (stepwell.Prodigy, {"slice_p": 11}),
    (stepwell.Prodigy, {"betas": (0.0, 0.99)}),
    (stepwell.Prodigy, {"use_bias_correction": True, "safeguard_warmup": True}),
    (stepwell.AdamW, {"lr": 0.01}),
    (stepwell.AdamW, {"lr": 0.01, "amsgrad": True}),
]
PRODIGYS_OWN = {"eps_d", "estimator", "d_scope", "freeze_d", "max_d", "stat_dtype"}
"""Group keys that prodigyopt does not know, and leaves alone."""
cases = pytest.mark.parametrize(
    ("make", "options"), CASES, ids=[f"{make.__name__}-{','.join(options)}" for make, options in CASES]
)


def _params() -> list[nn.Parameter]:
    """A zero one, whose p0 prodigyopt keeps as a number, and a frozen one, that has no state."""
    params = copies_of(make_net(torch.float64).parameters())
    with torch.no_grad():
        params[1].zero_()
    params.append(nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False))
    return params


def _drive(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_grads(params[:-1], step)
        optimizer.step()


def _assert_same_form(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Same parameters, slots, shapes, dtypes and step counts; every key of ours is one of theirs."""
    assert ours["state"].keys() == theirs["state"].keys()
    for index, expected in theirs["state"].items():
        state = ours["state"][index]
        assert state.keys() == expected.keys()
        assert type(state["step"]) is type(expected["step"])
        assert state["step"] == expected["step"]
        for name in state.keys() - {"step"}:
            assert state[name].dtype == expected[name].dtype
            assert state[name].shape == expected[name].shape or expected[name].dim() == 0
    for group, expected in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert expected.keys() - group.keys() <= {"d_hat", "d_denom"}, "prodigyopt's group keys that no step reads"
        assert group.keys() - expected.keys() <= PRODIGYS_OWN
        assert group["params"] == expected["params"]


@cases
def test_state_dict_goes_to_the_reference(make: Any, options: dict[str, Any]) -> None:
    params = _params()
    optimizer = make(params, **options)
    _drive(params, optimizer, range(5))
    oracle_params = copies_of(params)
    oracle = REFERENCES[make](oracle_params, **options)
    oracle.load_state_dict(optimizer.state_dict())
    _drive(params, optimizer, range(5, 10))
    _drive(oracle_params, oracle, range(5, 10))
    assert_close(params, oracle_params, rtol=1e-8, atol=1e-10)


@cases
def test_state_dict_comes_from_the_reference(make: Any, options: dict[str, Any]) -> None:
    oracle_params = _params()
    oracle = REFERENCES[make](oracle_params, **options)
    _drive(oracle_params, oracle, range(5))
    params = copies_of(oracle_params)
    optimizer = make(params, **options)
    optimizer.load_state_dict(copy.deepcopy(oracle.state_dict()))
    _assert_same_form(optimizer.state_dict(), oracle.state_dict())
    assert optimizer.service.status()["step"] == 5
    _drive(params, optimizer, range(5, 10))
    _drive(oracle_params, oracle, range(5, 10))
    assert_close(params, oracle_params, rtol=1e-8, atol=1e-10)
    for name in ("d", "d_max", "d_numerator", "k") if make is stepwell.Prodigy else ():
        assert optimizer.param_groups[0][name] == pytest.approx(oracle.param_groups[0][name], rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [stepwell.Prodigy, stepwell.AdamW, stepwell.LAMB])
@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "optimizer first"])
def test_state_dict_resumes_to_the_bit(
    make: Callable[..., stepwell.ServiceOptimizer], dtype: torch.dtype, model_first: bool
) -> None:
    net, resumed = make_net(dtype), make_net(dtype)
    with torch.no_grad():
        for param in resumed.parameters():
            param.zero_()
    optimizer, successor = make(net.parameters()), make(resumed.parameters())
    train(net, optimizer, range(5))
    saved = optimizer.state_dict()
    assert all(("master_param" in state) == (dtype.itemsize == 2) for state in saved["state"].values())
    if model_first:
        resumed.load_state_dict(net.state_dict())
    successor.load_state_dict(saved)
    if not model_first:
        resumed.load_state_dict(net.state_dict())
    assert_same_state(successor.state_dict(), saved)
    train(net, optimizer, range(5, 10))
    train(resumed, successor, range(5, 10))
    assert_equal(resumed.parameters(), net.parameters())
    assert_same_state(successor.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("make", [stepwell.Prodigy, stepwell.AdamW])
def test_state_dict_survives_a_file(make: Callable[..., stepwell.ServiceOptimizer]) -> None:
    net = make_net(torch.bfloat16)
    optimizer = make([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.5}])
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=True), optimizer.state_dict())


def test_state_dict_is_a_copy() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters())
    train(net, optimizer, range(2))
    saved, again = optimizer.state_dict(), optimizer.state_dict()
    for state in saved["state"].values():
        state["exp_avg"].zero_()
    assert_same_state(optimizer.state_dict(), again)
    train(net, optimizer, [2])
    assert again["state"][0]["step"] == 2


def test_state_dict_before_the_first_step_resets_a_later_one() -> None:
    net, fresh = make_net(), make_net()
    optimizer, expected = stepwell.Prodigy(net.parameters()), stepwell.Prodigy(fresh.parameters())
    initial = optimizer.state_dict()
    assert [state["step"] for state in initial["state"].values()] == [0, 0, 0, 0]
    train(net, optimizer, range(4))
    net.load_state_dict(fresh.state_dict())
    optimizer.load_state_dict(initial)
    assert optimizer.param_groups[0]["k"] == 0
    for each, its_optimizer in ((net, optimizer), (fresh, expected)):
        train(each, its_optimizer, range(4))
    assert_equal(net.parameters(), fresh.parameters())


def test_load_keeps_the_callers_names_and_fills_in_new_keys() -> None:
    net, oracle_net = make_net(), make_net()
    oracle = torch.optim.AdamW(oracle_net.parameters(), lr=0.5)
    train(oracle_net, oracle, range(2))
    saved = oracle.state_dict()
    del saved["param_groups"][0]["decoupled_weight_decay"]
    optimizer = stepwell.AdamW(net.named_parameters())
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["decoupled_weight_decay"]) == (0.5, True)
    assert group["param_names"] == [name for name, _ in net.named_parameters()]
    assert group["params"][0] is next(net.parameters())


def test_hooks_run_and_may_replace_the_state_dict() -> None:
    net, seen = make_net(), []
    optimizer = stepwell.AdamW(net.parameters())
    train(net, optimizer, range(2))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "epoch": 3})
    saved = optimizer.state_dict()
    assert saved["epoch"] == 3

    def halve_lr(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        seen.append("before loading")
        return {**loaded, "param_groups": [{**loaded["param_groups"][0], "lr": loaded["param_groups"][0]["lr"] / 2}]}

    optimizer.register_load_state_dict_pre_hook(halve_lr)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after loading"))
    optimizer.load_state_dict(saved)
    assert seen == ["before saving", "before loading", "after loading"]
    assert optimizer.param_groups[0]["lr"] == 5e-4
    assert saved["param_groups"][0]["lr"] == 1e-3


def _without_slot(saved: dict[str, Any]) -> None:
    del saved["state"][2]["exp_avg_sq"]


def _cut_slot(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"][:-1]


def _cut_master(saved: dict[str, Any]) -> None:
    saved["state"][0]["master_param"] = torch.zeros(3)


def _unknown_slot(saved: dict[str, Any]) -> None:
    saved["state"][1]["momentum_buffer"] = torch.zeros(40)


def _number_for_slot(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg"] = 0.0


def _unknown_key(saved: dict[str, Any]) -> None:
    saved["state"]["0.weight"] = saved["state"].pop(0)


def _other_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"].append({**saved["param_groups"][0], "params": []})


def _shorter_group(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


def _nan_scalar(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["d_numerator"] = float("nan")


def _bad_lr(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["lr"] = -1.0


def _other_slices(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["slice_p"] = 11


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            _without_slot,
            JobMismatchError,
            r"parameter 2 \('2.weight' \[5, 40\]\) lacks 'exp_avg_sq'; it is not of Prodigy",
        ),
        (_cut_slot, JobMismatchError, r"parameter 0 .* has exp_avg with 468 elements; expected 480"),
        (_cut_master, JobMismatchError, r"parameter 0 .* has master_param with 3 elements; expected 480"),
        (_unknown_slot, JobMismatchError, r"parameter 1 .* has 'momentum_buffer', .* it keeps s, p0, exp_avg"),
        (_number_for_slot, JobMismatchError, r"parameter 1 .* has exp_avg of type float; expected a tensor"),
        (_unknown_key, JobMismatchError, r"expected states of its groups' parameters only, got one of '0.weight'"),
        (_other_groups, ValueError, r"different number of parameter groups: expected 1, got 2"),
        (_shorter_group, ValueError, r"doesn't match the size of optimizer's group 0: expected 4, got 3"),
        (_nan_scalar, HyperparameterError, r"d_numerator: expected a finite number, got nan"),
        (_bad_lr, HyperparameterError, r"group 0: Invalid learning rate: -1.0"),
        (_other_slices, HyperparameterError, r"slice_p of group 0: expected 1 as in the whole job, got 11"),
    ],
)
def test_load_refuses_what_does_not_fit_and_changes_nothing(
    spoil: Callable[[dict[str, Any]], None], error: type[Exception], message: str
) -> None:
    net = make_net()
    optimizer = stepwell.Prodigy(net.named_parameters())
    train(net, optimizer, range(3))
    before, values, status = optimizer.state_dict(), values_of(net.parameters()), optimizer.service.status()
    spoiled = copy.deepcopy(before)
    spoil(spoiled)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(spoiled)
    assert_same_state(optimizer.state_dict(), before)
    assert_equal(net.parameters(), values)
    assert optimizer.service.status() == status


def test_load_refuses_the_state_of_another_optimizer() -> None:
    net = make_net()
    reference = torch.optim.AdamW(net.parameters())
    train(net, reference, [0])
    with pytest.raises(JobMismatchError, match=r"parameter 0 .* lacks 's'; it is not of Prodigy with s, p0"):
        stepwell.Prodigy(net.parameters()).load_state_dict(reference.state_dict())


def test_state_of_a_frozen_parameter_may_be_missing() -> None:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.AdamW(params, lr=0.01)
    params[0].requires_grad_(False)
    drive(params[1:], optimizer, range(3))
    saved = optimizer.state_dict()
    assert list(saved["state"]) == [1, 2, 3]
    successor = stepwell.AdamW(copies_of(params), lr=0.01)
    successor.load_state_dict(saved)
    assert_same_state(successor.state_dict(), saved)
