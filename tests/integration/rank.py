"""One of two workers that train by a service's name, wherever it is: as an actor, or in its caller's process."""

from __future__ import annotations

from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import stepwell
from tests.integration.training import D0, Oracle, Trainer, small_in_order

WORLD_SIZE = 2


class Rank:
    """Begins where the service stands. All ranks are made at once, as each waits for the others.

    Args:
        service: The service's name.
        rank: Which one.
    """

    def __init__(self, service: str, rank: int) -> None:
        torch.set_num_threads(1)
        first: int = stepwell.connect(service).status()["step"]
        self._trainer = Trainer(
            small_in_order(),
            stepwell.Prodigy,
            shift=float(rank),
            service=service,
            rank=rank,
            world_size=WORLD_SIZE,
            d0=D0,
        )
        self._trainer.step = first

    def run(self, stop: int) -> None:
        """Take steps until there were ``stop``."""
        self._trainer.run(stop)

    def is_near(self) -> list[bool]:
        """Which shards map this process's memory."""
        transport: Any = self._trainer.optimizer._registered.transport
        return list(transport._memory.is_near)

    def require_same(self) -> None:
        """See that parameters and state are, to the bit, those of one process that took all steps alone."""
        Oracle(WORLD_SIZE).to(self._trainer.step).require_same(self._trainer)

    def close(self) -> None:
        """Say goodbye."""
        self._trainer.optimizer.close()


def rank_on(node: str, service: str, rank: int) -> Any:
    """A worker as an actor on a node."""
    actor_class: Any = ray.remote(Rank)
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return actor_class.options(num_cpus=0, scheduling_strategy=strategy).remote(service, rank)
