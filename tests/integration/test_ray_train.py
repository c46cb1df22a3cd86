"""Ray Train restarts its workers, with the service or without it: the run ends with the bits of one left alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray.train.torch import TorchTrainer

import stepwell
from stepwell.server.service import end
from tests.integration.nodes import Nodes
from tests.integration.train_loop import LIMIT_S, Plan, train

# Ray warns of defaults of its own, when a trainer is made.
pytestmark = pytest.mark.filterwarnings("ignore:::ray.data.context")

NUM_STEPS = 9
ROOM = {"room_for_worker": 1}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A cluster whose nodes a test adds: Train counts what a node has, whether or not shards have taken it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        # Until Train has heard that a node is lost, it waits for room for too many workers; with less than this it
        # begins with fewer where workers start slowly.
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
        nodes = Nodes(0)
        nodes.add(resources=ROOM)
        yield nodes
        nodes.close()


def begin(plan: Plan, num_workers: Any, pool: ThreadPoolExecutor) -> Future[ray.train.Result]:
    """Begin a run, in a thread, as Train would else keep Ctrl-C for itself."""
    trainer = TorchTrainer(
        train,
        train_loop_config={"plan": plan},
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers, resources_per_worker=ROOM),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=plan.folder,
            failure_config=ray.train.FailureConfig(max_failures=len(plan.faults)),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    return pool.submit(trainer.fit)


@pytest.mark.timeout(900)
def test_worker_that_is_killed_takes_all_back_to_the_last_checkpoint_with_the_service_or_without(
    nodes: Nodes, tmp_path: Path
) -> None:
    second = nodes.add(num_cpus=0, resources=ROOM)
    plan = Plan(
        service="rolled-back",
        folder=str(tmp_path),
        world_sizes=[2] * NUM_STEPS,
        faults={2: "worker", 5: "worker", 8: "service"},
        roll_back=True,
        redundancy=0,
    )
    with ThreadPoolExecutor(1) as pool:
        result = begin(plan, 2, pool).result(LIMIT_S)
    assert plan.notes() == ["2 at 0", "2 at 0", "2 at 3", "2 at 6", "same"]
    assert result.metrics == {"step": NUM_STEPS}
    assert result.checkpoint is not None
    kept = [found.step for found in stepwell.connect(plan.service).checkpoints(str(tmp_path / "run"))]
    assert kept == [NUM_STEPS], "Train has removed the others"
    end(plan.service)
    nodes.lose(second)


@pytest.mark.timeout(900)
def test_run_that_does_not_roll_back_goes_on_where_the_service_is_and_with_fewer_workers_when_a_node_is_lost(
    nodes: Nodes, tmp_path: Path
) -> None:
    lost = nodes.add(num_cpus=0, resources=ROOM)
    plan = Plan(
        service="goes-on",
        folder=str(tmp_path),
        world_sizes=[2] * 5 + [1] * (NUM_STEPS - 5),
        faults={2: "worker", 5: "wait"},
        roll_back=False,
        redundancy=1,
    )
    with ThreadPoolExecutor(1) as pool:
        run = begin(plan, (1, 2), pool)
        while not plan.marker(5).exists():
            assert not run.done(), run.result()
            time.sleep(0.1)
        nodes.lose(lost)
        assert run.result(LIMIT_S).metrics == {"step": NUM_STEPS}
    assert plan.notes() == ["2 at 0", "2 at 2", "1 at 5", "same"]
    end(plan.service)
