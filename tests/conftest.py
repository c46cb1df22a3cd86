"""What all tests share: Ray's settings, hypothesis's profile and the command line."""

import os
import sys

import pytest
from hypothesis import settings

from tests.command_line import Cli, Run

# Ray reads these when it is first imported, which no test module has done yet. Its processes inherit them.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"

# Kernels are compiled where a test asks for it: for each rule it takes a second or two.
os.environ["STEPWELL_KERNEL"] = "eager"

# The first example of a test may compile a kernel; the time limit is each test's own, not each example's.
settings.register_profile("stepwell", deadline=None)
settings.load_profile("stepwell")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process, which spares the start of another."""
    from stepwell.client.command_line import main  # imports Ray

    def run(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["stepwell", *arguments])
        capfd.readouterr()
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capfd.readouterr()
        return Run(code, captured.out, captured.err)

    return run
