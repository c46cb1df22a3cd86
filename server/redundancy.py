"""What outlives a shard: what its keepers log before it votes, and copies of its state now and then."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..sharding.copies import CopiedPiece, pieces_of, read_copy, size_of, write_copy
from ..sharding.errors import ServiceTimeoutError, ShardLostError, StepwellError
from ..sharding.owned_state import Replicated
from ..sharding.push import Push, PushHeader, PushKey
from ..sharding.recovery import LoggedStep
from ..sharding.segments import ALIGNMENT, Segment, Span, allocate
from ..sharding.shard import Shard
from ..sharding.snapshot import Snapshot
from .arrangement import Arrangement
from .keeper import Copy, LoggedPush
from .keeper_line import Found, KeeperLine, Received
from .messages import pack_job, unpack_exchange, unpack_holdings, unpack_push
from .wire import from_wire
from .workers import workers_of

logger = logging.getLogger("stepwell")


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """A shard between two steps."""

    snapshot: Snapshot
    replicated: Replicated
    pieces: tuple[CopiedPiece, ...]


class Redundancy:
    """See *Note: What survives a shard* in docs/design.md. It lives on a shard actor's event loop.

    Args:
        index: The shard's index.
        log_steps: How many steps a log may hold: as many of each worker's gradients are kept.
        taken: The changes that the shard has taken, see :class:`Changes`.
        may_come_back: Whether the process may become what a lost one was.

    Attributes:
        may_come_back: As above.
        code: The job's compiled kernels; empty if they are not compiled, or there is no job.
        is_on: Whether there are keepers; without, nothing here does anything.
    """

    def __init__(
        self, index: int, *, log_steps: int, taken: Callable[[], tuple[str, ...]], may_come_back: bool = False
    ) -> None:
        self._index, self._log_steps, self._taken = index, log_steps, taken
        self._lines: dict[int, KeeperLine] = {}
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copies")
        self._memories: list[tuple[Segment, Tensor]] = []
        self.code = b""
        self._received: dict[int, tuple[PushKey, Received]] = {}
        self._copying: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()
        self._was_told = False
        self.may_come_back, self.is_on = may_come_back, False

    def arrange(self, to: Arrangement) -> None:
        """Be told who the keepers are, and which of them are to keep this shard; the next copies go to those."""
        lines = {}
        for place in to.keepers:
            line, is_near = self._lines.get(place.index), place.node == to.node
            if line is None or line.place.incarnation != place.incarnation:
                line = KeeperLine(self._index, place, is_near=is_near)
            line.is_chosen = place.index in to.chosen
            lines[place.index] = line
        self._lines, self.is_on = lines, True
        self._progress.set()

    def lay_out(self, code: bytes) -> None:
        """Take note of a new job; there is no copy of it yet."""
        self.code, self._memories = code, []
        for line in self._lines.values():
            line.reset()

    @property
    def _logging(self) -> list[KeeperLine]:
        return [line for line in self._lines.values() if line.logged_after is not None]

    # Steps

    def receive(self, header: PushHeader, push: Received) -> None:
        """Keep a push that was taken in as it came, until its step begins: of each rank the last one, no repeat."""
        known, _ = self._received.get(header.rank, (None, None))
        if self.is_on and known != header.key:
            self._received[header.rank] = header.key, push

    async def log(self, shard: Shard, pushes: Sequence[Push]) -> None:
        """Have a step logged that the shard is about to vote on.

        If there is no keeper that could, the step is taken all the same, and a copy is made after it.
        """
        received, self._received = self._received, {}
        may_be_taken = len(pushes) == shard.world.size or (pushes and shard.world.is_elastic)
        if not self._logging or not may_be_taken:
            return
        came = [received[push.header.rank][1] for push in pushes]
        entry = shard.timeline, shard.sequence + 1, came, tuple(shard.history.last_sums)
        await asyncio.gather(*(self._or_lose(line, line.log(*entry)) for line in self._logging))

    def kept_from(self, rank: int, sequence: int) -> int:
        """The first step whose gradients a rank must leave as they are, after step ``sequence`` was taken.

        The step after it if there is none.
        """
        lent = [line.lent_from(rank) for line in self._logging]
        return min((step for step in lent if step is not None), default=sequence + 1)

    async def room(self, shard: Shard, timeout_s: float) -> None:
        """Wait until every log has room for the next step.

        Raises:
            ServiceTimeoutError: If a copy is not made in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while any(line.num_logged(shard.sequence) >= self._log_steps for line in self._logging):
            self._progress.clear()
            left = deadline - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._progress.wait(), max(left, 0.001))
            except TimeoutError:
                raise ServiceTimeoutError(
                    f"shard {self._index}: its log is full, and no copy of its state was made within {timeout_s:g} s"
                ) from None

    # Copies

    def moment_if_due(self, shard: Shard, *, at_rest: bool = False) -> Moment | None:
        """Note the shard's state if it is time for a copy; in the thread for arithmetic, between two steps.

        Args:
            shard: The shard.
            at_rest: Whether no step is about to come, so that nothing need stay logged.
        """
        if not self.is_on or (self._copying is not None and not self._copying.done()):
            return None
        is_due = any(self._is_due(line, shard.sequence, at_rest) for line in self._lines.values())
        return self.moment(shard) if is_due else None

    def _is_due(self, line: KeeperLine, sequence: int, at_rest: bool) -> bool:
        every = self._log_steps // 2
        if line.logged_after is not None:
            return line.num_logged(sequence) >= (1 if at_rest else every)
        # One that cannot take a copy is not made one after every step.
        return line.is_chosen and (line.failed_at is None or not 0 <= sequence - line.failed_at < every)

    def moment(self, shard: Shard) -> Moment:
        """Note the shard's state."""
        snapshot = shard.snapshot()
        return Moment(snapshot, shard.replicated(), pieces_of(snapshot))

    def begin_copy(self, shard: Shard, moment: Moment) -> None:
        """Copy it while steps go on; those after it are logged."""
        self._begin_logs(moment)
        self._copying = asyncio.create_task(self._copy_or_tell(shard, moment))

    async def copy_now(self, shard: Shard, moment: Moment) -> None:
        """Copy it, and return when the keepers have it: what was before is of no more use."""
        if self._copying is not None:
            await asyncio.wait([self._copying])
        for line in self._lines.values():
            line.reset()
        self._begin_logs(moment)
        await self._copy_or_tell(shard, moment)

    async def admit(self, shard: Shard) -> None:
        """Tell the keepers whom the shard has admitted."""
        admitted = workers_of(shard)
        await asyncio.gather(*(self._or_lose(line, line.admit(*admitted)) for line in self._logging))

    def _begin_logs(self, moment: Moment) -> None:
        """Have what comes after logged by those who log nothing yet."""
        status = moment.snapshot.status
        for line in self._lines.values():
            if line.is_chosen and line.logged_after is None:
                line.begin(status.timeline, status.sequence)

    async def _copy_or_tell(self, shard: Shard, moment: Moment) -> None:
        try:
            await self._copy(shard, moment)
        except (StepwellError, RuntimeError) as error:
            moment.snapshot.close("it is not copied")
            for line in self._logging:
                self._lose(line, str(error), moment.snapshot.status.sequence)
        finally:
            self._progress.set()

    async def _copy(self, shard: Shard, moment: Moment) -> None:
        """Write it to memory of this node, then give it to all keepers."""
        loop, status = asyncio.get_running_loop(), moment.snapshot.status
        await asyncio.gather(*(self._or_lose(line, line.await_begin()) for line in self._logging))
        if not self._logging:
            moment.snapshot.close("nobody would have it")
            return
        segment, memory = await loop.run_in_executor(self._threads, self._memory, size_of(moment.pieces))
        await loop.run_in_executor(self._threads, write_copy, moment.snapshot, memory)
        workers, left = workers_of(shard)
        kept = Copy(
            pack_job(shard.spec),
            self.code,
            status,
            moment.replicated,
            workers,
            left,
            self._taken(),
            moment.pieces,
            segment.address,
        )
        asked = self._logging
        await asyncio.gather(*(self._or_lose(line, line.keep(kept, memory), status.sequence) for line in asked))
        # Who has not said that it has this copy may have it or the one before: then neither is written over.
        self._memories = [*self._memories, (segment, memory)] if self._logging == asked else []
        if any(line.is_chosen for line in self._logging):
            self._was_told = False
            for line in self._logging:
                if not line.is_chosen:
                    line.forget()

    def _memory(self, size_bytes: int) -> tuple[Segment, Tensor]:
        """Memory that no keeper needs: of the copy before the last one, if that was of this size.

        Keepers on other nodes need none of it.
        """
        num_needed = int(any(line.is_near for line in self._logging))
        while len(self._memories) > num_needed:
            segment, memory = self._memories.pop(0)
            if len(memory) == size_bytes:
                return segment, memory
        segment, (memory,) = allocate([(size_bytes, torch.uint8)])
        return segment, memory

    async def _or_lose(self, line: KeeperLine, call: Awaitable[None], failed_at: int | None = None) -> None:
        """Await what a keeper is asked; without its answer go on without it until the next copy."""
        try:
            await call
        except StepwellError as error:
            self._lose(line, str(error), failed_at)

    def _lose(self, line: KeeperLine, why: str, failed_at: int | None) -> None:
        line.forget()
        line.failed_at = failed_at
        self._progress.set()
        if not self._was_told:
            logger.warning("shard %d: keeper %d keeps nothing for now: %s", self._index, line.place.index, why)
        self._was_told = True

    # Coming back

    async def fetch(self) -> list[tuple[KeeperLine, Found]]:
        """What keepers have of this shard, the most first.

        Raises:
            ShardLostError: If it has not been told yet who they are, as it was started again since the others were.
        """
        if self.may_come_back and not self.is_on:
            raise ShardLostError(f"shard {self._index} was started again, and does not know its keepers yet")
        fetched = [(line, await line.fetch()) for line in self._lines.values()]
        found = [(line, each) for line, each in fetched if each is not None]
        return sorted(found, key=lambda of: of[1].reach, reverse=True)

    async def steps(self, line: KeeperLine, found: Found) -> AsyncIterator[LoggedStep]:
        """The steps of a log, one after the other, each with the sums that the next one brought."""
        for entry, after in itertools.zip_longest(found.entries, found.entries[1:]):
            pushes = [await _push_of(line, push) for push in entry.pushes]
            yield LoggedStep(tuple(pushes), () if after is None else after.last_sums)

    def come_back(self, found: Sequence[tuple[KeeperLine, Found]]) -> None:
        """Go on with the logs of the shard's process before this one, where they have as much as the first of them."""
        for line, each in found:
            if each.reach == found[0][1].reach:
                line.go_on_with(each)


def rebuild(shard: Shard, kept: Copy, segment: Segment) -> None:
    """Give a shard that was laid out as ``kept`` says the state of then, which lies in ``segment``."""
    memory = segment.tensor(Span(ALIGNMENT, size_of(kept.pieces), torch.uint8))
    shard.rebuild(read_copy(memory, kept.pieces, kept.status), kept.replicated, {})
    for rank, worker in kept.workers.items():
        shard.admit(rank, worker.incarnation, unpack_holdings(worker.holdings, shard.spec.params))
    for rank in kept.left:
        shard.members.leave(rank)


async def _push_of(line: KeeperLine, logged: LoggedPush) -> Push:
    segment = await line.segment(logged.gradient.address)
    gradient = tuple(map(segment.tensor, logged.gradient.spans))
    header = unpack_push(unpack_exchange(logged.request).push)
    return Push(header, gradient, {index: from_wire(wire) for index, wire in logged.reloaded.items()})
