"""The inputs that torch tests its own optimizers with, given to ours: the same parameters, the same errors."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import stepwell
from stepwell.optim import RULES
from tests.client.training import assert_close, drive

# The import would forbid the whole process to set torch.backends' flags, which trainers do.
with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerErrorEnum, optim_db

INFOS = {info.name: info for info in optim_db if info.name in RULES.names()}

INPUTS = [
    pytest.param(name, each.kwargs, id=f"{name}-{each.desc}")
    for name, info in INFOS.items()
    # Those for a GPU hold the capturable ones, and need none to be read.
    for each in info.optim_inputs_func(device="cuda", dtype=torch.float32)
]
ERRORS = [
    pytest.param(name, each, id=f"{name}-{each.optimizer_error_input.desc}")
    for name, info in INFOS.items()
    for each in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]

OURS_SAY = {
    "a param group cannot have duplicate parameters": r"parameter 'number 1' \[1, 1\] of group 0 appears in group 0",
    "duplicate parameters should not occur across param groups either": (
        r"parameter 'number 0' \[1, 1\] of group 1 appears in group 0 already"
    ),
    "Tensor lr must be 1-element": r"Invalid lr value: tensor\(\[0.0010, 0.0010\]\)",
    "weight_decay should > 0": "Invalid weight_decay value: -1.0",
}
"""Errors of torch's that we say in other words; the first is a warning in torch."""

FINE_HERE = {
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
}
"""Limits of torch's kernels that a service has not."""


def _params(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(10, 5), (300,), (), (2, 3, 4, 5), (0,)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Tensors in the parameters' dtype: torch computes in the lesser of the two."""
    if isinstance(value, tuple):
        return tuple(_as_dtype(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def test_database_holds_every_optimizer_that_torch_has_too() -> None:
    assert set(INFOS) == {name for name in RULES.names() if name in vars(torch.optim)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "kwargs"), INPUTS)
def test_input_gives_the_same_parameters(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    make, options = vars(stepwell)[name], dict(kwargs)
    params, oracle_params = _params(dtype), _params(dtype)
    if "capturable" in options:
        with pytest.raises(ValueError, match="capturable: expected False, got True"):
            make(params, **options)
        del options["capturable"]
    for key in {"lr", "betas"} & options.keys():
        options[key] = _as_dtype(options[key], dtype)
    drive(params, make(params, **options), range(12))
    drive(oracle_params, vars(torch.optim)[name](oracle_params, **options), range(12))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(params, oracle_params, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize(("name", "error_input"), ERRORS)
def test_error_input_raises_the_same_error(name: str, error_input: ErrorOptimizerInput) -> None:
    case = error_input.optimizer_error_input
    assert error_input.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = _params(torch.float32) if case.params is None else case.params
    make = vars(stepwell)[name]
    if case.desc in FINE_HERE:
        drive(params, make(params, **case.kwargs), range(2))
        return
    error = ValueError if error_input.error_type is UserWarning else error_input.error_type
    with pytest.raises(error, match=OURS_SAY.get(case.desc, error_input.error_regex)):
        make(params, **case.kwargs)
