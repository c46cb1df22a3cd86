"""Which service and which rank an optimizer takes, and what it says when they do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import stepwell
from stepwell.client.resolve import resolve_ranks
from stepwell.sharding.errors import JobMismatchError, ServiceNotFoundError
from tests.client.training import make_net, train

ROOT = Path(__file__).parents[2]

TRAIN_WITHOUT_RAY = """
import sys
import torch
import stepwell

param = torch.nn.Parameter(torch.ones(3))
optimizer = stepwell.Prodigy([param])
param.grad = torch.ones(3)
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.service.save(sys.argv[1])
optimizer.close()
assert "ray" not in sys.modules
"""


@pytest.fixture
def single_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def test_training_in_process_imports_no_ray(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRAIN_WITHOUT_RAY, str(tmp_path / "checkpoint")]
    # Compiling says so where it takes long.
    environment = {**os.environ, "STEPWELL_KERNEL": "eager"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_ranks_are_the_given_ones_or_a_single_workers() -> None:
    assert resolve_ranks(None, None) == (0, 1)
    assert resolve_ranks(2, 4) == (2, 4)


@pytest.mark.usefixtures("single_process_group")
def test_ranks_are_those_of_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_ranks(None, None) == (0, 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    assert resolve_ranks(None, None) == (1, 3)
    assert resolve_ranks(0, 1) == (0, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 1}, ValueError, "rank and world_size: expected both or neither, got 1 and None"),
        ({"world_size": 2}, ValueError, "rank and world_size: expected both or neither, got None and 2"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank: expected 0 to 1, got 2"),
        ({"rank": -1, "world_size": 2}, ValueError, "rank: expected 0 to 1, got -1"),
        ({"num_shards": 0}, ValueError, "num_shards: expected at least 1, got 0"),
        (
            {"num_shards": 2, "service": "trainer"},
            ValueError,
            "num_shards: expected None, as service 'trainer' has its own, got 2",
        ),
        (
            {"num_shards": 2, "service": stepwell.InProcessService()},
            ValueError,
            "num_shards: expected None, as service .* has its own, got 2",
        ),
        (
            {"service": "inprocess", "rank": 0, "world_size": 2},
            JobMismatchError,
            "service 'inprocess' is for one worker, got world_size 2; leave service out",
        ),
        (
            {"service": stepwell.InProcessService(), "rank": 0, "world_size": 2},
            JobMismatchError,
            "service 'inprocess' is for a single worker, got world_size 2; leave service out, or start one with",
        ),
        (
            {"rank": 0, "world_size": 2},
            ServiceNotFoundError,
            "needs torch.distributed to announce itself: call init_process_group first, or start a service with",
        ),
    ],
)
def test_construction_refuses_a_service_that_does_not_fit(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stepwell.AdamW(make_net().parameters(), **options)


def test_environment_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWELL_SERVICE", "trainer")
    with pytest.raises(ValueError, match="service 'trainer' has its own"):
        stepwell.AdamW(make_net().parameters(), num_shards=2)
    assert stepwell.AdamW(make_net().parameters(), service="inprocess").service.name == "inprocess"
    monkeypatch.setenv("STEPWELL_SERVICE", "inprocess")
    with pytest.raises(JobMismatchError, match="service 'inprocess' is for one worker"):
        stepwell.AdamW(make_net().parameters(), rank=0, world_size=2)


def test_service_in_process_is_the_default_for_one_worker() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), num_shards=3)
    train(net, optimizer, range(2))
    status = optimizer.service.status()
    assert (status["name"], status["num_shards"], status["world_size"], status["step"]) == ("inprocess", 3, 1, 2)


def test_parameters_on_several_devices_are_refused_before_anything_is_registered() -> None:
    service = stepwell.InProcessService()
    params = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, device="meta"))]
    with pytest.raises(stepwell.StepwellError, match=r"expected all parameters on one device, got \['cpu', 'meta'\]"):
        stepwell.AdamW(params, service=service)
    assert stepwell.AdamW(make_net().parameters(), service=service).service is service
