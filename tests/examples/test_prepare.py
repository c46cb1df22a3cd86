"""What Accelerate does to a service's state when it is given the optimizer."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import stepwell


@pytest.mark.parametrize(("places_optimizer", "num_loads"), [(True, 1), (False, 0)])
def test_prepare_loads_the_state_unless_told_not_to_place_it(places_optimizer: bool, num_loads: int) -> None:
    model = nn.Linear(4, 1)
    opt = stepwell.Prodigy(model.parameters())
    model(torch.ones(2, 4)).square().mean().backward()
    opt.step()
    before, began = opt.state_dict(), opt.service.status()["timeline"]
    Accelerator(cpu=True).prepare(model, opt, device_placement=[True, places_optimizer])
    assert opt.service.status()["timeline"] == began + num_loads
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(
            torch.equal(torch.as_tensor(after["state"][index][name]), torch.as_tensor(state[name])) for name in state
        )
