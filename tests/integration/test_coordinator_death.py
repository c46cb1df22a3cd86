"""The coordinator's process is killed with SIGKILL while two workers train on two shards."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import stepwell
from stepwell.sharding.errors import (
    CheckpointRestoreNeededError,
    IncarnationError,
    NotRegisteredError,
    ShardLostError,
)
from tests.integration.conftest import Launch
from tests.integration.processes import assert_all_end, pid_of
from tests.integration.training import D0, LIMIT_S, Oracle, Trainer, errors_on_all, make_workers, on_all, small_in_order


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two workers on two shards."""

    service: stepwell.Service
    workers: list[Trainer]

    def train(self, num_steps: int = 3) -> None:
        stop = self.workers[0].step + num_steps
        on_all(self.workers, lambda worker: worker.run(stop))

    def require_undisturbed(self) -> None:
        oracle = Oracle(2).to(self.workers[0].step)
        for worker in self.workers:
            oracle.require_same(worker)


@pytest.fixture(scope="module")
def module_pair(module_launch: Launch) -> Pair:
    service = module_launch(2)
    return Pair(service, make_workers(service, 2))


@pytest.fixture
def pair(module_pair: Pair) -> Iterator[Pair]:
    """A pair in the middle of its training, which goes on after the test as if nothing had been."""
    module_pair.train()
    yield module_pair
    module_pair.train()
    module_pair.require_undisturbed()


def kill_at(service: stepwell.Service, method: str) -> int:
    """Have the coordinator kill its process when it has called ``method`` of the first shard; its pid."""

    def arm(coordinator: Any) -> int:
        shards = coordinator._shards
        call = shards._call

        async def call_and_die(handles: Any, called: str, *args: Any, **keywords: Any) -> Any:
            if called != method:
                return await call(handles, called, *args, **keywords)
            await call(handles[:1], called, *args, **keywords)
            os.kill(os.getpid(), signal.SIGKILL)

        shards._call = call_and_die
        return os.getpid()

    pid: int = ray.get(service.coordinator.__ray_call__.remote(arm), timeout=LIMIT_S)
    return pid


def test_training_goes_on_without_the_coordinator_and_the_next_one_knows_all(pair: Pair, tmp_path: Path) -> None:
    before = pair.service.status()
    pid = pid_of(pair.service.coordinator)
    os.kill(pid, signal.SIGKILL)
    assert_all_end([pid])
    pair.train()
    after = pair.service.status()
    assert (after["epoch"], after["restarts"]) == (before["epoch"] + 1, before["restarts"] + 1)
    assert after["step"] == before["step"] + 3
    assert {name: after[name] for name in ("timeline", "generation", "rule", "world_size")} == {
        name: before[name] for name in ("timeline", "generation", "rule", "world_size")
    }
    assert pid_of(pair.service.coordinator) != pid
    assert stepwell.connect(pair.service.name).save(str(tmp_path)) == after["step"]


def save(pair: Pair, folder: str) -> None:
    assert pair.service.save(folder) == pair.workers[0].step


def save_while_steps_go_on(pair: Pair, folder: str) -> None:
    step, pending = pair.workers[0].step, pair.service.save(folder, wait=False)
    pair.train()
    assert pending.result() == step


def restore(pair: Pair, folder: str) -> None:
    """Restored once only, so that every worker is on the timeline that rank 0 was told of."""
    timeline = pair.service.status()["timeline"]
    step = pair.service.restore(folder)
    assert pair.service.status()["timeline"] == timeline + 1
    for worker in pair.workers:
        worker.optimizer.refresh()
        worker.step = step


def load(pair: Pair, folder: str) -> None:
    """Loaded once only, too."""
    timeline, saved = pair.service.status()["timeline"], pair.workers[0].optimizer.state_dict()
    on_all(pair.workers, lambda worker: worker.optimizer.load_state_dict(saved))
    assert pair.service.status()["timeline"] == timeline + 1


def replace(pair: Pair, folder: str) -> None:
    options: dict[str, Any] = {"service": pair.service, "rank": 1, "world_size": 2, "d0": D0}
    step = pair.workers[1].step
    pair.workers[1] = Trainer(small_in_order(), stepwell.Prodigy, shift=5.0, **options)
    pair.workers[1].step = step


@pytest.mark.parametrize(
    ("operation", "method"),
    [
        (save, "snapshot"),
        (save_while_steps_go_on, "complete_save"),
        (restore, "adopt"),
        (load, "adopt"),
        (load, "prepare_load"),
        (replace, "admit"),
    ],
)
def test_operation_is_done_once_although_the_coordinator_dies_in_it(
    pair: Pair, operation: Callable[[Pair, str], None], method: str, tmp_path: Path
) -> None:
    if operation is restore:
        pair.service.save(str(tmp_path))
        pair.train()
    pid = kill_at(pair.service, method)
    operation(pair, str(tmp_path))
    assert_all_end([pid])
    assert pair.service.status()["restarts"] > 0
    if operation in (save, save_while_steps_go_on):
        assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("shard", [0, 1])
def test_shard_and_coordinator_that_die_together_are_restored_for_the_same_workers(
    pair: Pair, shard: int, tmp_path: Path
) -> None:
    pair.service.save(str(tmp_path))
    pids = [pid_of(pair.service.shards[shard]), pid_of(pair.service.coordinator)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert_all_end(pids)
    for error in errors_on_all(pair.workers, lambda worker: worker.run(worker.step + 1)):
        assert isinstance(error, (ShardLostError, NotRegisteredError)), error
    step = pair.service.restore(str(tmp_path))
    for worker in pair.workers:
        worker.optimizer.refresh()
        worker.step = step


def test_service_whose_processes_all_died_begins_no_new_job_unasked(launch: Launch, tmp_path: Path) -> None:
    service = launch(2)
    worker = Trainer(small_in_order(), stepwell.Prodigy, d0=D0, service=service).run(3)
    service.save(str(tmp_path))
    pids = [pid_of(actor) for actor in (*service.shards, service.coordinator)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert_all_end(pids)
    with pytest.raises(ShardLostError, match=r"all processes of service .* were started again.* service.restore"):
        Trainer(small_in_order(), stepwell.Prodigy, d0=D0, shift=9.0, service=service)
    with pytest.raises(CheckpointRestoreNeededError, match="restore"):
        worker.run(4)
    assert service.restore(str(tmp_path)) == 3
    with pytest.raises(IncarnationError):
        worker.run(4)
    successor = Trainer(small_in_order(), stepwell.Prodigy, d0=D0, shift=9.0, service=service)
    successor.step = 3
    Oracle().to(6).require_same(successor.run(6))


def test_group_that_is_added_is_there_once_although_the_coordinator_dies_in_it(launch: Launch) -> None:
    service = launch(2)
    workers = make_workers(service, 2)
    on_all(workers, lambda worker: worker.run(2))
    added = {worker.rank: torch.nn.Parameter(torch.full((300,), 3.0 + worker.rank)) for worker in workers}
    kill_at(service, "adopt")
    on_all(workers, lambda worker: worker.optimizer.add_param_group({"params": [added[worker.rank]]}))
    assert [torch.equal(param.data, torch.full((300,), 3.0)) for param in added.values()] == [True, True]
    on_all(workers, lambda worker: worker.run(4))
    assert torch.equal(workers[0].params[0], workers[1].params[0])
    assert service.status()["numel"] == sum(param.numel() for param in workers[0].params) + 300
