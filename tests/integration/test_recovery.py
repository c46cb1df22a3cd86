"""Processes of a service that are killed come back, and training goes on to the same bits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import stepwell
from tests.chaos import run_chaos
from tests.declared import Declared
from tests.faults import matrix
from tests.integration.conftest import Launch
from tests.integration.training import D0, Oracle, Trainer, assert_same_training, make_workers, on_all
from tests.integration.victims import Victims, await_copies
from tests.zoo import straddling

NUM_STEPS = 24
NUM_KILLS = 4
NUM_DECLARED = 4
OPTIONS: dict[str, dict[str, Any]] = {"Prodigy": {"d0": D0}, "AdamW": {}, "LAMB": {}}


def trainer_of(service: Any, rule: str = "Prodigy") -> Trainer:
    return Trainer(straddling(), getattr(stepwell, rule), service=service, **OPTIONS[rule])


@pytest.mark.parametrize("rule", OPTIONS)
def test_killed_shards_cost_no_step(launch: Launch, rule: str) -> None:
    service = launch(3, redundancy=1)
    trainer, victims = trainer_of(service, rule).run(7), Victims(service)
    for names in ([1], [0, 2]):
        victims.kill(*names)
        trainer.run(trainer.step + 6)
        victims.await_successors()
    trainer.run(NUM_STEPS)
    assert_same_training(trainer, trainer_of("inprocess", rule).run(NUM_STEPS))
    trainer.optimizer.close()


@pytest.mark.parametrize("names", [["keeper"], ["coordinator", 0], ["coordinator", 0, 1], ["coordinator", "keeper"]])
def test_pairs_that_die_cost_no_step(launch: Launch, names: Sequence[int | str]) -> None:
    service = launch(2, redundancy=1)
    trainer, victims = trainer_of(service).run(7), Victims(service)
    victims.kill(*names)
    trainer.run(14)
    victims.await_successors()
    trainer.run(trainer.step + 2)
    await_copies(service)
    victims.kill(1)
    trainer.run(NUM_STEPS)
    assert_same_training(trainer, trainer_of("inprocess").run(NUM_STEPS))
    trainer.optimizer.close()


def test_chaos(local_ray: str) -> None:
    """Shards, coordinator and worker are killed at random; ``make chaos`` does it for longer."""
    took = run_chaos("Prodigy", 3, kills=NUM_KILLS, seed=11)
    assert len(took) == NUM_KILLS


def test_declared_faults_end_as_the_table_says(launch: Launch, tmp_path: Path) -> None:
    """Some of the matrix; ``make chaos ARGS=--matrix`` has all of it, ``tests/server/test_faults.py`` without Ray."""
    service = launch(3, redundancy=1)
    declared = Declared(service, trainer_of(service), trainer_of("inprocess"), tmp_path)
    for faults in random.Random(5).sample(matrix(step=1), NUM_DECLARED):
        declared.suffer(faults)


def test_several_workers_wait_for_a_shard_together(launch: Launch) -> None:
    service = launch(2, redundancy=1)
    workers, oracle = make_workers(service, 2), Oracle(2)
    on_all(workers, lambda worker: worker.run(5))
    Victims(service).kill(1)
    on_all(workers, lambda worker: worker.run(10))
    for worker in workers:
        oracle.to(10).require_same(worker)
    on_all(workers, lambda worker: worker.optimizer.close())


def test_shard_and_keeper_that_die_at_once_take_the_service_to_its_checkpoint(launch: Launch, tmp_path: Path) -> None:
    """On one node nobody has the shard's state then; nothing is made up."""
    service, uri = launch(2, redundancy=1), str(tmp_path / "checkpoint")
    trainer, victims = trainer_of(service).run(5), Victims(service)
    service.save(uri)
    trainer.run(7)
    victims.kill("keeper", 1)
    with pytest.raises(stepwell.StepwellError, match="restore"):
        trainer.run(8)
    service.restore(uri)
    trainer.optimizer.refresh()
    trainer.step = 5
    trainer.run(9)
    victims.await_successors()
    victims.kill(0)
    trainer.run(14)
    assert_same_training(trainer, trainer_of("inprocess").run(14))
    trainer.optimizer.close()
