"""Processes that are killed, and services side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

import stepwell
from stepwell.sharding.errors import NotRegisteredError, ShardLostError
from tests.integration.conftest import Launch
from tests.integration.processes import assert_all_end, command, pid_of, processes_with
from tests.integration.training import D0, LIMIT_S, Oracle, Trainer, errors_on_all, make_workers, on_all, small_in_order

ROOT = Path(__file__).parents[2]
PROMPT_S = 20.0
"""Far below the limit of a step, which is half an hour."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Two workers on four shards: one shard exchanges nothing with the second, and has to learn of its end too."""

    service: stepwell.Service
    workers: list[Trainer]
    checkpoint: str

    def restore(self) -> None:
        """Take the service back to its checkpoint, and see that the job goes on as if nothing had been."""
        began = time.monotonic()
        step = self.service.restore(self.checkpoint)
        assert time.monotonic() - began < PROMPT_S
        for worker in self.workers:
            worker.optimizer.refresh()
            worker.step = step
        on_all(self.workers, lambda worker: worker.run(step + 15))
        oracle = Oracle(2).to(step + 15)
        for worker in self.workers:
            oracle.require_same(worker)


@pytest.fixture(scope="module")
def job(module_launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Job:
    service, checkpoint = module_launch(4), str(tmp_path_factory.mktemp("checkpoint"))
    workers = make_workers(service, 2)
    on_all(workers, lambda worker: worker.run(5))
    service.save(checkpoint)
    return Job(service, workers, checkpoint)


def test_shard_that_is_killed_in_a_step_is_told_at_once_and_restored(job: Job) -> None:
    pid, killed_at = pid_of(job.service.shards[1]), []

    def kill() -> None:
        killed_at.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(0.5, kill)
    timer.start()
    errors = errors_on_all(job.workers, lambda worker: worker.run(10_000))
    assert time.monotonic() - killed_at[0] < PROMPT_S
    for error in errors:
        assert isinstance(error, (ShardLostError, NotRegisteredError)), error
        assert "restore" in str(error).lower()
    timer.join()
    job.restore()


def test_shard_that_is_killed_between_steps_is_told_by_every_call_and_restored(job: Job, tmp_path: Path) -> None:
    pid, worker = pid_of(job.service.shards[0]), job.workers[0]
    os.kill(pid, signal.SIGKILL)
    assert_all_end([pid])
    calls: list[Callable[[], object]] = [
        lambda: worker.run(worker.step + 1),
        worker.optimizer.state_dict,
        worker.optimizer.refresh,
        lambda: job.service.save(str(tmp_path)),
    ]
    for call in calls:
        began = time.monotonic()
        with pytest.raises((ShardLostError, NotRegisteredError)):
            call()
        assert time.monotonic() - began < PROMPT_S
    job.restore()


def test_embedded_service_uses_a_ray_that_is_there_and_leaves_it(local_ray: str) -> None:
    worker = Trainer(small_in_order(), stepwell.Prodigy, d0=D0, service="embedded")
    name = worker.optimizer.service.name
    Oracle().to(3).require_same(worker.run(3))
    worker.optimizer.close()
    assert ray.is_initialized()
    assert ray.get_runtime_context().gcs_address == local_ray
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor(f"{name}/coordinator", namespace="stepwell")


def test_unnamed_service_ends_with_its_process() -> None:
    """All but Ray's two agents, which look for their cluster for a minute before they end too."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.two_embedded"],
        cwd=ROOT,
        env={**os.environ, "STEPWELL_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(process.stdout.readline).result(timeout=100) == "ready\n"
        children = [pid for pid in processes_with("STEPWELL_TEST_MARK", mark) if pid != process.pid]
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)
    agents = [pid for pid in children if command(pid).endswith("Agent")]
    assert len(children) - len(agents) >= 4, "a GCS, a raylet, a coordinator and a shard at least"
    assert_all_end(set(children) - set(agents))
    for pid in agents:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert_all_end(processes_with("STEPWELL_TEST_MARK", mark))
