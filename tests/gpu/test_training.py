"""A model on a GPU, trained in its process: beside other people's optimizers, saved, restored, scaled, clipped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.client import gathering
from tests.client.training import assert_close, assert_equal, assert_same_state, loss_of, train, values_of

DEVICE = torch.device("cuda")
MAKERS: list[Callable[..., stepwell.ServiceOptimizer]] = [stepwell.Prodigy, stepwell.AdamW, stepwell.LAMB]


def make_net(dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> nn.Sequential:
    """Weights of whole tiles, so that gradients can be read in place."""
    generator = torch.Generator().manual_seed(7)
    net = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 5))
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return net.to(device, dtype)


@pytest.fixture(params=[1, 2**30], ids=["in place", "copied"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are read where they are, or copied first."""
    monkeypatch.setattr(gathering, "OTHER_LARGE_NUMEL", request.param)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS)
def test_result_does_not_depend_on_the_number_of_shards(
    make: Callable[..., stepwell.ServiceOptimizer], dtype: torch.dtype, overlap: bool
) -> None:
    net, other = make_net(dtype), make_net(dtype)
    optimizer, sharded = make(net.parameters()), make(other.parameters(), num_shards=3, overlap=overlap)
    train(net, optimizer, range(8))
    train(other, sharded, range(8))
    assert_equal(net.parameters(), other.parameters())
    assert_same_state(optimizer.state_dict(), sharded.state_dict())
    assert "cuda" in optimizer.service.status()["kernel"]


def test_reading_in_place_does_not_touch_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for numel in (1, 2**30):
        monkeypatch.setattr(gathering, "OTHER_LARGE_NUMEL", numel)
        net = make_net()
        train(net, stepwell.Prodigy(net.parameters()), range(8))
        found.append(values_of(net.parameters()))
    assert_equal(*found)


def test_adamw_is_torchs() -> None:
    net, other = make_net(torch.float64), make_net(torch.float64)
    train(net, stepwell.AdamW(net.parameters(), lr=1e-2), range(30))
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True), range(30))
    assert_close(net.parameters(), other.parameters(), rtol=1e-9, atol=1e-11)


def test_prodigy_is_prodigyopts() -> None:
    net, other = make_net(torch.float64), make_net(torch.float64)
    ours, theirs = stepwell.Prodigy(net.parameters(), d0=1e-4), prodigyopt.Prodigy(other.parameters(), d0=1e-4)
    train(net, ours, range(30))
    train(other, theirs, range(30))
    assert ours.param_groups[0]["d"] == pytest.approx(float(theirs.param_groups[0]["d"]), rel=1e-9)
    assert_close(net.parameters(), other.parameters(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", MAKERS)
def test_checkpoint_goes_on_to_the_bit_on_other_shards(
    make: Callable[..., stepwell.ServiceOptimizer], tmp_path: Path
) -> None:
    net, resumed = make_net(), make_net()
    optimizer = make(net.parameters(), num_shards=2)
    train(net, optimizer, range(4))
    pending = optimizer.service.save(str(tmp_path), wait=False)
    train(net, optimizer, range(4, 8))
    assert pending.result() == 4
    successor = make(resumed.parameters(), num_shards=3)
    train(resumed, successor, range(50, 52))
    assert successor.service.restore(str(tmp_path)) == 4
    successor.refresh()
    train(resumed, successor, range(4, 8))
    assert_equal(resumed.parameters(), net.parameters())
    assert_same_state(successor.state_dict(), optimizer.state_dict())


def test_checkpoint_of_a_gpu_is_restored_on_a_cpu_and_back(tmp_path: Path) -> None:
    net, on_cpu, back = make_net(), make_net(device=torch.device("cpu")), make_net()
    optimizer = stepwell.Prodigy(net.parameters())
    train(net, optimizer, range(4))
    optimizer.service.save(str(tmp_path / "a"))
    there = stepwell.Prodigy(on_cpu.parameters(), num_shards=2)
    there.service.restore(str(tmp_path / "a"))
    there.refresh()
    assert_equal([param.cpu() for param in net.parameters()], on_cpu.parameters())
    there.service.save(str(tmp_path / "b"))
    again = stepwell.Prodigy(back.parameters())
    again.service.restore(str(tmp_path / "b"))
    again.refresh()
    train(net, optimizer, range(4, 7))
    train(back, again, range(4, 7))
    assert_equal(net.parameters(), back.parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_state_dict_resumes_to_the_bit(make: Callable[..., stepwell.ServiceOptimizer]) -> None:
    net = make_net()
    optimizer = make(net.parameters())
    train(net, optimizer, range(4))
    other = copy.deepcopy(net)
    successor = make(other.parameters(), num_shards=2)
    successor.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(4, 8))
    train(other, successor, range(4, 8))
    assert_equal(net.parameters(), other.parameters())


def test_parameters_lie_in_the_buffer_and_behave() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters())
    train(net, optimizer, range(2))
    twin = copy.deepcopy(net)
    before = values_of(twin.parameters())
    train(net, optimizer, range(2, 4))
    assert_equal(twin.parameters(), before)
    sizes = [param.untyped_storage().nbytes() for param in net.parameters()]
    assert sizes == [param.numel() * param.element_size() for param in net.parameters()]
    net.to("cpu")
    net.to(DEVICE)
    train(net, optimizer, range(4, 6))


@pytest.mark.parametrize("scaler_type", [torch.amp.GradScaler, stepwell.GradScaler])
def test_gradient_scaler_skips_what_overflows(scaler_type: Callable[..., torch.amp.GradScaler]) -> None:
    net = make_net()
    optimizer, scaler = stepwell.AdamW(net.parameters()), scaler_type("cuda", init_scale=2.0**10)
    for step in range(6):
        optimizer.zero_grad()
        loss = scaler.scale(loss_of(net, step))
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 3:
            grad = next(net.parameters()).grad
            assert grad is not None
            grad.view(-1)[5] = torch.inf
        before = values_of(net.parameters())
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(one, other) for one, other in zip(net.parameters(), before, strict=True))
        assert moved == (step != 3)
    assert scaler.get_scale() == 2.0**9


def test_clipping_is_torchs() -> None:
    net, other = make_net(torch.float64), make_net(torch.float64)
    ours = stepwell.AdamW(net.parameters(), max_grad_norm=0.1)
    theirs = torch.optim.AdamW(other.parameters())
    train(net, ours, range(5))
    for step in range(5):
        theirs.zero_grad()
        loss_of(other, step).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        theirs.step()
    assert_close(net.parameters(), other.parameters(), rtol=1e-6, atol=1e-8)


def test_default_device_of_the_program_does_not_matter() -> None:
    """``torch.set_default_device("cuda")`` is common in scripts, and meant for the model."""
    expected, net = make_net(), make_net()
    train(expected, stepwell.Prodigy(expected.parameters()), range(4))
    torch.set_default_device("cuda")
    try:
        optimizer = stepwell.Prodigy(net.parameters(), num_shards=2)
        for step in range(4):
            optimizer.zero_grad()
            torch.set_default_device("cpu")
            loss_of(net, step).backward()  # type: ignore[no-untyped-call]
            torch.set_default_device("cuda")
            optimizer.step()
        optimizer.state_dict()
    finally:
        torch.set_default_device("cpu")
    assert_equal(net.parameters(), expected.parameters())


def drive(params: Sequence[Tensor], optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"slice_p": 11, "weight_decay": 0.1}, {"stat_dtype": "bfloat16"}], ids=str)
def test_many_small_tensors(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(37, 16), (16, 38), (), (1,), (0, 4), (257,)] * 20
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    found = []
    for num_shards in (1, 3):
        params = [nn.Parameter(value.to(DEVICE, copy=True)) for value in values]
        drive(params, stepwell.Prodigy(params, num_shards=num_shards, **options), range(6))
        found.append(values_of(params))
    assert_equal(*found)
