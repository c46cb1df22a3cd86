"""The `stepwell` command as tests call it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable

LIMIT_S = 100


@dataclasses.dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str

    def require_error(self, *parts: str) -> None:
        """One line on stderr that holds ``parts``, nothing on stdout."""
        assert self.code == 1, self
        assert self.out == ""
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        for part in parts:
            assert part in self.err


Cli = Callable[..., Run]


def cli_process(*arguments: str) -> Run:
    command = [sys.executable, "-c", "from stepwell.client.command_line import main; main()", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    return Run(run.returncode, run.stdout, run.stderr)
