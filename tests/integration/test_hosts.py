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
from tests.integration.hosts import NOWHERE, Hosts
from tests.integration.nodes import STORE_BYTES
from tests.namespaces import why_none

ROOT = Path(__file__).parents[2]
LIMIT_S = 240.0
PORT = 6379
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
        self._await_start(first, self._start(first, *head.split(), f"--system-config={json.dumps(HEALTH)}"))
        for name in others:
            self._start(name, f"--address={self.address}", "--num-cpus=1")

    def python(self, host: str, *arguments: str, **options: int) -> subprocess.Popen[str]:
        """Start Python on a host."""
        return self._hosts[host].start(sys.executable, *arguments, env=self._environment, **options)

    def _start(self, name: str, *options: str) -> subprocess.Popen[str]:
        common = f"--block --disable-usage-stats --object-store-memory={STORE_BYTES}".split()
        with self._log(name).open("w") as log:
            arguments = ("-m", "ray.scripts.scripts", "start", *options, *common)
            return self.python(name, *arguments, stdout=log.fileno(), stderr=subprocess.STDOUT)

    def _await_start(self, name: str, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while "Ray runtime started" not in (told := self._log(name).read_text()):
            assert process.poll() is None, told
            assert time.monotonic() < deadline, told
            time.sleep(0.1)

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


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
    assert worker.stdout is not None
    lost = worker.stdout.readline().strip()
    assert lost in ("left", "right")
    hosts.cut(lost)
    assert worker.stdout.readline() == "recovered\n"
    hosts.mend(lost)
    out, _ = worker.communicate("go on\n", timeout=LIMIT_S)
    assert (out, worker.returncode) == ("same\n", 0)
