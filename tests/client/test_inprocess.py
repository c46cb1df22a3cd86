"""The service in the training process: checkpoints, shards, and a Ctrl-C in the middle of a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import stepwell
from stepwell.client import gathering
from stepwell.sharding import kernels
from stepwell.sharding.errors import JobMismatchError, NotRegisteredError, TimelineError
from tests.client.training import assert_equal, assert_same_state, make_net, train, values_of

MAKERS = [stepwell.Prodigy, stepwell.AdamW, stepwell.LAMB]


@pytest.mark.parametrize("num_shards", [2, 3, 64])
@pytest.mark.parametrize("make", MAKERS)
def test_result_does_not_depend_on_the_number_of_shards(
    make: Callable[..., stepwell.ServiceOptimizer], num_shards: int
) -> None:
    net, other = make_net(), make_net()
    optimizer = make(net.parameters())
    sharded = make(other.parameters(), service=stepwell.InProcessService(num_shards=num_shards))
    train(net, optimizer, range(10))
    train(other, sharded, range(10))
    assert_equal(net.parameters(), other.parameters())
    assert_same_state(optimizer.state_dict(), sharded.state_dict())
    assert len(sharded.service.status()["size_bytes"]) == num_shards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS)
def test_checkpoint_resumes_to_the_bit_on_other_shards(
    make: Callable[..., stepwell.ServiceOptimizer], dtype: torch.dtype, tmp_path: Path
) -> None:
    net, resumed = make_net(dtype), make_net(dtype)
    optimizer = make(net.parameters())
    train(net, optimizer, range(4))
    assert optimizer.service.save(str(tmp_path)) == 4
    successor = make(resumed.parameters(), service=stepwell.InProcessService(num_shards=3))
    train(resumed, successor, range(50, 52))
    assert successor.service.restore(str(tmp_path)) == 4
    successor.refresh()
    assert_equal(resumed.parameters(), net.parameters())
    assert_same_state(successor.state_dict(), optimizer.state_dict())
    train(net, optimizer, range(4, 8))
    train(resumed, successor, range(4, 8))
    assert_equal(resumed.parameters(), net.parameters())
    assert_same_state(successor.state_dict(), optimizer.state_dict())


def test_step_after_a_restore_asks_for_a_refresh(tmp_path: Path) -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters())
    train(net, optimizer, range(2))
    optimizer.service.save(str(tmp_path))
    train(net, optimizer, range(2, 4))
    optimizer.service.restore(str(tmp_path))
    before = values_of(net.parameters())
    for _ in range(2):
        with pytest.raises(TimelineError, match=r"Call refresh\(\) on every rank"):
            train(net, optimizer, [4])
    assert_equal(net.parameters(), before)
    optimizer.refresh()
    train(net, optimizer, [2])
    assert optimizer.service.status()["step"] == 3


def test_restore_of_another_model_changes_nothing(tmp_path: Path) -> None:
    net, other = make_net(), torch.nn.Linear(12, 3)
    optimizer = stepwell.AdamW(net.parameters())
    train(net, optimizer, range(2))
    stranger = stepwell.AdamW(other.parameters())
    stranger.service.save(str(tmp_path))
    before = optimizer.state_dict()
    with pytest.raises(JobMismatchError, match=r"parameter 0: .* \[40, 12\] .* \[3, 12\]"):
        optimizer.service.restore(str(tmp_path))
    assert_same_state(optimizer.state_dict(), before)
    train(net, optimizer, [2])


def test_service_serves_one_optimizer() -> None:
    service = stepwell.InProcessService()
    with pytest.raises(NotRegisteredError, match="has no job yet; give it to an optimizer"):
        service.status()
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), service=service)
    assert optimizer.service is service
    with pytest.raises(JobMismatchError, match="has an optimizer already; make one service for each"):
        stepwell.AdamW(make_net().parameters(), service=service)
    train(net, optimizer, range(2))
    assert service.status()["step"] == 2


def test_service_is_free_again_once_its_optimizer_is_closed() -> None:
    service = stepwell.InProcessService()
    stepwell.AdamW(make_net().parameters(), service=service).close()
    net = make_net()
    train(net, stepwell.AdamW(net.parameters(), service=service), range(2))
    assert service.status()["step"] == 2


def test_service_needs_a_shard() -> None:
    with pytest.raises(ValueError, match="num_shards: expected at least 1, got 0"):
        stepwell.InProcessService(num_shards=0)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_interrupt_within_a_step_loses_nothing(num_shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, other = make_net(), make_net()
    optimizer = stepwell.Prodigy(net.parameters(), service=stepwell.InProcessService(num_shards=num_shards))
    undisturbed = stepwell.Prodigy(other.parameters())
    train(net, optimizer, range(3))
    apply, handler = kernels.Kernels.apply, signal.getsignal(signal.SIGINT)

    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        apply(*args)

    with monkeypatch.context() as patch:
        patch.setattr(kernels.Kernels, "apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(net, optimizer, [3])
    assert signal.getsignal(signal.SIGINT) is handler
    train(other, undisturbed, range(4))
    assert_same_state(optimizer.state_dict(), undisturbed.state_dict())
    assert_equal(net.parameters(), other.parameters())
    train(net, optimizer, range(4, 7))
    train(other, undisturbed, range(4, 7))
    assert_equal(net.parameters(), other.parameters())


def test_restore_of_what_other_kernels_computed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    eager, compiled = (
        stepwell.AdamW(make_net().parameters(), service=stepwell.InProcessService(kernel=kernel))
        for kernel in ("eager", "compiled")
    )
    assert "eager" in eager.service.status()["kernel"]
    assert "compiled by" in compiled.service.status()["kernel"]
    uri = str(tmp_path)
    eager.service.save(uri)
    eager.service.restore(uri)
    compiled.service.restore(uri)
    (said,) = (record.message for record in caplog.records if "was computed by" in record.message)
    assert said.startswith(f"{uri} was computed by [torch")
    assert "later steps may differ" in said


@pytest.mark.parametrize("overlap", [False, True])
def test_all_that_a_step_needs_is_compiled_when_the_job_is_registered(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the sizes of calls, and whether the caller records gradients or casts."""
    monkeypatch.setattr(gathering, "CPU_LARGE_NUMEL", 1)
    shapes = [(256 * numel,) for numel in (1, 2, 5, 3, 17)]
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = stepwell.Prodigy(params, kernel="compiled", overlap=overlap)
    compiled = counters["stats"]["unique_graphs"]
    for chosen in (params, params[1:], params[::2], params[:3]):
        optimizer.zero_grad()
        torch.stack([param.sum() for param in chosen]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            optimizer.step()
    assert counters["stats"]["unique_graphs"] == compiled
    with torch.autocast("cpu", dtype=torch.bfloat16):  # once more: it is part of what torch compiles for
        optimizer.step()
    assert optimizer.service.status()["step"] == 9
