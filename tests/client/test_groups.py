"""What the parameter groups show, what is read from them, and what a person may write there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import prodigyopt
import pytest
import torch
from torch import nn

import stepwell
from stepwell.client.groups import param_specs, plain_rule
from stepwell.sharding.errors import HyperparameterError
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

SCALARS = ("d", "d_max", "d_numerator", "k")


def test_groups_show_the_scalars_after_each_step() -> None:
    net, oracle_net = make_net(), make_net()
    optimizer = stepwell.Prodigy([{"params": net[0].parameters()}, {"params": net[2].parameters()}])
    oracle = prodigyopt.Prodigy([{"params": oracle_net[0].parameters()}, {"params": oracle_net[2].parameters()}])
    assert [optimizer.param_groups[1][name] for name in SCALARS] == [1e-6, 1e-6, 0.0, 0]
    for step in range(8):
        train(net, optimizer, [step])
        train(oracle_net, oracle, [step])
        for group, expected in zip(optimizer.param_groups, oracle.param_groups, strict=True):
            assert [group[name] for name in SCALARS] == pytest.approx([expected[name] for name in SCALARS], rel=1e-4)
    assert isinstance(optimizer.param_groups[0]["k"], int)


def test_group_is_not_replaced_by_a_step() -> None:
    net = make_net()
    optimizer = stepwell.Prodigy(net.parameters())
    group = optimizer.param_groups[0]
    train(net, optimizer, range(2))
    assert optimizer.param_groups[0] is group
    assert group["k"] == 2


@pytest.mark.parametrize(
    "written",
    [{"d": 3e-3, "d_max": 3e-3, "d_numerator": 0.5}, {"d_max": 1e-3}, {"d_numerator": 0.5}, {"k": 40}],
    ids=str,
)
def test_written_scalar_takes_effect_as_for_prodigyopt(written: dict[str, float]) -> None:
    net, oracle_net = make_net(), make_net()
    optimizer = stepwell.Prodigy(net.parameters(), use_bias_correction=True)
    oracle = prodigyopt.Prodigy(oracle_net.parameters(), use_bias_correction=True)
    for each, its_net in ((optimizer, net), (oracle, oracle_net)):
        train(its_net, each, range(4))
        each.param_groups[0].update(written)
        train(its_net, each, range(4, 7))
    for name in SCALARS:
        assert optimizer.param_groups[0][name] == pytest.approx(oracle.param_groups[0][name], rel=1e-3)
        assert type(optimizer.param_groups[0][name]) is type(oracle.param_groups[0][name])
    assert_close(net.parameters(), oracle_net.parameters(), rtol=1e-3, atol=1e-4)


def test_written_scalar_counts_once_from_any_group() -> None:
    def moved(index: int) -> tuple[nn.Sequential, stepwell.Prodigy]:
        net = make_net()
        optimizer = stepwell.Prodigy([{"params": net[0].parameters()}, {"params": net[2].parameters()}])
        train(net, optimizer, range(3))
        optimizer.param_groups[index]["d"] = torch.tensor(0.5e-3, dtype=torch.float64)
        train(net, optimizer, range(3, 6))
        return net, optimizer

    (net, optimizer), (other, its_optimizer) = moved(0), moved(1)
    assert_equal(net.parameters(), other.parameters())
    assert_same_state(optimizer.state_dict(), its_optimizer.state_dict())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("d", float("nan"), "d: expected a finite number, got nan"),
        ("d_max", float("inf"), "d_max: expected a finite number, got inf"),
        ("d", "big", "d: expected a finite number, got 'big'"),
        ("lr", float("nan"), "group 0: Invalid learning rate: nan"),
        ("lr", "big", "group 0: Invalid lr value: 'big'"),
        ("betas", (0.9,), "group 0: Invalid betas value"),
        ("slice_p", 3, "slice_p of group 0: expected 1 as in the whole job, got 3; give it to the optimizer"),
    ],
)
def test_written_value_that_cannot_be_is_refused(name: str, value: Any, message: str) -> None:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.Prodigy(params)
    drive(params, optimizer, range(3))
    before, state = values_of(params), optimizer.state_dict()
    kept = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    set_grads(params, 3)
    with pytest.raises(HyperparameterError, match=message):
        optimizer.step()
    optimizer.param_groups[0][name] = kept
    assert_equal(params, before)
    assert_same_state(optimizer.state_dict(), state)
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 4


def test_unknown_key_is_carried() -> None:
    net = make_net()
    optimizer = stepwell.AdamW([{"params": net.parameters(), "lr_scale": 0.5, "note": ["kept"]}])
    train(net, optimizer, [0])
    saved = optimizer.state_dict()
    assert (saved["param_groups"][0]["lr_scale"], saved["param_groups"][0]["note"]) == (0.5, ["kept"])
    successor = stepwell.AdamW(make_net().parameters())
    successor.load_state_dict(saved)
    assert successor.param_groups[0]["lr_scale"] == 0.5
    assert successor.param_groups[0]["note"] is not saved["param_groups"][0]["note"]


@pytest.mark.parametrize(
    "make_groups", [lambda net: net.named_parameters(), lambda net: [{"params": net.named_parameters()}]]
)
def test_named_parameters_show_their_names(make_groups: Callable[[nn.Module], Any]) -> None:
    net, oracle_net = make_net(), make_net()
    optimizer, oracle = stepwell.AdamW(make_groups(net)), torch.optim.AdamW(make_groups(oracle_net))
    train(net, optimizer, range(3))
    train(oracle_net, oracle, range(3))
    assert optimizer.param_groups[0]["param_names"] == oracle.param_groups[0]["param_names"]
    assert optimizer.state_dict()["param_groups"] == oracle.state_dict()["param_groups"]
    assert_close(net.parameters(), oracle_net.parameters())


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("module.layer.weight", "layer.weight"),
        ("_orig_mod.module.layer.weight", "layer.weight"),
        ("layers.0._orig_mod.weight", "layers.0.weight"),
        ("submodule.my_module.weight", "submodule.my_module.weight"),
    ],
)
def test_parameter_name_is_bare_of_wrappers(name: str, bare: str) -> None:
    (spec,) = param_specs([{"params": [nn.Parameter(torch.zeros(2))], "param_names": [name]}])
    assert spec.name == bare


def test_rule_travels_without_tensors() -> None:
    rule = stepwell.optim.AdamWRule(lr=torch.tensor(0.5), betas=(torch.tensor(0.5), 0.25))  # type: ignore[arg-type]
    assert plain_rule(rule) == stepwell.optim.AdamWRule(lr=0.5, betas=(0.5, 0.25))


def test_tensor_lr_stays_the_callers_tensor() -> None:
    net, lr = make_net(), torch.tensor(0.01)
    optimizer = stepwell.AdamW(net.parameters(), lr=lr)
    train(net, optimizer, [0])
    before = values_of(net.parameters())
    lr.zero_()
    train(net, optimizer, [1])
    assert optimizer.param_groups[0]["lr"] is lr
    assert_equal(net.parameters(), before)
