"""A spare takes a killed shard's place in a service that Ray runs, and training goes on to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import ray

import stepwell
from stepwell.server.config import NAMESPACE
from tests.integration.conftest import Launch
from tests.integration.processes import assert_all_end
from tests.integration.training import D0, Trainer, assert_same_training
from tests.integration.victims import Victims, await_copies
from tests.zoo import straddling


def trainer_of(service: Any) -> Trainer:
    return Trainer(straddling(), stepwell.Prodigy, service=service, d0=D0)


@pytest.mark.timeout(300)
def test_spare_is_the_shard_that_is_killed_and_the_next_coordinator_finds_it(launch: Launch) -> None:
    """A shard, then the spare that it has become, then another shard with the coordinator; and a change of the set."""
    service = launch(2, redundancy=1, standby=1)
    spare = ray.get_actor(service.config.spare_name(0), namespace=NAMESPACE)
    seats, trainer = {*service.shards, spare}, trainer_of(service).run(5)
    victims = Victims(service)
    first = service.shards[1]
    victims.kill(1)
    trainer.run(10)
    assert service.find_shards()[1] == spare
    victims.await_successors()
    assert service.status()["recoveries"]["last"]["shards"] == (1,)

    await_copies(service)
    victims.kill(1)
    trainer.run(15)
    assert service.find_shards()[1] == first, "which was the spare then"

    victims.await_successors()
    await_copies(service)
    victims.kill("coordinator", 0)
    trainer.run(20)
    victims.await_successors()
    assert set(service.find_shards()) < seats
    assert_same_training(trainer, trainer_of("inprocess").run(20))

    pids = victims.pids().values()
    service.resize(3)
    trainer.run(25)
    assert service.status()["standby"]["wanted"] == 1
    assert_same_training(trainer, trainer_of("inprocess").run(25))
    trainer.optimizer.close()
    assert_all_end(pid for pid in pids if pid != victims.pids()["coordinator"])
    service.shutdown()
    assert not [actor for actor in ray.util.list_named_actors(all_namespaces=True) if service.name in actor["name"]]
