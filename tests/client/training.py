"""What the client's tests train: a small network on made-up data, and bare parameters with made-up gradients."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import stepwell


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A network with weights over several tiles, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    net = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 5))
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return net.to(dtype)


def loss_of(net: nn.Module, step: int) -> Tensor:
    """The loss on the batch of ``step``, where the network is."""
    first = next(net.parameters())
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step)).to(first.device)
    y = torch.stack([x[:, i] * x[:, i + 1].sin() for i in range(5)], dim=1)
    loss: Tensor = (net(x.to(first.dtype)).float() - y).square().mean()
    return loss


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> float:
    """Take the steps of these batches; the last loss."""
    loss = torch.zeros(())
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return loss.item()


def set_grads(params: Iterable[Tensor], step: int) -> None:
    """Give every parameter the gradient of ``step``, whatever its value."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def drive(params: Sequence[Tensor], optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Take steps with made-up gradients."""
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def decaying(name: str, params: Iterable[Tensor]) -> stepwell.ServiceOptimizer:
    """A named optimizer whose weights decay, where its rule has that."""
    make, options = vars(stepwell)[name], {"lr": 0.01, "weight_decay": 0.1}
    known = inspect.signature(make).parameters
    optimizer: stepwell.ServiceOptimizer = make(params, **{key: options[key] for key in options if key in known})
    return optimizer


def copies_of(params: Iterable[Tensor], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    """Parameters of the same values and strides, of another dtype if one is given."""
    return [nn.Parameter(param.detach().to(dtype or param.dtype, copy=True)) for param in params]


def values_of(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the values."""
    return [param.detach().clone() for param in params]


def assert_equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Equal to the bit, one by one."""
    for index, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(left, right), f"tensor {index} differs by up to {(left - right).abs().max()}"


def assert_close(
    actual: Iterable[Tensor], expected: Iterable[Tensor], *, rtol: float = 2e-5, atol: float = 2e-6
) -> None:
    """Equal but for rounding, one by one."""
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left.detach(), right.detach(), rtol=rtol, atol=atol)


def assert_same_state(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Two state dicts, equal to the bit."""
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert actual["state"][index].keys() == state.keys()
        assert_equal(
            [torch.as_tensor(value) for value in actual["state"][index].values()],
            [torch.as_tensor(value) for value in state.values()],
        )
