"""Finding the processes that a test began, whoever their parents are by now."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray

LIMIT_S = 30.0


def processes_with(name: str, value: str) -> list[int]:
    """Pids of other processes that inherited an environment variable with this value."""
    entry = f"{name}={value}".encode()
    return [pid for pid in _pids() if pid != os.getpid() and entry in _read(pid, "environ").split(b"\0")]


def assert_all_end(pids: Iterable[int]) -> None:
    """Wait a while for processes to end by themselves."""
    deadline = time.monotonic() + LIMIT_S
    alive = [pid for pid in pids if is_alive(pid)]
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = [pid for pid in alive if is_alive(pid)]
    assert not alive, f"left behind: { {pid: command(pid) for pid in alive} }"


def pid_of(actor: Any) -> int:
    """The process of an actor."""
    pid: int = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=LIMIT_S)
    return pid


def family_of(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = (_read(pid, f"task/{thread.name}/children").split() for thread in Path(f"/proc/{pid}/task").glob("*"))
    return [pid, *(each for found in children for child in found for each in family_of(int(child)))]


def command(pid: int) -> str:
    """A process's command line, or the title that it took; empty for one that has ended."""
    return _read(pid, "cmdline").replace(b"\0", b" ").decode().strip()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    stat = _read(pid, "stat")
    return bool(stat) and stat.rsplit(b")", 1)[1].split()[0] != b"Z"


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
