"""Another set of shards takes a running service over: workers train on, to the same bits."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import stepwell
from stepwell.server import cluster
from stepwell.sharding.errors import PlacementError, TimelineError
from tests.integration.conftest import launcher
from tests.integration.nodes import Nodes, node_of
from tests.integration.processes import pid_of
from tests.integration.training import D0, Trainer, assert_same_training
from tests.integration.victims import Victims
from tests.zoo import straddling

LIMIT_S = 120.0
NUM_NODES = 2


def trainer_of(service: Any) -> Trainer:
    return Trainer(straddling(), stepwell.Prodigy, d0=D0, service=service)


@contextlib.contextmanager
def training(trainer: Trainer, take_step: Callable[[Trainer], object]) -> Iterator[Callable[[], None]]:
    """Within this block a worker takes steps, some of them before it and some after what the block does.

    Yields:
        Waits for more steps.
    """
    is_over = threading.Event()

    def train() -> None:
        while not is_over.is_set():
            take_step(trainer)

    def await_steps() -> None:
        seen, deadline = {trainer.step}, time.monotonic() + LIMIT_S
        while len(seen) < 3 and not future.done():
            assert time.monotonic() < deadline, "no step was taken"
            seen.add(trainer.step)
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(train)
        try:
            await_steps()
            yield await_steps
            await_steps()
        finally:
            is_over.set()
        future.result(timeout=LIMIT_S)


def one_step(trainer: Trainer) -> None:
    trainer.run(trainer.step + 1)


def one_step_or_back(trainer: Trainer) -> None:
    """As a training script does that follows its service back to a checkpoint."""
    try:
        trainer.run(trainer.step + 1)
    except TimelineError:
        trainer.optimizer.refresh()
        trainer.step = trainer.optimizer.service.status()["step"]


@pytest.mark.timeout(600)
def test_shards_of_other_numbers_and_nodes_take_over_while_training(nodes: Nodes) -> None:
    with launcher() as launch:
        service = launch(4, redundancy=1, num_cpus_per_shard=0.125)
        trainer = trainer_of(service)
        with training(trainer, one_step) as await_steps:
            for num_shards in (7, 2):
                service.resize(num_shards)
                await_steps()
                assert service.status()["num_shards"] == len(service.shards) == num_shards
            with pytest.raises(
                PlacementError, match=r"20 shards with 0\.125 CPU each need 2\.5 CPUs; the cluster has 2"
            ):
                service.resize(20)
            first = node_of(service.shards[0])
            drain_by_command(service.name, first)
            service.find_shards()
            assert first not in map(node_of, service.shards)
        Victims(service).kill(1)
        trainer.run(trainer.step + 10)
        assert_same_training(trainer, trainer_of("inprocess").run(trainer.step))
        trainer.optimizer.close()


def drain_by_command(name: str, node: str) -> None:
    command = [
        sys.executable,
        "-m",
        "stepwell.client.command_line",
        "drain",
        name,
        node,
        "--address",
        cluster.address(),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 0, run.stderr
    assert "has left node" in run.stdout


@pytest.mark.timeout(600)
def test_running_job_goes_back_and_on(nodes: Nodes, tmp_path: Path) -> None:
    """To checkpoints from before, while a worker trains; and a shard's process is told to end."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    with launcher() as launch:
        service = launch(2, redundancy=1)
        trainer = trainer_of(service).run(3)
        service.save(first)
        trainer.run(5)
        service.save(second)
        with training(trainer, one_step_or_back) as await_steps:
            for uri in (second, first, second):
                service.restore(uri)
                await_steps()
            os.kill(pid_of(service.shards[1]), signal.SIGTERM)
        assert_same_training(trainer, trainer_of("inprocess").run(trainer.step))
        trainer.optimizer.close()
