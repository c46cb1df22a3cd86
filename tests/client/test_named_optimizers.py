"""The classes at the top level, one per rule: their keywords, and what becomes of these."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import torch
from torch import nn

import stepwell
from stepwell.client.keywords import ServiceOptions
from stepwell.optim import RULES, Rule
from tests.client.training import assert_equal, make_net, train

ROOT = Path(__file__).parents[2]
NAMES = RULES.names()
REFERENCES: dict[str, type[torch.optim.Optimizer]] = {
    **{name: vars(torch.optim)[name] for name in NAMES if name in vars(torch.optim)},
    "Prodigy": prodigyopt.Prodigy,
}
TORCH_KEYWORDS = {"foreach", "fused", "capturable", "differentiable"}
OTHER: dict[str, Any] = {
    "beta3": 0.5,
    "betas": (0.5, 0.25),
    "d_scope": "group",
    "eps_d": "old",
    "estimator": "inner_product",
    "growth_rate": 2.0,
    "max_d": 2.0,
    "nesterov": {"nesterov": True, "momentum": 0.5},
    "norm": "l2",
    "ratio": "init/current",
    "rho_threshold": 4.0,
    "stat_dtype": "bfloat16",
}
"""A value that is not the default, where its type alone does not give one; a dict for several keywords."""
OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("lr", -0.5, "-0.5"),
    ("lr", float("nan"), "nan"),
    ("lr", torch.tensor([0.1, 0.2]), r"tensor\(\[0.1000, 0.2000\]\)"),
    ("betas", (1.0, 0.5), "index 0: 1.0"),
    ("betas", (0.5, -0.25), "index 1: -0.25"),
    ("betas", (torch.tensor(1.5), torch.tensor(0.5)), "index 0: 1.5"),
    ("betas", (0.5,), r"\(0.5,\)"),
    ("beta", 1.0, "beta value: 1.0"),
    ("eps", -0.125, "-0.125"),
    ("weight_decay", -2.0, "-2.0"),
    ("momentum", -3.0, "-3.0"),
]

every_name = pytest.mark.parametrize("name", NAMES)


def _class(name: str) -> Any:
    return vars(stepwell)[name]


def _rule(name: str) -> type[Rule]:
    return type(RULES.build(name, {}))


def _params(name: str) -> dict[str, inspect.Parameter]:
    return {key: value for key, value in inspect.signature(_class(name)).parameters.items() if key != "options"}


def test_every_rule_has_its_class() -> None:
    public = [vars(stepwell)[name] for name in stepwell.__all__ if name in vars(stepwell)]
    classes = {each for each in public if isinstance(each, type) and issubclass(each, stepwell.ServiceOptimizer)}
    assert {each.__name__ for each in classes} == {*NAMES, "ServiceOptimizer"}
    assert {each.__module__.rpartition(".")[0] for each in classes} == {"stepwell.client.optimizers", "stepwell.client"}


def test_classes_are_as_the_rules_have_them() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "write_optimizers.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("name", REFERENCES)
def test_signature_is_that_of_the_reference(name: str) -> None:
    ours, theirs = _params(name), dict(inspect.signature(REFERENCES[name]).parameters)
    assert [(key, ours[key].default, ours[key].kind) for key in list(ours)[: len(theirs)]] == [
        (key, param.default, param.kind) for key, param in theirs.items()
    ]
    assert not set(ServiceOptions.__annotations__) & set(theirs)


@every_name
def test_signature_has_the_rules_fields_and_types(name: str) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(_rule(name))}
    keywords = {key: param.default for key, param in _params(name).items() if key not in {"params", *TORCH_KEYWORDS}}
    assert keywords == fields
    hints = typing.get_type_hints(_class(name).__init__, include_extras=True)
    assert hints.keys() == {"return", "options", *_params(name)}
    assert (hints["lr"], hints["options"]) == (float | torch.Tensor, typing.Unpack[ServiceOptions])


@every_name
def test_help_tells_every_keyword(name: str) -> None:
    text = inspect.getdoc(_class(name)) or ""
    for key in _params(name):
        assert f"\n    {key}: " in text
    assert f":class:`stepwell.optim.{name}Rule`" in text


@pytest.mark.parametrize(
    ("name", "field"), [(name, field.name) for name in NAMES for field in dataclasses.fields(_rule(name))]
)
def test_keyword_reaches_rule_and_groups(name: str, field: str) -> None:
    default = vars(RULES.build(name, {}))[field]
    if field in OTHER:
        other = OTHER[field]
    elif isinstance(default, bool):
        other = not default
    else:
        other = default + 5 if isinstance(default, int) else default / 2 + 0.125
    given = other if isinstance(other, dict) else {field: other}
    options = {key: value for key, value in given.items() if key in _params(name)}
    optimizer = _class(name)(make_net().parameters(), **options)
    assert {key: vars(optimizer.rule)[key] for key in options} == options
    assert {key: optimizer.param_groups[0][key] for key in options} == options
    assert vars(optimizer.rule)[field] != default


@every_name
def test_class_is_made_from_its_path_and_keywords(name: str) -> None:
    module, _, attribute = f"stepwell.{name}".rpartition(".")
    net, other = make_net(), make_net()
    optimizer = vars(importlib.import_module(module))[attribute](params=net.parameters(), lr=0.01, num_shards=2)
    train(net, optimizer, range(2))
    train(other, stepwell.ServiceOptimizer(other.parameters(), RULES.build(name, {"lr": 0.01})), range(2))
    assert_equal(net.parameters(), other.parameters())
    assert (optimizer.service.status()["rule"], optimizer.service.status()["num_shards"]) == (name, 2)


@every_name
def test_tensors_of_one_element_are_numbers(name: str) -> None:
    net, other, lr = make_net(), make_net(), torch.tensor(0.015625)
    betas = {"betas": (torch.tensor([[[0.5]]]), torch.tensor([0.75]))} if "betas" in _params(name) else {}
    plain = {"betas": (0.5, 0.75)} if betas else {}
    optimizer = _class(name)(net.parameters(), lr=lr, **betas)
    train(net, optimizer, range(3))
    train(other, _class(name)(other.parameters(), lr=0.015625, **plain), range(3))
    assert_equal(net.parameters(), other.parameters())
    assert optimizer.param_groups[0]["lr"] is lr
    assert {key: optimizer.param_groups[0][key] for key in plain} == plain


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [(name, *case) for name in NAMES for case in OUT_OF_RANGE if case[0] in _params(name)],
)
def test_value_out_of_range_is_refused(name: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid .*{message}"):
        _class(name)(make_net().parameters(), **{key: value})
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(torch.zeros(2))], key: value}]
    with pytest.raises(ValueError, match=f"group 0: Invalid .*{message}"):
        _class(name)(groups)


@every_name
def test_unknown_keyword_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        _class(name)(make_net().parameters(), learning_rate=0.1)


# Torch's keywords that say how to compute

torch_names = pytest.mark.parametrize("name", [name for name in NAMES if name in vars(torch.optim)])


@torch_names
def test_torchs_keywords_are_shown_and_have_no_effect(name: str) -> None:
    net, other = make_net(), make_net()
    for key in {"foreach", "fused"} & _params(name).keys():
        optimizer = _class(name)(net.parameters(), lr=0.01, **{key: True})
        assert optimizer.param_groups[0][key] is True
        train(net, optimizer, range(2))
        train(other, _class(name)(other.parameters(), lr=0.01), range(2))
        assert_equal(net.parameters(), other.parameters())
    groups: list[dict[str, Any]] = [{"params": other.parameters(), "foreach": False}]
    assert _class(name)(groups, foreach=True).param_groups[0]["foreach"] is False


@torch_names
def test_torchs_keywords_that_a_service_cannot_serve_are_refused(name: str) -> None:
    for key in {"capturable", "differentiable"} & _params(name).keys():
        with pytest.raises(ValueError, match=f"{key}: expected False, got True; a step leaves this process"):
            _class(name)(make_net().parameters(), **{key: True})
    if "fused" in _params(name):
        with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
            _class(name)(make_net().parameters(), fused=True, foreach=True)
