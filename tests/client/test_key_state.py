"""State per tensor, channel and group in the client: NAdam, StableAdam, and Prodigy with a d per group."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.optim import NAdamRule, ProdigyRule, Rule, StableAdamRule
from stepwell.sharding.errors import JobMismatchError
from tests.client.training import assert_close, assert_equal, assert_same_state, copies_of, drive


def params_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(6, 3, 3, 3), (40, 13), (), (2, 10, 16, 2), (0, 4), (3, 0, 2, 2)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def optimizer_of(params: Any, rule: Rule, num_shards: int = 1) -> stepwell.ServiceOptimizer:
    return stepwell.ServiceOptimizer(params, rule, num_shards=num_shards)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nadams_state_dict_goes_to_torch_and_comes_from_it(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = params_of(dtype)
    theirs = copies_of(params)
    ours, oracle = optimizer_of(params, NAdamRule(**options)), torch.optim.NAdam(theirs, **options)
    drive(params, ours, range(4))
    drive(theirs, oracle, range(4))
    state, expected = ours.state_dict(), oracle.state_dict()
    assert state["state"].keys() == expected["state"].keys()
    for index, wanted in expected["state"].items():
        assert state["state"][index].keys() == wanted.keys()
        for name in ("step", "mu_product"):
            value: Tensor = state["state"][index][name]
            assert (value.dtype, value.shape) == (torch.float32, ())
            assert torch.equal(value, wanted[name])

    successors = copies_of(params), copies_of(theirs)
    to_torch, from_torch = (
        torch.optim.NAdam(successors[0], **options),
        optimizer_of(successors[1], NAdamRule(**options)),
    )
    to_torch.load_state_dict(state)
    from_torch.load_state_dict(copy.deepcopy(expected))
    for each, its_params in ((ours, params), (oracle, theirs), (to_torch, successors[0]), (from_torch, successors[1])):
        drive(its_params, each, range(4, 8))
    for its_params in successors:
        assert_close(its_params, params, rtol=1e-5, atol=1e-6)
        assert_close(its_params, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [NAdamRule(), StableAdamRule(lr=0.1), ProdigyRule(stat_dtype="bfloat16", d_scope="group", d0=1e-3)],
    ids=lambda rule: str(rule.name),
)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_state_dict_resumes_to_the_bit_on_other_shards(rule: Rule, num_shards: int) -> None:
    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2]}, {"params": params[2:], "lr": rule.defaults()["lr"]}]

    params, resumed = params_of(), params_of()
    optimizer = optimizer_of(groups(params), rule, num_shards=2)
    drive(params, optimizer, range(5))
    successor = optimizer_of(groups(resumed), rule, num_shards=num_shards)
    with torch.no_grad():
        for param, value in zip(resumed, params, strict=True):
            param.copy_(value)
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(successor.state_dict(), optimizer.state_dict())
    for each, its_params in ((optimizer, params), (successor, resumed)):
        drive(its_params, each, range(5, 10))
    assert_equal(resumed, params)
    assert_same_state(successor.state_dict(), optimizer.state_dict())


def test_channel_state_has_one_number_per_channel() -> None:
    params = params_of()
    norms = [param.detach().double().flatten(1).norm(dim=1) for param in (params[0], params[3])]
    optimizer = optimizer_of(params, StableAdamRule(lr=0.1), num_shards=2)
    drive(params, optimizer, range(3))
    state = optimizer.state_dict()["state"]
    for index, wanted in ((0, norms[0]), (3, norms[1])):
        held = state[index]["initial_norm"]
        assert held.dtype == torch.float64
        torch.testing.assert_close(held, wanted, rtol=1e-6, atol=0.0)
    assert [state[index]["initial_norm"].numel() for index in (1, 2, 4, 5)] == [0, 0, 0, 0]


def test_state_dict_without_key_state_is_refused() -> None:
    params = params_of()
    optimizer = optimizer_of(params, NAdamRule())
    drive(params, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][1]["mu_product"]
    with pytest.raises(JobMismatchError, match=r"parameter 1 .* lacks 'mu_product'"):
        optimizer.load_state_dict(state)


def test_each_group_shows_and_takes_its_own_d() -> None:
    params = params_of()
    optimizer = optimizer_of([{"params": params[:2]}, {"params": params[2:]}], ProdigyRule(d0=1e-3, d_scope="group"))
    drive(params, optimizer, range(20))
    first, second = optimizer.param_groups
    scalars = optimizer.service.status()["scalars"]
    for index, group in enumerate((first, second)):
        assert {name: group[name] for name in ("d", "d_max", "d_numerator", "k")} == {
            name: scalars[f"{name}[{index}]"] for name in ("d", "d_max", "d_numerator", "k")
        }
    assert not any("[" in key for key in first)
    before = dict(first)
    second["d"] = 0.25
    for group in optimizer.param_groups:
        group["freeze_d"] = True
    drive(params, optimizer, range(20, 21))
    assert (second["d"], second["d_max"]) == (0.25, 0.25)
    assert (first["d"], first["d_max"]) == (before["d"], before["d_max"])
