"""What all tests share: Ray's settings, hypothesis's profile, what ``--fast-paths`` turns on, and the command line."""

import os
import sys

import pytest
from hypothesis import settings

from stepwell.client import overlap
from stepwell.client.optimizer import ServiceOptimizer
from tests.command_line import Cli, Run

# Ray reads these when it is first imported, which no test module has done yet. Its processes inherit them.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"

# The first example of a test may compile a kernel; the time limit is each test's own, not each example's.
settings.register_profile("stepwell", deadline=None)
settings.load_profile("stepwell")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--fast-paths``: what is exact with eager kernels and copies in ``step()`` is so on the fast paths, too."""
    parser.addoption("--fast-paths", action="store_true", help="compiled kernels, gradients copied within backward")


def pytest_configure(config: pytest.Config) -> None:
    """Kernels are compiled where a test asks for it, since for each rule it takes a second or two; or everywhere."""
    os.environ["STEPWELL_KERNEL"] = "compiled" if config.getoption("--fast-paths") else "eager"


@pytest.fixture(autouse=True)
def _fast_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each optimizer that says nothing else overlaps, however small its parameters."""
    if request.config.getoption("--fast-paths"):
        monkeypatch.setattr(overlap, "MIN_NUMEL", 1)
        monkeypatch.setitem(ServiceOptimizer.__init__.__kwdefaults__ or {}, "overlap", True)


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
