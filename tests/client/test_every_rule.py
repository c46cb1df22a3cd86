"""What holds for the optimizer of every rule: it is saved and goes on to the bit, and torch's state is ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stepwell
from stepwell.optim import RULES
from tests.client.training import assert_close, assert_equal, assert_same_state, copies_of, drive

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "Adam": [{"amsgrad": True, "maximize": True, "weight_decay": 0.1}],
    "AdamW": [{"amsgrad": True, "betas": (0.8, 0.9)}],
    "NAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "Prodigy": [
        {"d0": 1e-3, "slice_p": 11},
        {"d0": 1e-3, "stat_dtype": "bfloat16", "d_scope": "group", "eps_d": "old"},
        {"d0": 1e-3, "estimator": "inner_product", "growth_rate": 1.02, "stat_dtype": "bfloat16", "slice_p": 3},
    ],
    "RAdam": [{"weight_decay": 0.1, "betas": (0.8, 0.9)}],
    "RMSprop": [{"centered": True, "momentum": 0.9, "eps": 1e-3, "weight_decay": 0.1}],
    "SGD": [{"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}],
    "StableAdam": [{"lr": 0.1, "ratio": "init/current"}],
}
"""Beside the defaults: what gives a rule more slots, or other ones."""

CASES = [(name, options) for name in RULES.names() for options in [{}, *OPTIONS.get(name, [])]]
every_rule = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
rule_of_torch = pytest.mark.parametrize(
    ("name", "options"), [case for case in CASES if case[0] in vars(torch.optim)], ids=str
)


def params_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Channels and rows over several tiles, a zero tensor, single elements, empty ones."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(6, 3, 3, 3), (40, 13), (), (2, 10, 16, 2), (0, 4), (3, 0, 2, 2), (1,), (300,)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    with torch.no_grad():
        params[-1].zero_()
    return params


def make(name: str, params: list[nn.Parameter], options: dict[str, Any], num_shards: int = 1) -> Any:
    """The optimizer, its parameters in two groups."""
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:]}]
    return vars(stepwell)[name](groups, num_shards=num_shards, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@every_rule
def test_restored_run_on_other_shards_is_the_uninterrupted_one(
    name: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    params, expected = params_of(dtype), params_of(dtype)
    optimizer, untroubled = make(name, params, options, num_shards=3), make(name, expected, options)
    drive(params, optimizer, range(5))
    drive(expected, untroubled, range(10))
    optimizer.service.save(str(tmp_path))
    for num_shards in (1, 2, 7):
        resumed = params_of(dtype)
        successor = make(name, resumed, options, num_shards=num_shards)
        drive(resumed, successor, range(50, 52))
        successor.service.restore(str(tmp_path))
        successor.refresh()
        assert_equal(resumed, params)
        drive(resumed, successor, range(5, 10))
        assert_equal(resumed, expected)
        assert_same_state(successor.state_dict(), untroubled.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_rule
def test_state_dict_resumes_to_the_bit_on_other_shards(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    params, expected = params_of(dtype), params_of(dtype)
    optimizer, untroubled = make(name, params, options, num_shards=2), make(name, expected, options)
    drive(params, optimizer, range(5))
    drive(expected, untroubled, range(10))
    resumed = copies_of(params)
    successor = make(name, resumed, options, num_shards=7)
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    drive(resumed, successor, range(5, 10))
    assert_equal(resumed, expected)
    assert_same_state(successor.state_dict(), untroubled.state_dict())


@rule_of_torch
def test_state_dict_goes_to_torch_and_comes_from_it(name: str, options: dict[str, Any]) -> None:
    """Each goes on from the other's state in float64, as both would have from their own."""
    params, theirs = params_of(torch.float64), params_of(torch.float64)
    ours, oracle = vars(stepwell)[name](params, **options), vars(torch.optim)[name](theirs, **options)
    for each, its_params in ((ours, params), (oracle, theirs)):
        drive(its_params, each, range(5))
    to_torch, from_torch = copies_of(params), copies_of(theirs)
    reference, optimizer = vars(torch.optim)[name](to_torch, **options), vars(stepwell)[name](from_torch, **options)
    reference.load_state_dict(copy.deepcopy(ours.state_dict()))
    optimizer.load_state_dict(copy.deepcopy(oracle.state_dict()))
    for each, its_params in ((oracle, theirs), (reference, to_torch), (optimizer, from_torch)):
        drive(its_params, each, range(5, 12))
    assert_close(to_torch, theirs, rtol=1e-9, atol=1e-11)
    assert_close(from_torch, theirs, rtol=1e-9, atol=1e-11)
    (group,), (wanted,) = optimizer.state_dict()["param_groups"], oracle.state_dict()["param_groups"]
    assert {key: group[key] for key in wanted} == wanted
    for index, expected in oracle.state_dict()["state"].items():
        state = optimizer.state_dict()["state"][index]
        assert expected.keys() <= state.keys() <= expected.keys() | {"step"}
        for slot in expected.keys() - {"step"}:
            assert state[slot].dtype == expected[slot].dtype
            torch.testing.assert_close(state[slot], expected[slot], rtol=1e-9, atol=1e-11)


def test_empty_buffers_of_an_older_torch_count_as_none() -> None:
    """Its SGD without momentum wrote ``momentum_buffer: None``."""
    params = params_of()
    optimizer = stepwell.SGD(params, lr=0.1)
    drive(params, optimizer, range(2))
    saved = optimizer.state_dict()
    saved["state"] = {index: {"momentum_buffer": None} for index in range(len(params))}
    optimizer.load_state_dict(saved)
    drive(params, optimizer, range(2, 4))
