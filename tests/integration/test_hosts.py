"""A service over several hosts, each with a network and processes of its own, one of which is cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepwell.server.config import set_ray_defaults
from tests.integration.host_worker import TOLD
from tests.integration.hosts import NOWHERE, Hosts
from tests.integration.nodes import STORE_BYTES
from tests.namespaces import why_none

ROOT = Path(__file__).parents[2]
LIMIT_S = 240.0
PORT = 6379
TRIES = 3
# So that a host that is cut off is missed in a quarter of a minute: nothing ends there that could be noticed.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
}

pytestmark = pytest.mark.skipif(why_none() is not None, reason=f"hosts of their own: {why_none()}")


class Cluster:
    """A Ray over hosts, as deploy/README.md starts one; the first host has no room for shards.

    Args:
        hosts: The hosts.
        logs: Where each host's Ray says what it does.
    """

    def __init__(self, hosts: Hosts, logs: Path) -> None:
        set_ray_defaults()
        self._hosts, self._logs = hosts, logs
        # As a training job's environment may have it; for shards it is the wrong one.
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": NOWHERE}
        first, *others = hosts.addresses
        self.address = f"{hosts.addresses[first]}:{PORT}"
        head = f"--head --port={PORT} --node-ip-address={hosts.addresses[first]} --include-dashboard=false --num-cpus=0"
        self._start(first, *head.split(), f"--system-config={json.dumps(HEALTH)}")
        for name in others:
            self._start(name, f"--address={self.address}", "--num-cpus=1")

    def python(self, host: str, *arguments: str, **options: int) -> subprocess.Popen[str]:
        """Start Python on a host."""
        return self._hosts[host].start(sys.executable, *arguments, env=self._environment, **options)

    def _start(self, name: str, *options: str) -> None:
        """Start Ray on a host; again if it was not up within the half minute that it gives itself."""
        common = f"--block --disable-usage-stats --object-store-memory={STORE_BYTES}".split()
        log = self._logs / f"{name}.log"
        for _ in range(TRIES):
            with log.open("w") as file:
                arguments = ("-m", "ray.scripts.scripts", "start", *options, *common)
                process = self.python(name, *arguments, stdout=file.fileno(), stderr=subprocess.STDOUT)
            deadline = time.monotonic() + LIMIT_S
            while process.poll() is None and time.monotonic() < deadline:
                if "Ray runtime started" in log.read_text():
                    return
                time.sleep(0.1)
        raise AssertionError(log.read_text())


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    there = Hosts(["head", "left", "right"])
    yield there
    there.close()


@pytest.mark.timeout(600)
def test_host_that_is_cut_off_and_comes_back_costs_no_step(hosts: Hosts, tmp_path: Path) -> None:
    """It has a shard and the coordinator. Workers are on the other one, near to a shard, and where no shard is."""
    cluster = Cluster(hosts, tmp_path)
    arguments = ("-m", "tests.integration.host_worker", cluster.address)
    worker = cluster.python("head", *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    lost = told_by(worker)
    assert lost in ("left", "right")
    hosts.cut(lost)
    assert told_by(worker) == "recovered"
    hosts.mend(lost)
    assert worker.stdin is not None
    print("go on", file=worker.stdin, flush=True)
    assert told_by(worker) == "same"


def told_by(worker: subprocess.Popen[str]) -> str:
    """What it says next; empty if it has ended. Ray writes lines of its own between."""
    assert worker.stdout is not None
    return next((line.removeprefix(TOLD).strip() for line in worker.stdout if line.startswith(TOLD)), "")
