"""Ten minutes: docs/start.md as a stranger walks through it, every block as written, in an empty folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.examples.running import MARK, NOT_PASSED_ON, QUIET
from tests.integration.processes import assert_all_end, processes_with
from tests.pages import ROOT, blocks_of

LIMIT_S = 300.0


def shell(text: str, folder: Path, mark: str) -> str:
    """What a block of commands prints; the first one that fails ends it."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env={
            **environment,
            **QUIET,
            MARK: mark,
            "HOME": str(folder / "home"),  # where the Ray that `up` starts is remembered, and its token
            "XDG_STATE_HOME": str(folder / "home" / "state"),
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
            "PET_LOCAL_ADDR": "127.0.0.1",  # torchrun's --local-addr: this machine's name may lead nowhere
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert run.returncode == 0, f"{text}\n{run.stdout}\n{run.stderr}"
    return run.stdout


def results(out: str) -> list[list[str]]:
    """The lines that train.py prints: which steps, the loss, d."""
    return [line.split("  ") for line in out.splitlines() if line.startswith("steps ")]


@pytest.mark.timeout(900)
def test_start_page_runs_as_written_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    mark, outs = uuid.uuid4().hex, []
    (tmp_path / "home").mkdir()
    try:
        for block in blocks_of(ROOT / "docs" / "start.md"):
            if block.title.endswith(".py"):
                (tmp_path / block.title).write_text(block.text)
            elif block.language == "sh":
                outs.append(shell(block.text, tmp_path, mark))
        assert_all_end(processes_with(MARK, mark))
    finally:
        for pid in processes_with(MARK, mark):
            os.kill(pid, signal.SIGKILL)
    alone, on_two, with_name, saved, resumed = outs
    ((steps, *expected),) = results(alone)
    assert steps == "steps 0 to 200"
    assert results(on_two)[0][0] == "steps 0 to 200"
    assert results(on_two)[0][1:] != expected, "other data"
    assert results(with_name)[0][0] == "steps 0 to 120"
    assert re.search(r"\bstep\b\W+120\b", with_name), "what `status` shows"
    assert "saved step 120" in saved
    assert results(resumed) == [["steps 120 to 200", *expected]]
