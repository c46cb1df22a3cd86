"""What outlives whom: a service, the process that launched it, and the jobs that train on it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

import stepwell
from stepwell.server import service as services
from stepwell.sharding.errors import ServiceExistsError, ServiceNotFoundError
from tests.integration.processes import assert_all_end, pid_of
from tests.integration.training import D0, LIMIT_S, Oracle, Trainer, small_in_order

ROOT = Path(__file__).parents[2]
NAME = "outliving"


@pytest.fixture
def address(local_ray: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What launchers find the module's Ray by; nothing of them is in it afterwards."""
    monkeypatch.setenv("RAY_ADDRESS", local_ray)
    yield
    await_nothing_left()


def launcher(what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.integration.launcher", NAME, what]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    """The next line that a launcher says; empty if it ends before."""
    assert process.stdout is not None
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(process.stdout.readline).result(timeout=LIMIT_S)


def left() -> dict[str, Any]:
    """The actors and the placement groups in the cluster."""
    groups = [row["name"] for row in placement_group_table().values() if row["state"] != "REMOVED"]
    return {"actors": [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)], "groups": groups}


def await_nothing_left() -> None:
    deadline = time.monotonic() + LIMIT_S
    while left() != {"actors": [], "groups": []}:
        assert time.monotonic() < deadline, left()
        time.sleep(0.05)


@pytest.mark.parametrize("end", ["exits", "killed"])
def test_named_service_outlives_its_launcher_and_ends_when_another_process_says_so(address: None, end: str) -> None:
    process = launcher("exits" if end == "exits" else "stays")
    assert said(process) == "ready\n"
    if end == "killed":
        process.kill()
    process.communicate(timeout=LIMIT_S)
    service = stepwell.connect(NAME)
    keeper = ray.get_actor(service.config.keeper_name(0), namespace="stepwell")
    pids = [pid_of(actor) for actor in (*service.shards, service.coordinator, keeper)]
    worker = Trainer(small_in_order(), stepwell.Prodigy, d0=D0, shift=9.0, service=NAME)
    worker.step = service.status()["step"]
    assert worker.step == 3
    Oracle().to(6).require_same(worker.run(6))
    worker.optimizer.close()
    service.shutdown()
    assert_all_end(pids)
    await_nothing_left()
    with pytest.raises(ServiceNotFoundError, match=f"service '{NAME}': its status: the service has ended"):
        service.status()


def test_unnamed_service_in_a_ray_that_is_there_ends_with_its_killed_launcher(address: None) -> None:
    process = launcher("unnamed")
    assert said(process) == "ready\n"
    names = [name for name in left()["actors"] if name.startswith("unnamed-")]
    pids = [pid_of(ray.get_actor(name, namespace="stepwell")) for name in names]
    assert len(pids) == 4, "two shards, their keeper and the coordinator"
    process.kill()
    process.communicate(timeout=LIMIT_S)
    assert_all_end(pids)


def test_launch_that_was_cut_short_is_named_and_can_be_ended(address: None) -> None:
    process = launcher("dies")
    assert said(process) == ""
    process.communicate(timeout=LIMIT_S)
    assert left()["groups"] == [f"{NAME}/set-0.0"]
    for attempt in (stepwell.connect, stepwell.launch):
        with pytest.raises(ServiceExistsError, match=f"its launch was cut short; .* `stepwell down {NAME}`"):
            attempt(NAME)
    services.end(NAME)
    await_nothing_left()
    with pytest.raises(ServiceNotFoundError, match=f"no service '{NAME}'"):
        services.end(NAME)
