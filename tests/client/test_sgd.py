"""torch.optim.SGD keeps no step count: its state dicts must be understood all the same."""

from __future__ import annotations

import torch
from torch import nn

import stepwell
from tests.client.training import assert_close, make_net


def set_grads(net: nn.Module, step: int) -> None:
    for index, param in enumerate(net.parameters()):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + index))


def test_sgd_goes_on_from_torchs_state_dict() -> None:
    theirs, ours = make_net(), make_net()
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    for step in range(3):
        set_grads(theirs, step)
        reference.step()
    rule = stepwell.optim.SGDRule(lr=0.1, momentum=0.9, dampening=0.5)
    optimizer = stepwell.ServiceOptimizer(ours.parameters(), rule)
    ours.load_state_dict(theirs.state_dict())
    optimizer.load_state_dict(reference.state_dict())
    for step in range(3, 6):
        for net, each in ((theirs, reference), (ours, optimizer)):
            set_grads(net, step)
            each.step()
    assert_close(list(ours.parameters()), list(theirs.parameters()))
    reference.load_state_dict(optimizer.state_dict())
