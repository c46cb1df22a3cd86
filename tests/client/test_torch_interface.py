"""What torch promises of every optimizer beside its numbers: hooks, profiling, torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import prodigyopt
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions

import stepwell
from stepwell.optim import RULES, AdamWRule
from tests.client.training import assert_close, assert_equal, assert_same_state, loss_of, make_net, train, values_of

every_name = pytest.mark.parametrize("name", RULES.names())


# Hooks


@pytest.mark.parametrize("base_first", [True, False])
@every_name
def test_step_hooks_run_once_around_a_step(name: str, base_first: bool) -> None:
    net, seen = make_net(), []

    def base() -> None:
        stepwell.ServiceOptimizer(make_net().parameters(), AdamWRule())

    if base_first:
        base()
    optimizer = vars(stepwell)[name](net.parameters())
    base()
    optimizer.register_step_pre_hook(lambda own, args, kwargs: seen.append(("before", own, args, kwargs)))
    optimizer.register_step_post_hook(lambda own, args, kwargs: seen.append(("after", own, args, kwargs)))
    optimizer.step(closure=None)
    assert seen == [(when, optimizer, (optimizer,), {"closure": None}) for when in ("before", "after")]


def test_step_pre_hook_may_change_the_arguments() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters())
    optimizer.register_step_pre_hook(lambda own, args, kwargs: ((own, lambda: 7.5), {}))
    assert optimizer.step() == 7.5


def test_hook_that_raises_stops_the_step() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters())

    def refuse(*_: Any) -> None:
        raise ArithmeticError("not now")

    handle = optimizer.register_step_pre_hook(refuse)
    with pytest.raises(ArithmeticError, match="not now"):
        train(net, optimizer, [0])
    assert optimizer.service.status()["step"] == 0
    handle.remove()
    train(net, optimizer, [0])
    assert optimizer.service.status()["step"] == 1


def test_state_dict_hooks_run_and_may_change_it() -> None:
    optimizer, seen = stepwell.AdamW(make_net().parameters()), []
    optimizer.register_state_dict_pre_hook(lambda own: seen.append(("save", own)))
    optimizer.register_state_dict_post_hook(lambda own, saved: {**saved, "note": "kept"})
    saved = optimizer.state_dict()
    assert saved["note"] == "kept"
    optimizer.register_load_state_dict_pre_hook(lambda own, loaded: {**loaded, "param_groups": [_with_lr(loaded)]})
    optimizer.register_load_state_dict_post_hook(lambda own: seen.append(("loaded", own)))
    optimizer.load_state_dict(saved)
    assert seen == [("save", optimizer), ("loaded", optimizer)]
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert saved["param_groups"][0]["lr"] == 1e-3


def _with_lr(loaded: dict[str, Any]) -> dict[str, Any]:
    return {**loaded["param_groups"][0], "lr": 0.125}


@every_name
def test_profiler_sees_the_step_once(name: str) -> None:
    net = make_net()
    optimizer = vars(stepwell)[name](net.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(net, optimizer, range(2))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts[f"Optimizer.step#{name}.step"] == 2
    assert counts[f"Optimizer.zero_grad#{name}.zero_grad"] == 2


@pytest.mark.parametrize(
    ("make", "reference"),
    [
        (stepwell.SGD, torch.optim.SGD),
        (stepwell.RMSprop, torch.optim.RMSprop),
        (stepwell.Adam, torch.optim.Adam),
        (stepwell.AdamW, torch.optim.AdamW),
        (stepwell.Prodigy, prodigyopt.Prodigy),
    ],
)
def test_repr_and_defaults_are_those_of_the_reference(make: Any, reference: Any) -> None:
    ours, theirs = make(make_net().parameters()), reference(make_net().parameters())
    assert [line.split(":")[0] for line in repr(theirs).splitlines() if line.split(":")[0] not in repr(ours)] == []
    assert {key: ours.defaults[key] for key in theirs.defaults} == theirs.defaults


# torch.distributed.checkpoint


FORMS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_steps", [0, 3])
@every_name
def test_distributed_checkpoint_round_trips_without_a_step(
    name: str, num_steps: int, dtype: torch.dtype, form: str
) -> None:
    options, net, resumed = FORMS[form], make_net(dtype), make_net(dtype)
    keywords = {"lr": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}  # without, torch's own SGD cannot be full
    optimizer, successor = (vars(stepwell)[name](each.named_parameters(), **keywords) for each in (net, resumed))
    train(net, optimizer, range(num_steps))
    optimizer.zero_grad()
    before, state = values_of(net.parameters()), optimizer.state_dict()
    model_state, optimizer_state = dcp.get_state_dict(net, optimizer, options=options)
    assert_same_state(optimizer.state_dict(), state)
    assert_equal(net.parameters(), before)
    dcp.set_state_dict(
        resumed, successor, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options
    )
    assert optimizer.service.status()["step"] == successor.service.status()["step"] == num_steps
    assert_same_state(successor.state_dict(), state)
    for each, its_optimizer in ((net, optimizer), (resumed, successor)):
        train(each, its_optimizer, range(num_steps, num_steps + 3))
    assert_equal(resumed.parameters(), net.parameters())


@pytest.mark.parametrize("num_steps", [0, 2])
def test_distributed_checkpoint_of_the_optimizer_alone(num_steps: int) -> None:
    net, resumed = make_net(), make_net()
    optimizer, successor = stepwell.Prodigy(net.parameters()), stepwell.Prodigy(resumed.parameters())
    train(net, optimizer, range(num_steps))
    saved = dcp.get_optimizer_state_dict(net, optimizer)
    assert saved["param_groups"][0]["params"] == [name for name, _ in net.named_parameters()]  # type: ignore[call-overload,index]
    resumed.load_state_dict(net.state_dict())
    dcp.set_optimizer_state_dict(resumed, successor, saved)
    assert optimizer.service.status()["step"] == successor.service.status()["step"] == num_steps
    for each, its_optimizer in ((net, optimizer), (resumed, successor)):
        train(each, its_optimizer, range(3, 6))
    assert_equal(resumed.parameters(), net.parameters())


@pytest.mark.parametrize(
    ("make", "reference"),
    [(stepwell.AdamW, torch.optim.AdamW), (stepwell.Adam, torch.optim.Adam), (stepwell.RMSprop, torch.optim.RMSprop)],
)
def test_distributed_checkpoint_of_torchs_optimizer_goes_on_here(make: Any, reference: Callable[..., Any]) -> None:
    net, resumed = make_net(), make_net()
    optimizer = reference(net.parameters(), lr=0.01)
    train(net, optimizer, range(3))
    model_state, optimizer_state = dcp.get_state_dict(net, optimizer)
    successor = make(resumed.parameters(), lr=0.5)
    dcp.set_state_dict(resumed, successor, model_state_dict=model_state, optim_state_dict=optimizer_state)
    assert successor.param_groups[0]["lr"] == 0.01
    for each, its_optimizer in ((net, optimizer), (resumed, successor)):
        train(each, its_optimizer, range(3, 6))
    assert_close(resumed.parameters(), net.parameters())


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_distributed_checkpoint_with_frozen_and_unused_parameters(form: str) -> None:
    net, resumed = make_net(), make_net()
    options = StateDictOptions(flatten_optimizer_state_dict=form == "flat", strict=False)
    for each in (net, resumed):
        each[0].bias.requires_grad_(False)
    optimizer, successor = (stepwell.Prodigy(each.parameters(), lr=1.0) for each in (net, resumed))
    for step in range(3):
        optimizer.zero_grad()
        loss_of(net, step).backward()  # type: ignore[no-untyped-call]
        net[2].weight.grad = None
        optimizer.step()
    model_state, optimizer_state = dcp.get_state_dict(net, optimizer, options=options)
    dcp.set_state_dict(
        resumed, successor, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options
    )
    assert list(successor.state_dict()["state"]) == [0, 3]
    assert_same_state(successor.state_dict(), optimizer.state_dict())


def test_state_dict_reads_do_not_touch_gradients() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), lr=0.01)
    loss_of(net, 0).backward()  # type: ignore[no-untyped-call]
    grads = [param.grad for param in net.parameters()]
    dcp.get_optimizer_state_dict(net, optimizer)
    optimizer.state_dict()
    assert all(param.grad is grad for param, grad in zip(net.parameters(), grads, strict=True))
    assert all(isinstance(param, nn.Parameter) for param in net.parameters())
