"""Processes that are killed, and services side by side."""

from __future__ import annotations

import operator
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
from typing import Any

import pytest
import ray

import stepwell
from stepwell.sharding.errors import NotRegisteredError, ServiceExistsError, ShardLostError
from tests.integration.conftest import Launch
from tests.integration.processes import assert_all_end, is_alive, processes_with
from tests.integration.training import D0, LIMIT_S, Oracle, Trainer, errors_on_all, make_workers, on_all, small_in_order

ROOT = Path(__file__).parents[2]
PROMPT_S = 20.0
"""Far below the limit of a step, which is half an hour."""


def pid_of(shard: Any) -> int:
    """The process of a shard's actor, whose incarnation begins with it."""
    incarnation = ray.get(shard.__ray_call__.remote(operator.attrgetter("_incarnation")), timeout=LIMIT_S)
    return int(str(incarnation).split("-")[0])


def test_killed_shard_is_told_at_once_and_a_restore_brings_it_back(launch: Launch, tmp_path: Path) -> None:
    """Four shards: one of them exchanges nothing with the one that is killed, and has to learn of it all the same."""
    service = launch(4)
    workers = make_workers(service, 2)
    on_all(workers, lambda worker: worker.run(5))
    service.save(str(tmp_path))
    killing = threading.Timer(0.5, os.kill, (pid_of(service.shards[1]), signal.SIGKILL))
    killing.start()
    errors = errors_on_all(workers, lambda worker: worker.run(10_000))
    told_after = time.monotonic()
    for error in errors:
        assert isinstance(error, (ShardLostError, NotRegisteredError)), error
        assert "service.restore(URI)" in str(error) or "restore its last checkpoint" in str(error)
    assert service.restore(str(tmp_path)) == 5
    assert time.monotonic() - told_after < PROMPT_S
    for worker in workers:
        worker.optimizer.refresh()
        worker.step = 5
    on_all(workers, lambda worker: worker.run(20))
    oracle = Oracle(2).to(20)
    for worker in workers:
        oracle.require_same(worker)
    on_all(workers, lambda worker: worker.optimizer.close())


def test_killed_shard_between_steps_is_told_by_every_call(launch: Launch, tmp_path: Path) -> None:
    service = launch(2)
    worker = Trainer(small_in_order(), stepwell.Prodigy, d0=D0, service=service).run(3)
    service.save(str(tmp_path))
    pid = pid_of(service.shards[0])
    os.kill(pid, signal.SIGKILL)
    assert_all_end([pid])
    calls: list[Callable[[], object]] = [
        lambda: worker.run(4),
        worker.optimizer.state_dict,
        worker.optimizer.refresh,
        lambda: service.save(str(tmp_path / "again")),
    ]
    for call in calls:
        began = time.monotonic()
        with pytest.raises((ShardLostError, NotRegisteredError)):
            call()
        assert time.monotonic() - began < PROMPT_S
    assert service.restore(str(tmp_path)) == 3
    worker.optimizer.refresh()
    Oracle().to(10).require_same(worker.run(10))
    worker.optimizer.close()


def test_two_services_serve_two_optimizers_of_one_process(launch: Launch) -> None:
    workers = [Trainer(small_in_order(), stepwell.Prodigy, d0=D0, service=launch(1)) for _ in range(2)]
    for step in range(1, 6):
        workers[0].run(step)
        workers[1].run(2 * step)
    Oracle().to(5).require_same(workers[0])
    workers[0].optimizer.service.shutdown()
    Oracle().to(12).require_same(workers[1].run(12))
    with pytest.raises(ServiceExistsError, match=f"there is a service '{workers[1].optimizer.service.name}' already"):
        stepwell.launch(workers[1].optimizer.service.name)
    workers[1].optimizer.close()


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
    mark = uuid.uuid4().hex
    # Ray's agents look for a GCS that died with them for so long, by default a minute.
    patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "2"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.two_embedded"],
        cwd=ROOT,
        env={**os.environ, **patience, "STEPWELL_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(process.stdout.readline).result(timeout=100) == "ready\n"
        children = [pid for pid in processes_with("STEPWELL_TEST_MARK", mark) if pid != process.pid]
        assert len(children) >= 4, "Ray's own, a coordinator and a shard at least"
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)
    assert_all_end(children)
    assert not [pid for pid in processes_with("STEPWELL_TEST_MARK", mark) if is_alive(pid)]
