"""What an optimizer tells of a run and what its service then has of it."""

from __future__ import annotations

import math

import pytest
import torch

import stepwell
from tests.client.training import drive, loss_of, make_net, set_grads


def test_reported_loss_goes_with_the_next_step_alone() -> None:
    net = make_net()
    optimizer = stepwell.Prodigy(net.parameters())
    assert optimizer.service.history() == {}
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.report(loss=loss)
        optimizer.step()
        losses.append(loss.item())
    drive(list(net.parameters()), optimizer, [3])
    columns = optimizer.service.history()
    assert columns["step"] == [1, 2, 3, 4]
    assert columns["loss"][:3] == losses
    assert math.isnan(columns["loss"][3])
    assert columns["d"][-1] == optimizer.param_groups[0]["d"]
    assert optimizer.service.history(2)["step"] == [3, 4]


def test_reported_loss_waits_for_a_step_that_is_taken() -> None:
    params = list(make_net().parameters())
    optimizer = stepwell.AdamW(params, on_nonfinite="raise")
    optimizer.report(loss=math.nan)
    optimizer.report(loss=7)
    optimizer.param_groups[0]["lr"] = -1.0
    set_grads(params, 0)
    with pytest.raises(ValueError, match="learning rate"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    columns = optimizer.service.history()
    assert (columns["loss"], columns["lr"]) == ([7.0], [0.5])


def test_report_refuses_what_is_not_one_number() -> None:
    optimizer = stepwell.AdamW(make_net().parameters())
    with pytest.raises(ValueError, match=r"loss: expected one number, got a tensor of shape \[2\]"):
        optimizer.report(loss=torch.zeros(2))
    optimizer.report(loss=torch.zeros(1, 1))


def test_history_of_a_restored_run_ends_at_the_checkpoint(tmp_path: object) -> None:
    params = list(make_net().parameters())
    optimizer = stepwell.Prodigy(params)
    drive(params, optimizer, range(3))
    optimizer.service.save(str(tmp_path))
    drive(params, optimizer, range(3, 6))
    optimizer.service.restore(str(tmp_path))
    optimizer.refresh()
    drive(params, optimizer, range(3, 5))
    columns = optimizer.service.history()
    assert columns["step"] == [1, 2, 3, 4, 5]
    assert columns["timeline"][:3] != columns["timeline"][3:]
