"""Which parameters an optimizer takes, which of them decay, and what becomes of one from step to step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.client.groups import WeightDecayMask, apply_mask, param_specs
from stepwell.client.worker import Worker
from stepwell.optim import RULES
from stepwell.sharding.errors import UnsupportedParameterError
from tests.client.training import assert_close, assert_equal, copies_of, decaying, drive, make_net, set_grads, values_of

every_name = pytest.mark.parametrize("name", RULES.names())


def _param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


# Each parameter once

SHARED, OTHER = _param(2, 3), _param(4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([OTHER, SHARED, SHARED], "parameter 'number 2' [2, 3] of group 0 appears in group 0 already"),
        ([("a", SHARED), ("b", SHARED)], "parameter 'b' [2, 3] of group 0 appears in group 0 already"),
        ([{"params": SHARED}, {"params": [OTHER, SHARED]}], "'number 1' [2, 3] of group 1 appears in group 0 already"),
        (
            [{"params": [("a", SHARED)]}, {"params": iter([("c", OTHER), ("b", SHARED)])}],
            "parameter 'b' [2, 3] of group 1 appears in group 0 already",
        ),
        ([{"params": [OTHER]}, {"params": []}, {"params": {"x": OTHER}.values()}], "of group 2 appears in group 0"),
    ],
)
def test_parameter_given_twice_is_refused(params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        stepwell.AdamW(params)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([{"params": {SHARED, OTHER}}], TypeError, "optimizer parameters need to be organized in ordered collections"),
        (SHARED, TypeError, "should be an iterable of Tensors or dicts"),
        ([], ValueError, "optimizer got an empty parameter list"),
        ([1.5, 1.5], TypeError, "optimizer can only optimize Tensors"),
        ([SHARED * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([("a", SHARED), OTHER], ValueError, "all optimizer params should be with/without names"),
        ([{"lr": 1.0}], KeyError, "params"),
    ],
)
@pytest.mark.parametrize("make", [stepwell.AdamW, torch.optim.AdamW], ids=["stepwell", "torch"])
def test_what_torch_refuses_is_refused_in_the_same_words(
    make: Any, params: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(params)


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y


@pytest.mark.parametrize("named", [False, True])
def test_tied_parameters_count_once(named: bool) -> None:
    nets = Tied(), Tied()
    makers: tuple[Any, Any] = (stepwell.SGD, torch.optim.SGD)
    optimizers = [
        make(net.named_parameters() if named else net.parameters(), lr=0.1, momentum=0.9)
        for make, net in zip(makers, nets, strict=True)
    ]
    for step in range(5):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert optimizers[0].service.status()["num_params"] == 3
    assert nets[0].second.weight is nets[0].first.weight
    assert_close(nets[0].parameters(), nets[1].parameters())


@pytest.mark.parametrize("wrap", [list, tuple, iter, lambda params: {p: None for p in params}.keys()])
def test_parameters_come_in_any_ordered_form(wrap: Callable[[Any], Any]) -> None:
    for give in (lambda params: wrap(params), lambda params: [{"params": wrap(params)}]):
        params, expected = copies_of(make_net().parameters()), copies_of(make_net().parameters())
        drive(params, stepwell.AdamW(give(params), lr=0.01), range(2))
        drive(expected, stepwell.AdamW(expected, lr=0.01), range(2))
        assert_equal(params, expected)


@every_name
def test_zero_element_and_0_dim_parameters_and_empty_groups(name: str) -> None:
    params = [nn.Parameter(torch.tensor(2.5)), _param(0), _param(0, 3), _param(3, 0, 2), _param(257)]
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": []}, {"params": params[2:], "lr": 0.5}]
    optimizer = vars(stepwell)[name](groups, lr=0.01)
    before = values_of(params)
    drive(params, optimizer, range(3))
    assert [param.shape for param in params] == [value.shape for value in before]
    assert all(bool(torch.isfinite(param).all()) for param in params)
    assert not torch.equal(params[4], before[4])
    state_dict = optimizer.state_dict()
    assert [group["params"] for group in state_dict["param_groups"]] == [[0, 1], [], [2, 3, 4]]
    optimizer.load_state_dict(state_dict)
    assert optimizer.service.status()["numel"] == 258


# From step to step

TORCH = ["SGD", "RMSprop", "Adam", "AdamW", "RAdam"]


def _without(params: Sequence[nn.Parameter], index: int) -> None:
    params[index].grad = None


def _frozen(params: Sequence[nn.Parameter], index: int) -> None:
    params[index].requires_grad_(False)
    params[index].grad = None


@pytest.mark.parametrize("absent_in", [range(0, 3), range(2, 4), range(4, 6)], ids=["at first", "mid-way", "at last"])
@pytest.mark.parametrize("leave_out", [_without, _frozen])
@pytest.mark.parametrize("name", TORCH)
def test_parameter_that_is_left_out_for_some_steps(
    name: str, leave_out: Callable[[Sequence[nn.Parameter], int], None], absent_in: range
) -> None:
    params, oracle_params = copies_of(make_net().parameters()), copies_of(make_net().parameters())
    options = {"lr": 0.01, "weight_decay": 0.1, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})}
    optimizer = vars(stepwell)[name](params, **options)
    oracle = vars(torch.optim)[name](oracle_params, **options)
    for step in range(6):
        for each, its_params in ((optimizer, params), (oracle, oracle_params)):
            its_params[2].requires_grad_(True)
            set_grads(its_params, step)
            before = values_of(its_params)
            if step in absent_in:
                leave_out(its_params, 2)
            each.step()
            assert torch.equal(its_params[2], before[2]) == (step in absent_in)
    assert_close(params, oracle_params)
    assert optimizer.state_dict()["state"][2]["step"] == 6 - len(absent_in)


@every_name
def test_step_without_any_gradient_moves_nothing(name: str) -> None:
    params = copies_of(make_net().parameters())
    optimizer = decaying(name, params)
    drive(params, optimizer, range(2))
    before = values_of(params)
    optimizer.zero_grad()
    optimizer.step()
    assert_equal(params, before)


@pytest.mark.parametrize("name", TORCH)
def test_parameter_changed_by_hand_between_steps_goes_on_as_in_torch(name: str) -> None:
    params, oracle_params = copies_of(make_net().parameters()), copies_of(make_net().parameters())
    optimizer = vars(stepwell)[name](params, lr=0.01)
    oracle = vars(torch.optim)[name](oracle_params, lr=0.01)
    for step in range(6):
        for each, its_params in ((optimizer, params), (oracle, oracle_params)):
            with torch.no_grad():
                its_params[step % 4].add_(0.25).clamp_(-0.5, 0.5)
            drive(its_params, each, [step])
    assert_close(params, oracle_params)


def test_complex_parameter_is_refused_by_name_from_a_later_group() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [("fine", _param(2))]},
        {"params": [("odd", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))]},
    ]
    with pytest.raises(UnsupportedParameterError, match=r"parameter 'odd' \[2\]: expected a dense floating-point"):
        stepwell.AdamW(groups)


# weight_decay_mask


def _matrices(name: str, param: Tensor) -> bool:
    return name.endswith("weight") and param.dim() > 1


def _flags(mask: WeightDecayMask | None, *, named: bool = True) -> list[bool]:
    net = make_net()
    given = zip(*net.named_parameters(prefix="module"), strict=True) if named else iter([(), net.parameters()])
    names, params = (list(each) for each in given)
    groups = [{"params": params, **({"param_names": names} if names else {})}]
    return [spec.decays for spec in apply_mask(list(param_specs(groups)), params, mask)]


@pytest.mark.parametrize("mask", [_matrices, [True, False, True, False], (True, False, True, False)])
def test_mask_says_which_parameters_decay(mask: WeightDecayMask) -> None:
    assert _flags(mask) == [True, False, True, False]
    assert _flags(None) == [True] * 4


def test_mask_sees_bare_names_and_parameters() -> None:
    seen: list[tuple[str, torch.Size]] = []

    def note(name: str, param: Tensor) -> bool:
        seen.append((name, param.shape))
        return False

    assert _flags(note) == [False] * 4
    assert seen == [(name, param.shape) for name, param in make_net().named_parameters()]
    seen.clear()
    _flags(note, named=False)
    assert [name for name, _ in seen] == ["", "", "", ""]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True, False, True], "expected one flag for each of the 4 parameters, got 3"),
        ([True] * 5, "expected one flag for each of the 4 parameters, got 5"),
        ([True, False, True, 0.5], r"expected True or False for parameter 3 \('2.bias'\), got 0.5"),
        (lambda name, param: name, r"expected True or False for parameter 0 \('0.weight'\), got '0.weight'"),
    ],
)
@every_name
def test_mask_that_does_not_fit_is_refused(name: str, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"weight_decay_mask: {message}"):
        vars(stepwell)[name](make_net().named_parameters(), weight_decay_mask=mask)


def test_mask_is_of_all_groups_in_index_order(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[list[bool]] = []
    register = stepwell.InProcessService.register

    def note(self: stepwell.InProcessService, spec: Any) -> Any:
        registered.append([param.decays for param in spec.params])
        return register(self, spec)

    monkeypatch.setattr(stepwell.InProcessService, "register", note)
    net = make_net()
    groups: list[dict[str, Any]] = [{"params": net[2].parameters()}, {"params": net[0].parameters()}]
    stepwell.AdamW(groups, weight_decay_mask=[True, False, False, True])
    assert registered == [[True, False, False, True]]


@pytest.mark.parametrize("mask", [_matrices, [True, False, True, False]])
def test_mask_of_an_optimizer_that_gets_another_group(mask: WeightDecayMask, monkeypatch: pytest.MonkeyPatch) -> None:
    extended: list[list[bool]] = []
    extend = Worker.extend

    def note(self: Worker, spec: Any, *args: Any) -> None:
        extended.append([param.decays for param in spec.params])
        extend(self, spec, *args)

    monkeypatch.setattr(Worker, "extend", note)
    optimizer = stepwell.AdamW(make_net().named_parameters(), weight_decay_mask=mask)
    optimizer.add_param_group({"params": [("more.weight", _param(3, 2)), ("more.bias", _param(3))]})
    assert extended == [[True, False, True, False, True, not callable(mask)]]


def test_group_with_a_parameter_given_twice_is_refused_later_too() -> None:
    params = copies_of(make_net().parameters())
    optimizer = stepwell.AdamW(params, lr=0.01)
    drive(params, optimizer, range(2))
    with pytest.raises(ValueError, match=r"parameter 'number 1' \[40\] of group 1 appears in group 0 already"):
        optimizer.add_param_group({"params": [_param(3), params[1]]})
    assert len(optimizer.param_groups) == 1
    drive(params, optimizer, range(2, 3))
    assert optimizer.service.status()["step"] == 3


def test_spec_of_a_parameter_decays_unless_told_otherwise() -> None:
    (spec,) = param_specs([{"params": [_param(2)]}])
    assert spec.decays
    assert not dataclasses.replace(spec, decays=False).decays


def _named(net: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from net.named_parameters()


def test_named_parameters_may_be_any_iterator() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(_named(net))
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]
