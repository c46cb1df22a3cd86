"""A service with a GPU: its shards there or on CPUs, the workers there or not; killed, saved, restored."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor, nn

import stepwell
from stepwell.server import cluster
from tests.client.training import assert_equal
from tests.integration.processes import pid_of

GPU, CPU = torch.device("cuda"), torch.device("cpu")
SHAPES = [(64, 48), (7,), (513,), (), (300, 41), (128, 128)]
ON_GPU: dict[str, Any] = {"num_gpus_per_shard": 0.2, "num_cpus_per_shard": 0}
ON_CPU: dict[str, Any] = {"num_gpus_per_shard": 0, "num_cpus_per_shard": 0}


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    cluster.start_embedded(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture
def launch(request: pytest.FixtureRequest) -> Iterator[Any]:
    services: list[stepwell.Service] = []

    def start(num_shards: int, **options: Any) -> stepwell.Service:
        service = stepwell.launch(f"gpu-{id(request)}-{len(services)}", num_shards=num_shards, **options)
        services.append(service)
        return service

    yield start
    for service in services:
        service.shutdown()


def params_on(device: torch.device, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype, copy=True)) for shape in SHAPES]


def drive(params: Iterable[Tensor], optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with made-up gradients, by a backward, so that hooks run."""
    params = list(params)
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        grads = [torch.randn(param.shape, generator=generator).to(param) for param in params]
        optimizer.zero_grad()
        loss = sum(((param * grad).sum() for param, grad in zip(params, grads, strict=True)), torch.zeros(()))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def begun(
    launch: Any, num_steps: int, redundancy: int
) -> tuple[stepwell.Service, list[nn.Parameter], stepwell.ServiceOptimizer]:
    """Two shards and their worker on the GPU, after some steps."""
    service = launch(2, redundancy=redundancy, **ON_GPU)
    params = params_on(GPU)
    optimizer = stepwell.Prodigy(params, d0=1e-4, service=service)
    drive(params, optimizer, range(num_steps))
    return service, params, optimizer


def on_cpu(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the values."""
    return [param.detach().to("cpu", copy=True) for param in params]


def trained_in_process(where: torch.device, num_steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    params = params_on(where, dtype)
    drive(params, stepwell.Prodigy(params, d0=1e-4), range(num_steps))
    return on_cpu(params)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shards", "worker"), [(ON_GPU, GPU), (ON_GPU, CPU), (ON_CPU, GPU)], ids=["gpu-gpu", "gpu-cpu", "cpu-gpu"]
)
def test_bits_are_those_of_one_process_where_the_shards_are(
    launch: Any, shards: dict[str, Any], worker: torch.device, dtype: torch.dtype, overlap: bool
) -> None:
    service = launch(2, redundancy=0, **shards)
    params = params_on(worker, dtype)
    optimizer = stepwell.Prodigy(params, d0=1e-4, service=service, overlap=overlap)
    drive(params, optimizer, range(6))
    where = GPU if shards is ON_GPU else CPU
    assert f", {where.type} " in service.status()["kernel"]
    assert service.status()["step"] == 6
    assert_equal(on_cpu(params), trained_in_process(where, 6, dtype))
    optimizer.close()


def test_killed_shard_on_a_gpu_costs_no_step(launch: Any) -> None:
    service, params, optimizer = begun(launch, 4, redundancy=1)
    for victim in (0, 1):
        os.kill(pid_of(service.find_shards()[victim]), signal.SIGKILL)
        drive(params, optimizer, range(4 + 3 * victim, 7 + 3 * victim))
    assert_equal(on_cpu(params), trained_in_process(GPU, 10))
    optimizer.close()


def test_saved_on_gpus_and_restored_on_cpus(launch: Any, tmp_path: Path) -> None:
    service, params, optimizer = begun(launch, 3, redundancy=0)
    pending = service.save(str(tmp_path), wait=False)
    expected = on_cpu(params)
    drive(params, optimizer, range(3, 6))
    assert pending.result() == 3
    other = launch(3, redundancy=0, **ON_CPU)
    others = params_on(GPU)
    successor = stepwell.Prodigy(others, d0=1e-4, service=other)
    other.restore(str(tmp_path))
    successor.refresh()
    assert_equal(on_cpu(others), expected)
    drive(others, successor, range(3, 5))
    for each in (optimizer, successor):
        each.close()


def test_shards_on_a_gpu_are_cut_anew(launch: Any) -> None:
    service, params, optimizer = begun(launch, 3, redundancy=0)
    service.resize(1)
    drive(params, optimizer, range(3, 6))
    assert_equal(on_cpu(params), trained_in_process(GPU, 6))
    optimizer.close()
