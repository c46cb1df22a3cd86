"""A keeper: the process that has what a shard needs to come back, should the shard's own process die.

It computes nothing and maps nothing. Copies and gradients lie in memory that shards and workers have made; the keeper
holds it open, so that it outlives them, and tells who comes back where it is.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..sharding.copies import CopiedPiece
from ..sharding.owned_state import Replicated
from ..sharding.reports import ShardStatus
from ..sharding.segments import Address, hold_segment
from .messages import WireTensor
from .workers import Worker


@dataclasses.dataclass(frozen=True, slots=True)
class LoggedPush:
    """One rank's push, as it came to the shard; see :meth:`ShardActor.exchange`.

    Attributes:
        request: Its header, and where things lie.
        gradient, reloaded: What came with it.
        memory: The memory that ``request`` says the gradient lies in; None if it came with it.
    """

    request: bytes
    gradient: Sequence[WireTensor]
    reloaded: Mapping[int, WireTensor]
    memory: Address | None


@dataclasses.dataclass(frozen=True, slots=True)
class LogEntry:
    """A step that a shard is about to vote on.

    Attributes:
        timeline, sequence: Which step.
        pushes: All ranks', in rank order.
        last_sums: The sums of the step before, if this timeline has had one.
    """

    timeline: int
    sequence: int
    pushes: tuple[LoggedPush, ...]
    last_sums: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """A shard as it was between two steps.

    Attributes:
        job: Its job, packed.
        code: The job's compiled kernels.
        status, replicated: Where it stood.
        workers: Whom it had admitted, by rank.
        left: Which of them had said goodbye.
        requests: The changes that it had taken.
        pieces: Where its slots lie in the memory.
        memory: Where that is.
    """

    job: bytes
    code: bytes
    status: ShardStatus
    replicated: Replicated
    workers: Mapping[int, Worker]
    left: frozenset[int]
    requests: tuple[str, ...]
    pieces: tuple[CopiedPiece, ...]
    memory: Address


class _Held:
    """Memory of another process, kept alive."""

    def __init__(self, address: Address) -> None:
        self._fd = hold_segment(address)
        self.address = dataclasses.replace(address, pid=os.getpid(), fd=self._fd)

    def close(self) -> None:
        os.close(self._fd)


class _Log:
    """The steps of one shard after a certain one, none left out."""

    def __init__(self, timeline: int, sequence: int) -> None:
        self._timeline, self._after = timeline, sequence
        self.entries: list[LogEntry] = []

    def add(self, entry: LogEntry) -> bool:
        """Add a step or another try at it; whether it follows."""
        if entry.timeline != self._timeline or not self._after < entry.sequence <= self._after + len(self.entries) + 1:
            return False
        self.entries = [*self.entries[: entry.sequence - self._after - 1], entry]
        return True

    def cut(self, timeline: int, sequence: int) -> bool:
        """Drop steps up to one; whether it is one that the log can begin after."""
        if timeline != self._timeline or not self._after <= sequence <= self._after + len(self.entries):
            return False
        self.entries, self._after = self.entries[sequence - self._after :], sequence
        return True


class Keeper:
    """Keeps copies and logs for shards of its node. Every method is called through Ray, by the shards alone."""

    def __init__(self) -> None:
        self._copies: dict[int, Copy] = {}
        self._logs: dict[int, _Log] = {}
        self._held: dict[bytes, _Held] = {}

    async def begin(self, shard: int, timeline: int, sequence: int) -> None:
        """Begin a shard's log after this step; the copy that it follows is still to come, and there is none before."""
        self._copies.pop(shard, None)
        self._logs[shard] = _Log(timeline, sequence)
        self._let_go()

    async def keep(self, shard: int, copy: Copy) -> bool:
        """Take a shard's copy for the one before; what its log has of steps before is of no more use.

        Returns:
            Whether the log follows it; else it was not taken.

        Raises:
            SegmentError: If the copy's memory cannot be reached.
        """
        self._hold(copy.memory)  # first: it may be gone with its owner, and then nothing is to have changed
        log = self._logs.get(shard)
        if log is None or not log.cut(copy.status.timeline, copy.status.sequence):
            return False
        self._copies[shard] = copy
        self._let_go()
        return True

    async def forget(self, shard: int) -> None:
        """Drop what there is of a shard: it goes on without."""
        self._copies.pop(shard, None)
        self._logs.pop(shard, None)
        self._let_go()

    async def admit(self, shard: int, workers: Mapping[int, Worker], left: frozenset[int]) -> None:
        """Note whom a shard has admitted since its copy was made."""
        if shard in self._copies:
            self._copies[shard] = dataclasses.replace(self._copies[shard], workers=workers, left=left)

    async def log(self, shard: int, entry: LogEntry) -> bool:
        """Add a step to a shard's log, in place of another try at it.

        Returns:
            Whether it follows what is there; else it was not added.

        Raises:
            SegmentError: If a gradient's memory cannot be reached.
        """
        for push in entry.pushes:
            if push.memory is not None:
                self._hold(push.memory)
        log = self._logs.get(shard)
        return log is not None and log.add(entry)

    async def fetch(self, shard: int) -> tuple[Copy, list[LogEntry]] | None:
        """A shard's copy and log, for the shard itself when it comes back; None if there is none."""
        if shard not in self._copies:
            return None
        copy = self._copies[shard]
        here = dataclasses.replace(copy, memory=self._held[copy.memory.token].address)
        return here, [self._reachable(entry) for entry in self._logs[shard].entries]

    def _reachable(self, entry: LogEntry) -> LogEntry:
        pushes = (
            push if push.memory is None else dataclasses.replace(push, memory=self._held[push.memory.token].address)
            for push in entry.pushes
        )
        return dataclasses.replace(entry, pushes=tuple(pushes))

    def _hold(self, address: Address) -> None:
        if address.token not in self._held:
            self._held[address.token] = _Held(address)

    def _let_go(self) -> None:
        """Close what no copy and no entry lies in any more."""
        logged = (push.memory for log in self._logs.values() for entry in log.entries for push in entry.pushes)
        needed = {copy.memory.token for copy in self._copies.values()}
        needed |= {memory.token for memory in logged if memory is not None}
        for token in self._held.keys() - needed:
            self._held.pop(token).close()
