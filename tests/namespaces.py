"""Linux's namespaces, as containers are made of: what lives in them lives no longer than a process that holds them."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

HOLD = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--net", "--pid", "--mount", "--uts", "--mount-proc", "--fork", "--kill-child"),
)
"""Before a command: it gets namespaces of its own, in which it is process 1, and ends with whoever started it."""
LIMIT_S = 30.0


@functools.cache
def why_none() -> str | None:
    """Why there can be none here; None if there can."""
    missing = [tool for tool in ("setpriv", "unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    trial = subprocess.run([*HOLD, "ip", "link", "add", "trial", "type", "bridge"], capture_output=True, text=True)
    return None if trial.returncode == 0 else f"needs root and bridges: {trial.stderr.strip()}"


class Namespaces:
    """Network, processes, mounts and a host's name apart from this machine's, until :meth:`close`.

    Args:
        setup: What a shell does there first.

    Attributes:
        pid: The process that holds them, as seen from outside.
    """

    def __init__(self, setup: str) -> None:
        self._started: list[subprocess.Popen[str]] = []
        script = f"{setup}\necho ready\nexec sleep infinity"
        self._holder = subprocess.Popen([*HOLD, "sh", "-ec", script], stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        with self._holder.stdout as told:
            assert told.readline() == "ready\n", f"could not be set up: {setup}"
        holder = self._holder.pid
        self.pid = int(Path(f"/proc/{holder}/task/{holder}/children").read_text())

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command there; it ends with the namespaces at the latest."""
        where = f"nsenter --target {self.pid} --net --pid --mount --uts --".split()
        process = subprocess.Popen([*where, *command], text=True, **options)
        self._started.append(process)
        return process

    def network(self, script: str) -> None:
        """Run a shell's commands in their network, and on this machine else."""
        where = f"nsenter --target {self.pid} --net --".split()
        subprocess.run([*where, "sh", "-ec", script], check=True, timeout=LIMIT_S)

    def close(self) -> None:
        """Kill whatever lives there."""
        self._holder.kill()
        for process in (self._holder, *self._started):
            process.wait(LIMIT_S)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
