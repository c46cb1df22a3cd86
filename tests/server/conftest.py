from __future__ import annotations

import sys

import pytest

from stepwell.client.command_line import main
from tests.command_line import Cli, Run


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process, which spares the start of another."""

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
