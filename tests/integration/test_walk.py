"""A whole life of a service over three nodes: as a person leads it, and with nodes that go with and without a word."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

import stepwell
from stepwell.server import cluster
from stepwell.server.config import Placement, ServiceConfig
from stepwell.server.shard_sets import give_up_places, nodes_of, reserve
from stepwell.sharding.errors import PlacementError
from tests.command_line import cli_process
from tests.integration.conftest import launcher
from tests.integration.nodes import Nodes, node_of
from tests.integration.processes import pid_of
from tests.integration.rank import WORLD_SIZE, rank_on
from tests.integration.training import D0, Trainer, assert_same_training
from tests.zoo import straddling

LIMIT_S = 120.0
NUM_NODES = 3


def command(*arguments: str) -> str:
    """Run the command line; what it says."""
    run = cli_process(*arguments)
    assert run.code == 0, run.err
    return run.out


@pytest.mark.parametrize(
    ("placement", "num_shards", "on_each"),
    [
        ("PACK", 2, [2]),
        ("PACK", 3, [1, 2]),
        ("SPREAD", 3, [1, 1, 1]),
        ("SPREAD", 4, [1, 1, 2]),
        ("STRICT_PACK", 2, [2]),
        ("STRICT_SPREAD", 3, [1, 1, 1]),
    ],
)
def test_shards_are_placed_as_is_said(nodes: Nodes, placement: Placement, num_shards: int, on_each: list[int]) -> None:
    config = ServiceConfig("placed", num_shards=num_shards, num_cpus_per_shard=0.5, placement=placement)
    reserve(config)
    where = nodes_of(config)
    give_up_places(config.name)
    assert sorted(where.count(node) for node in set(where)) == on_each


@pytest.mark.parametrize(
    ("placement", "num_shards", "cpus", "most"),
    [
        ("STRICT_SPREAD", 4, 0.5, "for 3, with one on a node"),
        ("STRICT_PACK", 3, 0.5, "for 2, on one node"),
        ("SPREAD", 1, 2.0, "for 0, each whole on a node"),
    ],
)
def test_what_no_node_has_room_for_is_told_at_once(
    nodes: Nodes, placement: Placement, num_shards: int, cpus: float, most: str
) -> None:
    """All nodes together would have enough; the message says what each of them has."""
    there = r"has \S+ of 1 CPU; .*has neither CPU nor GPU"
    with launcher() as launch, pytest.raises(PlacementError, match=rf"{most}: .*{there}"):
        launch(num_shards, num_cpus_per_shard=cpus, placement=placement)


@pytest.mark.timeout(600)
def test_service_is_led_through_its_life(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up, training on two nodes, the loss of the third, save, down, up with fewer shards, training on, down."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address())
    uri = str(tmp_path / "checkpoint")
    assert "service walked is up: 3 shard(s)" in command("up", "walked", "--shards", "3", "--cpus-per-shard", "0.5")
    service = stepwell.connect("walked")
    lost, *others = map(node_of, service.shards)
    assert len({lost, *others}) == 3
    assert node_of(service.coordinator) == lost
    ranks = [rank_on(node, "walked", rank) for rank, node in enumerate(others)]
    assert len(ranks) == WORLD_SIZE
    on_all(ranks, "run", 10)
    running = [rank.run.remote(60) for rank in ranks]
    nodes.lose(lost)
    ray.get(running, timeout=LIMIT_S)
    assert lost not in map(node_of, (*service.shards, service.coordinator))
    on_all(ranks, "require_same")
    assert "saved step 60" in command("save", "walked", uri)
    on_all(ranks, "close")
    assert "is down" in command("down", "walked")
    nodes.add()

    assert "2 shard(s)" in command("up", "walked", "--shards", "2", "--cpus-per-shard", "0.5", "--restore", uri)
    ranks = [rank_on(node, "walked", rank) for rank, node in enumerate(others)]
    on_all(ranks, "run", 70)
    on_all(ranks, "require_same")
    on_all(ranks, "close")
    command("down", "walked")


def on_all(actors: list[object], method: str, *arguments: object) -> None:
    """Call a method of every actor at once."""
    ray.get([getattr(actor, method).remote(*arguments) for actor in actors], timeout=LIMIT_S)


@pytest.mark.timeout(600)
def test_node_that_ray_is_told_to_drain_is_left_in_time(nodes: Nodes) -> None:
    """The service's first shard, its coordinator and a keeper are there; Ray ends it when nothing is left on it."""
    with launcher() as launch:
        service = launch(2, redundancy=1, num_cpus_per_shard=0.5)
        trainer = trainer_of(service).run(3)
        drained, deadline = node_of(service.coordinator), time.monotonic() + LIMIT_S
        assert drained == nodes_of(service.config)[0]
        drain(drained)
        while service.config.shard_set[0] == 0:
            assert time.monotonic() < deadline, f"node {drained} was not left within {LIMIT_S:g} s"
            trainer.run(trainer.step + 1)
            service.find_shards()
        assert drained not in nodes_of(service.config)
        processes = list(map(pid_of, service.shards))
        nodes.await_end(drained)
        trainer.run(trainer.step + 5)
        assert drained != node_of(service.coordinator)
        assert list(map(pid_of, service.find_shards())) == processes  # they were moved, and none of them was lost
        assert_same_training(trainer, trainer_of("inprocess").run(trainer.step))
        trainer.optimizer.close()
    nodes.add()


def trainer_of(service: stepwell.Service | str) -> Trainer:
    return Trainer(straddling(), stepwell.Prodigy, d0=D0, service=service)


def drain(node: str) -> None:
    """As whoever takes a node away tells Ray."""
    arguments = f"drain-node --address {cluster.address()} --node-id {node} --reason DRAIN_NODE_REASON_PREEMPTION"
    told = (*arguments.split(), "--reason-message", "a test", "--deadline-remaining-seconds", str(int(LIMIT_S)))
    run = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *told], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert run.returncode == 0, run.stderr
