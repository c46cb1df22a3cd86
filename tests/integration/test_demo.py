"""The demo as a person runs it: in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import assert_all_end, processes_with

MARK = "STEPWELL_TEST_MARK"
LIMIT_S = 150.0


def begin(mark: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stepwell.client.command_line", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: mark},
        preexec_fn=_hear_interrupts,
    )


def _hear_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(*options: str) -> dict[str, Any]:
    mark = uuid.uuid4().hex
    process = begin(mark, *options, "--json")
    out, notes = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, notes
    assert_all_end(processes_with(MARK, mark))
    summary: dict[str, Any] = json.loads(out)
    return summary


@pytest.mark.timeout(400)
def test_demo_resumed_on_another_number_of_shards_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = run("--steps", "12", "--shards", "2", "--out", str(tmp_path / "whole"))
    assert Path(str(whole["picture"])).exists()
    assert whole["held_out_loss_after"] < whole["held_out_loss_before"]
    resumed = run(
        "--steps", "12", "--shards", "3", "--out", str(tmp_path / "rest"), "--resume", str(whole["checkpoint"])
    )
    assert resumed["params_digest"] == whole["params_digest"]
    assert resumed["d"] == whole["d"]


@pytest.mark.timeout(200)
def test_demo_interrupted_leaves_no_process_behind(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    process = begin(mark, "--steps", "5000", "--out", str(tmp_path))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    began = processes_with(MARK, mark)
    assert len(began) > 3, "two workers and a Ray"
    process.send_signal(signal.SIGINT)
    _, notes = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, notes
    assert "Traceback" not in notes
    assert_all_end(began)
