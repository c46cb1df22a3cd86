"""A keeper: the process that has what a shard needs to come back, should the shard's own process or node die.

It computes nothing and maps nothing. Copies and gradients of shards on its node lie in memory that shards and workers
have made; the keeper holds it open, so that it outlives them. Those of shards on other nodes are sent, and lie in
memory of its own. Either way a token names the memory, and who comes back maps it, or reads it from afar.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
import uuid
from collections.abc import Mapping

import numpy as np
import ray
from numpy.typing import NDArray
from torch import Tensor

from ..sharding.copies import CopiedPiece
from ..sharding.errors import SegmentError
from ..sharding.segments import ALIGNMENT, Address, Placement, hold_segment, make_memory
from .estate import Estate
from .wire import WireTensor
from .workers import Worker


@dataclasses.dataclass(frozen=True, slots=True)
class LoggedPush:
    """One rank's push, as it came to the shard; see :meth:`ShardActor.exchange`.

    Attributes:
        request: Its header, packed.
        gradient: Where its gradient lies.
        reloaded: What came with it.
    """

    request: bytes
    gradient: Placement
    reloaded: Mapping[int, WireTensor]

    @property
    def size_bytes(self) -> int:
        """Bytes of the gradient."""
        return sum(span.numel * span.dtype.itemsize for span in self.gradient.spans)


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
class Copy(Estate):
    """A shard as it was between two steps.

    Attributes:
        pieces: Where its slots lie in the memory.
        memory: Where that is.
    """

    pieces: tuple[CopiedPiece, ...]
    memory: Address


@dataclasses.dataclass(frozen=True, slots=True)
class Holding:
    """What a keeper has of one shard.

    Attributes:
        step: Steps in the copy; None while the first one is being made.
        copied_at: When the copy was taken in, seconds since 1970; None without one.
        num_logged: Steps in the log.
        size_bytes: Bytes of copy and logged gradients.
    """

    step: int | None
    copied_at: float | None
    num_logged: int
    size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """Memory that is kept alive: another process's, or the keeper's own, which was ``made_for`` what a shard sends."""

    fd: int
    address: Address
    made_for: int | None = None

    @classmethod
    def of_other(cls, address: Address) -> _Held:
        fd = hold_segment(address)
        return cls(fd, dataclasses.replace(address, pid=os.getpid(), fd=fd))

    def named(self, token: bytes) -> _Held:
        """The same memory under another name."""
        os.pwrite(self.fd, token, 0)
        return dataclasses.replace(self, address=dataclasses.replace(self.address, token=token))


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
    """Keeps copies and logs for shards. Every method is called through Ray, on its event loop, by the shards.

    Only :meth:`who`, :meth:`linger` and :meth:`holdings` are the coordinator's.
    """

    def __init__(self) -> None:
        self._incarnation = uuid.uuid4().hex
        self._copies: dict[int, Copy] = {}
        self._copied_at: dict[int, float] = {}
        self._logs: dict[int, _Log] = {}
        self._held: dict[bytes, _Held] = {}
        self._arriving: set[bytes] = set()
        self._spare: dict[int, list[_Held]] = {}

    async def who(self) -> tuple[str, str]:
        """Ray's id of the keeper's node, and a name of its process."""
        return ray.get_runtime_context().get_node_id(), self._incarnation

    async def linger(self) -> None:
        """Never answer: who waits for this is told when the keeper's process ends."""
        await asyncio.Event().wait()

    async def holdings(self) -> dict[int, Holding]:
        """What there is, by shard."""
        return {shard: self._holding(shard) for shard in self._logs}

    # Copies and logs

    async def begin(self, shard: int, timeline: int, sequence: int) -> None:
        """Begin a shard's log after this step; the copy that it follows is still to come, and there is none before."""
        self._drop(shard)
        self._logs[shard] = _Log(timeline, sequence)

    async def keep(self, shard: int, copy: Copy) -> bool:
        """Take a shard's copy for the one before; what its log has of steps before is of no more use.

        Returns:
            Whether the log follows it; else it was not taken.

        Raises:
            SegmentError: If the copy's memory cannot be reached.
        """
        self._hold(copy.memory)  # first: it may be gone with its owner, and then nothing is to have changed
        log = self._logs.get(shard)
        is_kept = log is not None and log.cut(copy.status.timeline, copy.status.sequence)
        if is_kept:
            self._copies[shard], self._copied_at[shard] = copy, time.time()
        self._let_go()
        if log is None or not log.entries:
            self._free(shard)  # the shard is at rest: nothing is about to come
        return is_kept

    async def forget(self, shard: int) -> None:
        """Drop what there is of a shard: it goes on without."""
        self._drop(shard)

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
            self._hold(push.gradient.address)
        log = self._logs.get(shard)
        num_logged = 0 if log is None else len(log.entries)
        is_logged = log is not None and log.add(entry)
        if log is None or len(log.entries) <= num_logged:
            self._let_go()  # of the tries that it replaces, or of itself
        return is_logged

    async def fetch(self, shard: int) -> tuple[Copy, list[LogEntry]] | None:
        """A shard's copy and log, for the shard itself when it comes back; None if there is none."""
        if shard not in self._copies:
            return None
        copy = self._copies[shard]
        here = dataclasses.replace(copy, memory=self._held[copy.memory.token].address)
        return here, [self._reachable(entry) for entry in self._logs[shard].entries]

    # Memory of shards on other nodes

    async def put(self, shard: int, memory: Address, offset: int, piece: NDArray[np.uint8]) -> None:
        """Take a piece of what a shard cannot show, into memory of the keeper's own; the first piece makes room.

        Args:
            shard: The shard's index.
            memory: Names what is sent, with its size: :meth:`keep` and :meth:`log` then know it by its token.
            offset: Where the piece belongs, in bytes.
            piece: ``(numel,)`` uint8.

        Raises:
            SegmentError: If there is not enough memory, or the first piece was dropped again.
        """
        if offset == ALIGNMENT:
            self._held[memory.token] = await self._room(shard, memory)
            self._arriving.add(memory.token)
        if memory.token not in self._held:
            raise SegmentError(f"shard {shard}: expected the next piece of what was begun, got one of what was dropped")
        os.pwrite(self._held[memory.token].fd, piece.data, offset)

    async def read(self, token: bytes, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """A piece of memory that :meth:`fetch` named, for a shard on another node.

        Raises:
            SegmentError: If nothing of this name is kept.
        """
        if token not in self._held:
            raise SegmentError("expected memory that is kept here, got another's name; fetch it again")
        return np.frombuffer(os.pread(self._held[token].fd, size_bytes, offset), np.uint8)

    # Within

    def _holding(self, shard: int) -> Holding:
        copy, entries = self._copies.get(shard), self._logs[shard].entries
        logged_bytes = sum(push.size_bytes for entry in entries for push in entry.pushes)
        if copy is None:
            return Holding(None, None, len(entries), logged_bytes)
        size_bytes = logged_bytes + copy.memory.size_bytes
        return Holding(copy.status.step, self._copied_at[shard], len(entries), size_bytes)

    def _reachable(self, entry: LogEntry) -> LogEntry:
        def here(push: LoggedPush) -> LoggedPush:
            address = self._held[push.gradient.address.token].address
            return dataclasses.replace(push, gradient=dataclasses.replace(push.gradient, address=address))

        return dataclasses.replace(entry, pushes=tuple(map(here, entry.pushes)))

    def _hold(self, address: Address) -> None:
        if address.token not in self._held:
            self._held[address.token] = _Held.of_other(address)
        self._arriving.discard(address.token)

    async def _room(self, shard: int, memory: Address) -> _Held:
        """Memory for what a shard sends: some that it has had before, if there is some of this size."""
        spare = self._spare.get(shard, [])
        for held in spare:
            if held.address.size_bytes == memory.size_bytes:
                spare.remove(held)
                return held.named(memory.token)
        address, fd = await asyncio.to_thread(make_memory, memory.size_bytes)
        return _Held(fd, address, made_for=shard).named(memory.token)

    def _drop(self, shard: int) -> None:
        """Drop a shard's copy, its log, and what had begun to arrive."""
        self._copies.pop(shard, None)
        self._logs.pop(shard, None)
        self._arriving -= {token for token in self._arriving if self._held[token].made_for == shard}
        self._let_go()
        self._free(shard)

    def _let_go(self) -> None:
        """Close what no copy and no entry lies in any more, or keep it for what the shard sends next."""
        logged = (
            push.gradient.address for log in self._logs.values() for entry in log.entries for push in entry.pushes
        )
        needed = {copy.memory.token for copy in self._copies.values()}
        needed |= {memory.token for memory in logged}
        for token in self._held.keys() - needed - self._arriving:
            held = self._held.pop(token)
            if held.made_for is None:
                os.close(held.fd)
            else:
                self._spare.setdefault(held.made_for, []).append(held)

    def _free(self, shard: int) -> None:
        for held in self._spare.pop(shard, []):
            os.close(held.fd)
