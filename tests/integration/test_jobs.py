"""The documented job, submitted as its page says to a fresh cluster that asks for a token."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.jobs.train import Run, train
from tests.integration.processes import assert_all_end, is_alive, processes_with

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.2"
MARK = "STEPWELL_TEST_MARK"
LIMIT_S = 240.0
SMALL = "--workers 1 --cpus-per-shard 0.5 --horizon 12 --save-every 3"
"""Of the documented job, so that it fits this machine and its oracle is a process."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A head with its job server, and the environment of a shell from which it can be reached."""

    environment: dict[str, str]

    def run(self, command: str) -> str:
        """Run a command line from the repository's root; what it printed."""
        run = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Started as deploy/README.md says, on loopback and with ports that are free here."""
    # Its path is short, as those of sockets have to be.
    with tempfile.TemporaryDirectory(prefix="stepwell-jobs-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        token = Path(folder, "token")
        token.write_text(uuid.uuid4().hex)
        port, job_port, mark = free_port(), free_port(), uuid.uuid4().hex
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # as in an activated virtual environment
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            MARK: mark,
        }
        options = (
            f"--head --block --num-cpus=2 --port={port} --node-ip-address={HOST} --dashboard-host={HOST} "
            f"--dashboard-port={job_port} --dashboard-agent-listen-port={free_port()} "
            f"--dashboard-agent-grpc-port={free_port()} --ray-client-server-port={free_port()} "
            f"--disable-usage-stats --temp-dir={folder}"
        )
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options.split()],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://{HOST}:{job_port}"
            await_job_server(url, token.read_text(), head)
            yield Cluster({**environment, "RAY_API_SERVER_ADDRESS": url, "RAY_ADDRESS": f"{HOST}:{port}"})
        finally:
            started = processes_with(MARK, mark)  # a head that is told to end takes half a minute to
            for pid in started:
                os.kill(pid, signal.SIGKILL)
            head.wait(LIMIT_S)
            assert_all_end(started)


def await_job_server(url: str, token: str, head: subprocess.Popen[bytes]) -> None:
    """Wait until it answers who shows the token, and see that it answers nobody else."""
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        assert is_alive(head.pid)
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except OSError:
            time.sleep(0.2)
        else:
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{url}/api/jobs/", timeout=10)
            return
    raise AssertionError(f"{url} did not answer within {LIMIT_S:g} s")


def documented(folder: Path, steps: int) -> str:
    """The command of deploy/README.md, with a folder and a number of steps of this test's own."""
    page = (ROOT / "deploy" / "README.md").read_text()
    (command,) = re.findall(r"^ray job submit .*train\.py .*$", page, flags=re.MULTILINE)
    command = command.replace("/checkpoints/trainer", str(folder))
    command, num_found = re.subn(r"--steps \d+", f"--steps {steps}", command)
    assert num_found == 1
    assert str(folder) in command
    return f"{command} {SMALL}"


def said(out: str) -> list[str]:
    """What the job itself printed: how it came to its service, where that stood, and what its last step was."""
    return re.findall(r"^(?:found service .*|started service .*|at step .*|step .*)$", out, flags=re.MULTILINE)


@pytest.mark.timeout(900)
def test_job_that_is_submitted_again_resumes_from_its_service_and_then_from_its_checkpoint(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert said(cluster.run(documented(folder, 6)))[:2] == ["started service trainer", "at step 0"]
    oracle = Run("inprocess", str(tmp_path / "oracle"), 12, 12, 12, 1, 1, 0, 1, 0, 0)
    last = train(oracle, rank=0, first=0)
    assert said(cluster.run(documented(folder, 12))) == ["found service trainer", "at step 6", last]

    cluster.run("stepwell down trainer")
    for step in (9, 12):
        shutil.rmtree(folder / f"step-{step:08d}")
    assert said(cluster.run(documented(folder, 12))) == ["started service trainer", "at step 6", last]
