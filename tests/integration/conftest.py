"""A Ray for each module of this folder, on loopback, and services in it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch

import stepwell
from stepwell.server import cluster
from tests.integration.nodes import Nodes

Launch = Callable[..., stepwell.Service]


@pytest.fixture(autouse=True, scope="module")
def _no_service_of_the_person_who_runs_this() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STEPWELL_SERVICE", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Beside shards that use the cores, two threads of this process wait for each other longer than they compute."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def nodes(request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """A Ray with as many nodes as the module's ``NUM_NODES`` beside the first one."""
    there = Nodes(request.module.NUM_NODES)
    yield there
    there.close()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[str]:
    """The address of a Ray that this process started; not kept for longer, as a process ends with its Ray."""
    cluster.start_embedded(num_cpus=1)
    yield cluster.address()
    ray.shutdown()


@pytest.fixture(scope="module")
def module_launch(local_ray: str) -> Iterator[Launch]:
    """Launches services that live as long as the module."""
    with launcher() as launch:
        yield launch


@pytest.fixture
def launch(local_ray: str) -> Iterator[Launch]:
    """Launches services that live as long as the test."""
    with launcher() as launch:
        yield launch


_numbers = itertools.count()


@contextlib.contextmanager
def launcher() -> Iterator[Launch]:
    services: list[stepwell.Service] = []

    def launch(num_shards: int, **options: Any) -> stepwell.Service:
        name = f"test-{next(_numbers)}"
        service = stepwell.launch(name, num_shards=num_shards, **{"num_cpus_per_shard": 0, "redundancy": 0, **options})
        services.append(service)
        return service

    try:
        yield launch
    finally:
        for service in services:
            service.shutdown()
