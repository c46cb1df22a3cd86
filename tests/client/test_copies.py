"""Copies and pickles: an in-process optimizer's goes on for itself, to the same bits."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stepwell
from stepwell.optim import RULES
from stepwell.sharding.errors import HyperparameterError
from tests.client.training import assert_equal, assert_same_state, copies_of, drive, make_net, train, values_of

Pair = tuple[nn.Sequential, stepwell.ServiceOptimizer]


def _pickled(pair: Pair) -> Pair:
    copied: Pair = pickle.loads(pickle.dumps(pair))
    return copied


def _saved(pair: Pair) -> Pair:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    copied: Pair = torch.load(file, weights_only=False)
    return copied


WAYS: dict[str, Callable[[Pair], Pair]] = {"deepcopy": copy.deepcopy, "pickle": _pickled, "torch.save": _saved}
every_way = pytest.mark.parametrize("duplicate", WAYS.values(), ids=WAYS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES.names())
@every_way
def test_copy_trains_on_to_the_same_bits(duplicate: Callable[[Pair], Pair], name: str, dtype: torch.dtype) -> None:
    net = make_net(dtype)
    optimizer = vars(stepwell)[name](net.parameters(), lr=0.01, num_shards=2)
    train(net, optimizer, range(3))
    before, state, status = values_of(net.parameters()), optimizer.state_dict(), optimizer.service.status()
    copied_net, copied = duplicate((net, optimizer))
    assert type(copied) is type(optimizer)
    assert copied.service is not optimizer.service
    assert_same_state(copied.state_dict(), state)
    assert {**copied.service.status(), "timeline": None} == {**status, "timeline": None}
    train(copied_net, copied, range(3, 6))
    assert_equal(net.parameters(), before)
    assert_same_state(optimizer.state_dict(), state)
    train(net, optimizer, range(3, 6))
    assert_equal(copied_net.parameters(), net.parameters())
    assert_same_state(copied.state_dict(), optimizer.state_dict())


@every_way
def test_copy_keeps_how_it_was_made(duplicate: Callable[[Pair], Pair]) -> None:
    net = make_net()
    groups: list[dict[str, Any]] = [
        {"params": list(net[0].named_parameters()), "lr": 0.02, "note": ["kept"]},
        {"params": list(net[2].named_parameters())},
    ]
    optimizer = stepwell.Prodigy(groups, lr=torch.tensor(0.5), on_nonfinite="raise")
    copied_net, copied = duplicate(duplicate((net, optimizer)))
    assert repr(copied) == repr(optimizer)
    assert (copied.rule, copied.defaults) == (optimizer.rule, optimizer.defaults)
    assert [id(param) for group in copied.param_groups for param in group["params"]] == [
        id(param) for param in copied_net.parameters()
    ]
    copied.param_groups[1]["lr"].zero_()
    assert optimizer.param_groups[1]["lr"] == 0.5
    for param in copied_net.parameters():
        param.grad = torch.full_like(param, torch.inf)
    with pytest.raises(stepwell.StepwellError, match="step 1 was skipped on all shards"):
        copied.step()


@every_way
def test_copy_keeps_what_was_changed_by_hand(duplicate: Callable[[Pair], Pair]) -> None:
    net = make_net()
    optimizer = stepwell.Prodigy(net.parameters())
    train(net, optimizer, range(3))
    with torch.no_grad():
        next(net.parameters()).mul_(0.5)
    optimizer.param_groups[0]["d"] = 2e-3
    copied_net, copied = duplicate((net, optimizer))
    assert_equal(copied_net.parameters(), net.parameters())
    train(net, optimizer, range(3, 6))
    train(copied_net, copied, range(3, 6))
    assert_equal(copied_net.parameters(), net.parameters())
    assert_same_state(copied.state_dict(), optimizer.state_dict())


def test_copy_without_its_model_has_parameters_of_its_own() -> None:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.AdamW(params, lr=0.01)
    drive(params, optimizer, range(2))
    before, copied = values_of(params), copy.deepcopy(optimizer)
    own = copied.param_groups[0]["params"]
    drive(own, copied, range(2, 4))
    assert_equal(params, before)
    drive(params, optimizer, range(2, 4))
    assert_equal(own, params)


def test_copy_before_the_first_step_and_with_skipped_ones() -> None:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.Prodigy(params)
    assert_same_state(copy.deepcopy(optimizer).state_dict(), optimizer.state_dict())
    params[0].grad = torch.full_like(params[0], torch.nan)
    optimizer.step()
    status = copy.deepcopy(optimizer).service.status()
    assert (status["step"], status["skipped_steps"], status["sequence"]) == (1, 1, 1)


def test_copy_leaves_hooks_and_schedulers_behind_as_torchs() -> None:
    net, seen = make_net(), []
    optimizer = stepwell.AdamW(net.parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    copied = copy.deepcopy(optimizer)
    copied.step()
    assert seen == []
    copied.register_step_pre_hook(lambda *_: seen.append("copy"))
    copied.step()
    assert seen == ["copy"]


@every_way
def test_copy_has_the_groups_that_were_added(duplicate: Callable[[Pair], Pair]) -> None:
    net = make_net()
    optimizer = stepwell.Prodigy(net[0].named_parameters(), weight_decay_mask=lambda name, param: param.dim() > 1)
    train(net, optimizer, range(2))
    optimizer.add_param_group({"params": list(net[2].named_parameters(prefix="2")), "weight_decay": 0.1})
    train(net, optimizer, range(2, 4))
    copied_net, copied = duplicate((net, optimizer))
    for each, its_optimizer in ((net, optimizer), (copied_net, copied)):
        train(each, its_optimizer, range(4, 6))
        extra = nn.Parameter(torch.ones(3))
        its_optimizer.add_param_group({"params": [("extra", extra)]})
        extra.grad = torch.ones(3)
        its_optimizer.step()
    assert_equal(copied_net.parameters(), net.parameters())
    assert_same_state(copied.state_dict(), optimizer.state_dict())


@every_way
def test_copy_of_a_closed_optimizer_is_closed(duplicate: Callable[[Pair], Pair]) -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), lr=0.25)
    optimizer.close()
    _, copied = duplicate((net, optimizer))
    assert copied.param_groups[0]["lr"] == 0.25
    with pytest.raises(RuntimeError, match="this optimizer is closed; make one with the constructor"):
        copied.step()


def test_copy_checks_its_groups_too() -> None:
    optimizer = copy.deepcopy(stepwell.Prodigy(make_net().parameters()))
    optimizer.param_groups[0]["slice_p"] = 3
    with pytest.raises(HyperparameterError, match="slice_p of group 0: expected 1 as in the whole job, got 3"):
        optimizer.step()
