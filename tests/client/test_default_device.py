"""``torch.set_default_device``: a script's choice for its model, which is none of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stepwell
from tests.client.training import assert_equal

SHAPES = [(6, 3, 3, 3), (40, 13), (), (257,), (0, 4)]

MAKERS: list[Callable[..., stepwell.ServiceOptimizer]] = [
    stepwell.Prodigy,
    lambda params, **options: stepwell.Prodigy(params, slice_p=11, d_scope="group", **options),
    lambda params, **options: stepwell.AdamW(params, amsgrad=True, max_grad_norm=1.0, **options),
    stepwell.LAMB,
    stepwell.NAdam,
    stepwell.StableAdam,
]


@pytest.fixture
def other_default() -> Iterator[None]:
    """Tensors that are made without a device have no values: whoever makes one here notices."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def values(seed: int) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator, device="cpu") for shape in SHAPES]


def trained(make: Callable[..., stepwell.ServiceOptimizer], folder: Path) -> list[nn.Parameter]:
    """Steps, a checkpoint, a state dict, an added group, other shards."""
    params = [nn.Parameter(value) for value in values(0)]
    drive(optimizer := make(params, num_shards=2), 0)
    optimizer.service.save(str(folder))
    successor = make(params, num_shards=3)
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    drive(successor, 1)
    successor.service.restore(str(folder))
    successor.refresh()
    params += [nn.Parameter(value) for value in values(1)]
    successor.add_param_group({"params": params[len(SHAPES) :]})
    drive(successor, 2)
    drive(successor, 3)
    return params


def drive(optimizer: torch.optim.Optimizer, step: int) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, value in zip(params, values(10 + step) + values(20 + step), strict=False):
        param.grad = value
    optimizer.step()


@pytest.mark.parametrize("make", MAKERS)
def test_default_device_does_not_matter(
    make: Callable[..., stepwell.ServiceOptimizer], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = trained(make, tmp_path / "expected")
    request.getfixturevalue("other_default")
    assert_equal(trained(make, tmp_path / "actual"), expected)
