"""Declared faults in processes that Ray runs; see :mod:`tests.faults`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

import stepwell
from stepwell.sharding.errors import CheckpointRestoreNeededError
from tests.faults import Fault, arm_here
from tests.integration.training import LIMIT_S, Trainer, assert_same_training
from tests.integration.victims import Victims, await_copies

NUM_STEPS = 9
"""Taken in each case: two copies are made in them."""


class Declared:
    """A service, its worker in this process, and the same training with nothing to disturb it.

    Args:
        service: The service, with redundancy.
        trainer: Trains with it.
        alone: The same, in process.
        folder: For checkpoints.
    """

    def __init__(self, service: stepwell.Service, trainer: Trainer, alone: Trainer, folder: Path) -> None:
        self._service, self._trainer, self._alone, self._folder = service, trainer, alone, folder
        self._trainer.run(1)
        self._victims = Victims(service)

    def suffer(self, faults: Sequence[Fault]) -> str:
        """Train on while these happen, and see that the end is as the table in docs/design.md says.

        Returns:
            What it came to.
        """
        service, trainer = self._service, self._trainer
        self._victims.await_successors()
        await_copies(service)
        uri, step, ended = str(self._folder / str(trainer.step)), trainer.step, "the same bits"
        has_keeper = any(fault.who == "keeper" for fault in faults)
        if has_keeper:
            service.save(uri)
        for who, group in itertools.groupby(faults, key=lambda fault: fault.who):
            actor: Any = self._victims.actor(who)
            ray.get(actor.__ray_call__.remote(arm_here, list(group), float("inf")), timeout=LIMIT_S)
        try:
            trainer.run(step + NUM_STEPS)
        except CheckpointRestoreNeededError:
            assert has_keeper, "nothing is lost while the keeper lives"
            ended = "the checkpoint"
            service.restore(uri)
            trainer.optimizer.refresh()
            trainer.step = step
            trainer.run(step + NUM_STEPS)
        assert_same_training(trainer, self._alone.run(trainer.step))
        if has_keeper:
            # What has not befallen it, as no shard came to ask, is to befall it in no other case.
            self._victims.await_successors()
            self._victims.kill("keeper")
        return ended
