"""A shard's line to its keeper: what it logs before it votes, and copies of its state now and then."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..sharding.copies import CopiedPiece, pieces_of, read_copy, size_of, write_copy
from ..sharding.errors import ServiceError, ServiceTimeoutError, StepwellError
from ..sharding.owned_state import Replicated
from ..sharding.push import Push, PushHeader
from ..sharding.recovery import LoggedStep
from ..sharding.segments import ALIGNMENT, Segment, Span, allocate, open_segment
from ..sharding.shard import Shard
from ..sharding.snapshot import Snapshot
from .calls import gather
from .keeper import Copy, LogEntry, LoggedPush
from .messages import from_wire, pack_holdings, pack_job, unpack_exchange, unpack_holdings, unpack_push
from .workers import Worker

logger = logging.getLogger("stepwell")

KEEPER_TIMEOUT_S = 60.0


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
        keeper: Handle of the keeper; None for none, and then nothing here does anything.
        log_steps: How many steps the log may hold: as many of each worker's gradients are kept.
        taken: The changes that the shard has taken, see :class:`Changes`.
        was_restarted: Whether the process was started in place of a lost one.

    Attributes:
        may_come_back: Whether it may become what the lost one was.
        code: The job's compiled kernels; empty if they are not compiled, or there is no job.
    """

    def __init__(
        self,
        index: int,
        keeper: Any | None,
        *,
        log_steps: int,
        taken: Callable[[], tuple[str, ...]],
        was_restarted: bool = False,
    ) -> None:
        self._index, self._keeper, self._log_steps, self._taken = index, keeper, log_steps, taken
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copies")
        self._memories: list[tuple[Segment, Tensor]] = []
        self.code = b""
        self._received: dict[tuple[int, str, int], LoggedPush] = {}
        self._logged_after: tuple[int, int] | None = None
        self._copying: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()
        self._was_told = False
        self.may_come_back = keeper is not None and was_restarted

    @property
    def is_on(self) -> bool:
        """Whether there is a keeper."""
        return self._keeper is not None

    def lay_out(self, code: bytes) -> None:
        """Take note of a new job; there is no copy of it yet."""
        self.code, self._logged_after, self._memories = code, None, []

    # Steps

    def receive(self, header: PushHeader, push: LoggedPush) -> None:
        """Keep a push as it came, until its step begins."""
        if self.is_on:
            self._received[header.rank, header.incarnation, header.attempt] = push

    async def log(self, shard: Shard, pushes: Sequence[Push]) -> None:
        """Have a step logged that the shard is about to vote on.

        If there is no keeper that could, the step is taken all the same, and a copy is made after it.
        """
        received, self._received = self._received, {}
        if self._logged_after is None or len(pushes) < shard.spec.world_size:
            return
        keys = ((push.header.rank, push.header.incarnation, push.header.attempt) for push in pushes)
        last = tuple(shard.history.last_sums)
        entry = LogEntry(shard.timeline, shard.sequence + 1, tuple(received[key] for key in keys), last)
        try:
            is_logged = await self._ask("log", self._index, entry)
        except StepwellError as error:
            self._lose(str(error))
        else:
            if not is_logged:
                self._lose("the keeper was started again")

    def kept_from(self, sequence: int) -> int:
        """The first step whose gradients are needed, after step ``sequence`` was taken; the one after it if none is."""
        return sequence + 1 if self._logged_after is None else min(self._logged_after[1], sequence) + 1

    async def room(self, shard: Shard, timeout_s: float) -> None:
        """Wait until the log has room for the next step.

        Raises:
            ServiceTimeoutError: If a copy is not made in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._logged_after is not None and shard.sequence - self._logged_after[1] >= self._log_steps:
            self._progress.clear()
            left = deadline - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._progress.wait(), max(left, 0.001))
            except TimeoutError:
                raise ServiceTimeoutError(
                    f"shard {self._index}: its log is full, and no copy of its state was made within {timeout_s:g} s"
                ) from None

    # Copies

    def moment_if_due(self, shard: Shard) -> Moment | None:
        """Note the shard's state if it is time for a copy; in the thread for arithmetic, between two steps."""
        if not self.is_on or (self._copying is not None and not self._copying.done()):
            return None
        after = self._logged_after
        is_due = after is None or shard.sequence - after[1] >= self._log_steps // 2
        return self.moment(shard) if is_due else None

    def moment(self, shard: Shard) -> Moment:
        """Note the shard's state."""
        snapshot = shard.snapshot()
        return Moment(snapshot, shard.replicated(), pieces_of(snapshot))

    def begin_copy(self, shard: Shard, moment: Moment) -> None:
        """Copy it while steps go on; those after it are logged."""
        self._begin_log(moment)
        self._copying = asyncio.create_task(self._copy_or_tell(shard, moment))

    async def copy_now(self, shard: Shard, moment: Moment) -> None:
        """Copy it, and return when the keeper has it: what was before is of no more use."""
        if not self.is_on:
            return
        if self._copying is not None:
            await asyncio.wait([self._copying])
        self._logged_after = None
        self._begin_log(moment)
        await self._copy_or_tell(shard, moment)

    async def admit(self, shard: Shard) -> None:
        """Tell the keeper whom the shard has admitted."""
        if self._logged_after is not None:
            try:
                await self._ask("admit", self._index, *_workers_of(shard))
            except StepwellError as error:
                self._lose(str(error))

    def _begin_log(self, moment: Moment) -> None:
        """Log what comes after, if nothing is logged yet. The keeper takes calls in the order in which they come."""
        if self._logged_after is None and self._keeper is not None:
            at = moment.snapshot.status.timeline, moment.snapshot.status.sequence
            self._keeper.begin.remote(self._index, *at)
            self._logged_after = at

    async def _copy_or_tell(self, shard: Shard, moment: Moment) -> None:
        try:
            await self._copy(shard, moment)
        except (StepwellError, RuntimeError) as error:
            moment.snapshot.close("it is not copied")
            self._lose(str(error))
        finally:
            self._progress.set()

    async def _copy(self, shard: Shard, moment: Moment) -> None:
        loop, status = asyncio.get_running_loop(), moment.snapshot.status
        segment, memory = await loop.run_in_executor(self._threads, self._memory, size_of(moment.pieces))
        await loop.run_in_executor(self._threads, write_copy, moment.snapshot, memory)
        workers, left = _workers_of(shard)
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
        if not await self._ask("keep", self._index, kept):
            raise ServiceError("the keeper was started again")
        self._memories.append((segment, memory))
        self._logged_after = status.timeline, status.sequence
        self._was_told = False

    def _memory(self, size_bytes: int) -> tuple[Segment, Tensor]:
        """Memory that the keeper does not need: of the copy before the last one, if that was of this size."""
        while len(self._memories) > 1:
            segment, memory = self._memories.pop(0)
            if len(memory) == size_bytes:
                return segment, memory
        segment, (memory,) = allocate([(size_bytes, torch.uint8)])
        return segment, memory

    def _lose(self, why: str) -> None:
        """Go on without a copy until the next one."""
        if self._logged_after is not None and self._keeper is not None:
            self._keeper.forget.remote(self._index)  # or a shard would come back as it was long ago
        self._logged_after = None
        self._progress.set()
        if not self._was_told:
            logger.warning("shard %d: what it does would be lost with it for now: %s", self._index, why)
        self._was_told = True

    # Coming back

    async def fetch(self) -> tuple[Copy, list[LogEntry]] | None:
        """What the keeper has of this shard."""
        if self._keeper is None:
            return None
        found: tuple[Copy, list[LogEntry]] | None = await self._ask("fetch", self._index)
        return found

    def come_back(self, kept: Copy) -> None:
        """Go on with the log of the shard's process before this one."""
        self._logged_after = kept.status.timeline, kept.status.sequence

    async def _ask(self, method: str, *args: Any) -> Any:
        call = getattr(self._keeper, method).remote(*args)
        return (await gather([call], timeout_s=KEEPER_TIMEOUT_S, what=f"the keeper of shard {self._index}"))[0]


def rebuild(shard: Shard, kept: Copy) -> None:
    """Give a shard that was laid out as ``kept`` says the state of then."""
    segment = open_segment(kept.memory)
    memory = segment.tensor(Span(ALIGNMENT, size_of(kept.pieces), torch.uint8))
    source = read_copy(memory, kept.pieces, kept.status)
    shard.rebuild(source, kept.replicated, {})
    for rank, worker in kept.workers.items():
        shard.admit(rank, worker.incarnation, unpack_holdings(worker.holdings, shard.spec.params))
    for rank in kept.left:
        shard.members.leave(rank)


def logged_steps(entries: Sequence[LogEntry]) -> list[LoggedStep]:
    """The steps of a log, each with the sums that the next one brought."""
    return [
        LoggedStep(tuple(map(_push_of, entry.pushes)), () if after is None else after.last_sums)
        for entry, after in itertools.zip_longest(entries, entries[1:])
    ]


def _push_of(logged: LoggedPush) -> Push:
    exchange = unpack_exchange(logged.request)
    gradient: tuple[Tensor, ...] = tuple(map(from_wire, logged.gradient))
    if logged.memory is not None:
        assert exchange.gradient is not None, "it lies in memory"
        gradient = tuple(map(open_segment(logged.memory).tensor, exchange.gradient.spans))
    return Push(
        unpack_push(exchange.push), gradient, {index: from_wire(wire) for index, wire in logged.reloaded.items()}
    )


def _workers_of(shard: Shard) -> tuple[Mapping[int, Worker], frozenset[int]]:
    members = shard.members.by_rank
    workers = {rank: Worker(each.incarnation, pack_holdings(each.holdings)) for rank, each in members.items()}
    return workers, frozenset(rank for rank, each in members.items() if each.has_left)
