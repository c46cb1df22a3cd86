"""The demo's training processes, seen from the parent: started, listened to, and surely ended."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from . import events
from .settings import DemoError, DemoSettings, WorkerSettings

# Longer than a worker gives itself to leave the service in good order.
STOP_TIMEOUT_S = 25.0


class Workers:
    """A context: inside it the workers run, after it none is left, whatever happened.

    A worker lives as long as its stdin is open. The parent holds the other end, so that the workers end
    with the parent even where it is killed.

    Args:
        demo: the settings of the run.
        out: an existing folder for the logs.
        checkpoint: where rank 0 saves.
    """

    def __init__(self, demo: DemoSettings, *, out: Path, checkpoint: str) -> None:
        self._demo, self._out, self._checkpoint = demo, out, checkpoint
        self._processes: list[subprocess.Popen[str]] = []
        self._said: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
        self._rendezvous = tempfile.TemporaryDirectory(prefix="stepwell-demo-")

    def __enter__(self) -> Self:
        """Starts every worker."""
        try:
            for rank in range(self._demo.num_workers):
                self._start(rank)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends every worker, in a bounded time."""
        self._stop()

    def log(self, rank: int) -> Path:
        """Where a worker's stderr goes."""
        return self._out / f"worker-{rank}.log"

    def events(self) -> Iterator[events.Event]:
        """What rank 0 tells, until all workers have ended well.

        Raises:
            DemoError: a worker failed or died.
        """
        running = len(self._processes)
        while running:
            rank, line = self._said.get()
            if line is None:
                self._check_ended_well(rank)
                running -= 1
                continue
            event = events.decode(line)
            if isinstance(event, events.Failed):
                raise DemoError(event.message)
            yield event

    def _start(self, rank: int) -> None:
        settings = WorkerSettings(
            demo=self._demo,
            rank=rank,
            rendezvous=str(Path(self._rendezvous.name, "store")),
            checkpoint=self._checkpoint,
        )
        with self.log(rank).open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", settings.to_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={"GLOO_SOCKET_IFNAME": _loopback(), **os.environ},
            )
        self._processes.append(process)
        assert process.stdout is not None
        listener = threading.Thread(
            target=self._listen, args=(rank, process.stdout), name=f"worker-{rank}", daemon=True
        )
        listener.start()

    def _listen(self, rank: int, stdout: IO[str]) -> None:
        with stdout:
            for line in stdout:
                self._said.put((rank, line))
        self._said.put((rank, None))

    def _check_ended_well(self, rank: int) -> None:
        try:
            code = self._processes[rank].wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"worker {rank} is done but does not end (its log: {self.log(rank)})") from None
        if code == 0:
            return
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise DemoError(f"worker {rank} {how}: {last_line(self.log(rank))} (its log: {self.log(rank)})")

    def _stop(self) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.close()
            for process in self._processes:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            # Too slow, or asked for a second time.
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.wait()
        finally:
            self._rendezvous.cleanup()


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")


def _loopback() -> str:
    # The workers are on one machine; its host name need not resolve to anything.
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
