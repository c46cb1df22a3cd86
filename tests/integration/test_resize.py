"""Another set of shards takes a running service over: workers train on, to the same bits."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import stepwell
from tests.integration.conftest import Launch
from tests.integration.training import D0, Trainer, assert_same_training
from tests.integration.victims import Victims
from tests.zoo import straddling

LIMIT_S = 120.0


def trainer_of(service: Any) -> Trainer:
    return Trainer(straddling(), stepwell.Prodigy, d0=D0, service=service)


@contextlib.contextmanager
def training(trainer: Trainer) -> Iterator[None]:
    """Within this block a worker takes steps, some before it and some after what the block does."""
    is_over = threading.Event()

    def train() -> None:
        while not is_over.is_set():
            trainer.run(trainer.step + 1)

    def run_at_least(num_steps: int) -> None:
        stop = trainer.step + num_steps
        while trainer.step < stop and not future.done():
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(train)
        try:
            run_at_least(2)
            yield
            run_at_least(2)
        finally:
            is_over.set()
        future.result(timeout=LIMIT_S)


def test_four_shards_become_seven_become_two_while_training(launch: Launch) -> None:
    """And a shard of the last set that is killed comes back."""
    service = launch(4, redundancy=1)
    trainer = trainer_of(service).run(5)
    for num_shards in (7, 2):
        with training(trainer):
            service.resize(num_shards)
        assert service.status()["num_shards"] == len(service.shards) == num_shards
    Victims(service).kill(1)
    trainer.run(trainer.step + 10)
    assert_same_training(trainer, trainer_of("inprocess").run(trainer.step))
    trainer.optimizer.close()
