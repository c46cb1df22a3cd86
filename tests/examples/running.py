"""Runs an example as a person does, in a process of its own, and reads what it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

from tests.integration.processes import assert_all_end, processes_with

EXAMPLES = Path(__file__).parents[2] / "examples"
MARK = "STEPWELL_TEST_MARK"
LIMIT_S = 180.0
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
NOT_PASSED_ON = (
    "STEPWELL_SERVICE",
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def run(name: str, *options: str, folder: Path, num_workers: int = 1) -> str:
    """Run ``examples/<name>`` in ``folder``, under torchrun if it has several workers; what it printed.

    It must end with code 0 and leave no process behind.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node"]
    begin = [*torchrun, str(num_workers)] if num_workers > 1 else []
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    process = subprocess.Popen(
        [sys.executable, *begin, str(EXAMPLES / name), *options],
        cwd=folder,
        # A token that is there spares the home folder the one that Ray would write into it.
        env={**environment, **QUIET, MARK: mark, "RAY_AUTH_TOKEN": uuid.uuid4().hex},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, notes = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        for pid in processes_with(MARK, mark):
            os.kill(pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, notes
    assert_all_end(processes_with(MARK, mark))
    return out


def losses_in(out: str) -> dict[int, float]:
    """The losses that an example printed, by the step or epoch at the beginning of their lines."""
    found = re.findall(r"^(?:step|epoch) +(\d+) +loss ([\d.e+-]+)", out, flags=re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def lines_in(out: str, word: str) -> list[str]:
    """The lines that begin with ``word``."""
    return [line for line in out.splitlines() if line.startswith(word)]


def assert_falls(losses: dict[int, float], *, to: float) -> None:
    """See that the last loss is a ``to``-th of the first or less."""
    assert len(losses) >= 3, losses
    steps = sorted(losses)
    assert losses[steps[-1]] < to * losses[steps[0]], losses
