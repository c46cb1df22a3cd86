"""Nodes are lost without warning, with all that is on them, and training goes on to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

import stepwell
from stepwell.server.config import NAMESPACE
from stepwell.sharding.errors import CheckpointRestoreNeededError
from tests.integration.conftest import launcher
from tests.integration.nodes import Nodes, kill, node_of
from tests.integration.training import D0, Trainer, assert_same_training
from tests.integration.victims import Victims, await_copies
from tests.zoo import straddling

LIMIT_S = 120.0
NUM_NODES = 3


def trainer_of(service: Any) -> Trainer:
    return Trainer(straddling(), stepwell.Prodigy, service=service, d0=D0)


def keeper_of(service: stepwell.Service, number: int) -> Any:
    return ray.get_actor(service.config.keeper_name(number), namespace=NAMESPACE)


@pytest.mark.timeout(600)
def test_lost_nodes_cost_no_step(nodes: Nodes, tmp_path: Path) -> None:
    """A shard's node, then the coordinator's with its shard and keeper; at last a shard and its keeper on another."""
    with launcher() as launch:
        service = launch(2, num_cpus_per_shard=1, redundancy=1)
        first, second = map(node_of, service.shards)
        assert first != second
        assert [node_of(keeper_of(service, number)) for number in range(2)] == [first, second]
        trainer = trainer_of(service).run(7)
        for lost in (second, first):
            assert all(list(kept) for kept in await_copies(service, 1))
            nodes.lose(lost)
            trainer.run(trainer.step + 6)
            nodes.add()
            assert {node_of(actor) for actor in (*service.shards, service.coordinator)}.isdisjoint({lost})
        assert_same_training(trainer, trainer_of("inprocess").run(trainer.step))
        beyond_what_is_survived(service, trainer, str(tmp_path / "checkpoint"))


def beyond_what_is_survived(service: stepwell.Service, trainer: Trainer, uri: str) -> None:
    """A shard and its only keeper at once: the error names the checkpoint, and training goes on from there."""
    step = service.save(uri)
    trainer.run(step + 3)
    (number,) = await_copies(service, 1)[1]
    for actor in (keeper_of(service, int(number)), service.shards[1]):
        kill(actor)
    with pytest.raises(CheckpointRestoreNeededError, match=f"{uri}, of step {step}"):
        trainer.run(trainer.step + 1)
    service.restore(uri)
    trainer.optimizer.refresh()
    trainer.step = step
    trainer.run(step + 5)
    assert_same_training(trainer, trainer_of("inprocess").run(trainer.step))
    trainer.optimizer.close()


@pytest.mark.timeout(600)
def test_shard_and_keeper_that_are_lost_at_once_cost_no_step_with_two(nodes: Nodes) -> None:
    with launcher() as launch:
        service = launch(2, num_cpus_per_shard=1, redundancy=2)
        trainer = trainer_of(service).run(5)
        await_copies(service, 2)
        kill(keeper_of(service, 1))
        kill(service.shards[0])
        trainer.run(11)
        await_copies(service, 2)
        nodes.lose(node_of(service.shards[1]))
        trainer.run(17)
        assert_same_training(trainer, trainer_of("inprocess").run(trainer.step))
        trainer.optimizer.close()


@pytest.mark.timeout(600)
def test_spare_takes_the_place_of_a_shard_whose_node_is_lost_and_is_drained_with_its_own(nodes: Nodes) -> None:
    """It stands beside a shard, so that the other one's node is lost; from then on one node has all of them."""
    with launcher() as launch:
        for _ in range(3):
            nodes.add()
        service = launch(2, num_cpus_per_shard=1, redundancy=1, standby=1)
        spare = ray.get_actor(service.config.spare_name(0), namespace=NAMESPACE)
        trainer = trainer_of(service).run(5)
        Victims(service)  # waits until the spare is ready
        await_copies(service)
        drained = node_of(spare)
        ((index, lost),) = [each for each in enumerate(map(node_of, service.shards)) if each[1] != drained]
        nodes.lose(lost)
        trainer.run(11)
        assert service.find_shards()[index] == spare
        assert_same_training(trainer, trainer_of("inprocess").run(trainer.step))
        service.drain(drained)
        trainer.run(17)
        assert drained not in set(map(node_of, service.find_shards()))
        assert service.status()["standby"]["wanted"] == 1
        assert_same_training(trainer, trainer_of("inprocess").run(trainer.step))
        trainer.optimizer.close()
