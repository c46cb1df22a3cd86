"""What a shard has done, counted as it goes and published once a second: no step waits for that."""

from __future__ import annotations

import collections
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from ..sharding.chronicle import last_row
from ..sharding.errors import StepwellError
from ..sharding.push import Push
from ..sharding.shard import Shard
from ..sharding.vote import Decision
from .collective import Generation
from .metrics import Instruments
from .outcomes import Outcome

PERIOD_S = 1.0
MAX_UNPUBLISHED = 4096
"""Steps whose seconds are kept until they are published."""


class Tally:
    """Counts of one shard's process. Written on its event loop, read on another thread.

    Attributes:
        totals: By the metric's name.
        seconds: By phase, of steps that are not published yet, the oldest first.
    """

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.seconds: collections.deque[Mapping[str, float]] = collections.deque(maxlen=MAX_UNPUBLISHED)

    def take(self, push: Push) -> None:
        """Count a push that is taken."""
        self._add("stepwell_pushes_total")
        self._add("stepwell_pushed_bytes_total", sum(part.nbytes for part in push.gradient))
        self._add("stepwell_retries_total", int(push.header.attempt > 0))

    def refuse(self) -> None:
        """Count a push that is answered with an error."""
        self._add("stepwell_refused_pushes_total")

    def end(self, outcome: Outcome, seconds: Mapping[str, float]) -> None:
        """Count a step that is over, with its seconds by phase."""
        if isinstance(outcome, StepwellError):
            return
        if outcome.decision is Decision.ABORT:
            self._add("stepwell_aborted_steps_total")
            return
        self._add("stepwell_steps_total")
        self._add("stepwell_skipped_steps_total", int(outcome.decision is Decision.SKIP))
        self.seconds.append(seconds)

    def _add(self, name: str, more: int = 1) -> None:
        self.totals[name] = self.totals.get(name, 0) + more


class ShardMeter:
    """Publishes one shard's metrics.

    Args:
        service: The service's name.
        shard: The shard's index; the first one publishes what all have in common.
        tally: What it has done.
        read: The shard, None without a job, and its group's generation.
    """

    def __init__(
        self, service: str, shard: int, tally: Tally, read: Callable[[], tuple[Shard | None, Generation]]
    ) -> None:
        self._instruments = Instruments(service=service, shard=str(shard))
        self._is_first, self._tally, self._read = shard == 0, tally, read

    def begin(self) -> None:
        """Publish every second from now on, on a thread of its own, until the process ends."""
        threading.Thread(target=self._publish_for_ever, name="metrics", daemon=True).start()

    def publish(self) -> None:
        """Publish what has come up since the last time."""
        instruments, (shard, generation) = self._instruments, self._read()
        instruments.count(dict(self._tally.totals))
        while self._tally.seconds:
            for phase, seconds in self._tally.seconds.popleft().items():
                instruments.observe("stepwell_step_seconds", seconds, phase=phase)
        instruments.set("stepwell_epoch", generation.epoch)
        instruments.set("stepwell_generation", generation.number)
        instruments.set("stepwell_process_bytes", process_bytes())
        if shard is not None:
            instruments.set("stepwell_state_bytes", shard.buffers.size_bytes)
            instruments.set("stepwell_step", shard.history.num_steps)
            instruments.set("stepwell_waiting_pushes", shard.world.size - len(shard.missing_ranks))
            if self._is_first:
                self._publish_common(last_row(shard.history.chronicle.columns(1)))

    def _publish_common(self, row: Mapping[str, float]) -> None:
        for column, name in (("loss", "stepwell_loss"), ("grad_norm", "stepwell_gradient_norm")):
            if column in row:
                self._instruments.set(name, row[column])
        for column, value in row.items():
            match = re.fullmatch(r"(d|lr)(?:\[(\d+)\])?", column)
            if match is not None:
                name = "stepwell_d" if match[1] == "d" else "stepwell_learning_rate"
                self._instruments.set(name, value, group=match[2] or "0")

    def _publish_for_ever(self) -> None:
        pause = threading.Event()
        while not pause.wait(PERIOD_S):
            self.publish()


def process_bytes() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
