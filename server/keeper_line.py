"""A shard's line to one keeper: it shows the keeper memory of its node, and sends it what it cannot show."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..sharding.errors import ServiceError
from ..sharding.segments import (
    ALIGNMENT,
    Address,
    Placement,
    Segment,
    Span,
    allocate,
    new_token,
    open_segment,
    spans_of,
)
from .arrangement import KeeperPlace
from .calls import gather
from .keeper import Copy, LogEntry, LoggedPush
from .wire import WireTensor
from .workers import Worker

T = TypeVar("T")

KEEPER_TIMEOUT_S = 60.0
PIECE_BYTES = 8 * 2**20
NUM_IN_FLIGHT = 4
"""Pieces that are on their way at once: so much more memory than the state's own a shard needs to send it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Received:
    """One rank's push, as it came to the shard; see :meth:`ShardActor.exchange`.

    Attributes:
        request: Its header, packed.
        gradient: What it holds, per extent.
        placement: Where that lies in the worker's memory; None if it came with the call.
        reloaded: Parameters that were changed by hand.
    """

    request: bytes
    gradient: tuple[Tensor, ...]
    placement: Placement | None
    reloaded: Mapping[int, WireTensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What a keeper has of a shard that comes back."""

    copy: Copy
    entries: Sequence[LogEntry]

    @property
    def reach(self) -> tuple[int, int]:
        """Timeline and number of the last step that it knows."""
        status = self.copy.status
        return status.timeline, status.sequence + len(self.entries)


class KeeperLine:
    """Lives on a shard actor's event loop.

    Args:
        shard: The shard's index.
        place: The keeper.
        is_near: Whether it is on the shard's node.

    Attributes:
        place, is_near: As above.
        is_chosen: Whether it is to keep this shard; one that is not goes on until another one has all.
        logged_after: Timeline and number of the step after which the keeper's log begins; None if it has none.
        failed_at: The step after which a copy did not reach it; None once one did.
    """

    def __init__(self, shard: int, place: KeeperPlace, *, is_near: bool) -> None:
        self._shard, self.place, self.is_near, self.is_chosen = shard, place, is_near, False
        self.logged_after: tuple[int, int] | None = None
        self.failed_at: int | None = None
        self._begun: Any = None
        self._lent: dict[int, list[int]] = {}

    def num_logged(self, sequence: int) -> int:
        """Steps in its log, after step ``sequence``."""
        return 0 if self.logged_after is None else sequence - self.logged_after[1]

    def lent_from(self, rank: int) -> int | None:
        """The first step whose gradient it needs in a rank's own memory; None for none."""
        return min(self._lent.get(rank, ()), default=None)

    # Copies and logs

    def begin(self, timeline: int, sequence: int) -> None:
        """Have it begin a log after this step; the keeper takes calls in the order in which they come."""
        self.logged_after, self._lent = (timeline, sequence), {}
        self._begun = self.place.handle.begin.remote(self._shard, timeline, sequence)

    async def await_begin(self) -> None:
        """See that the log was begun."""
        if self._begun is not None:
            begun, self._begun = self._begun, None
            await self._answer(begun)

    async def log(
        self, timeline: int, sequence: int, received: Sequence[Received], last_sums: tuple[Tensor, ...]
    ) -> None:
        """Have a step logged, in place of another try at it.

        Raises:
            ServiceError: If it was not.
        """
        pushes = await asyncio.gather(*(self._logged(rank, push, sequence) for rank, push in enumerate(received)))
        if not await self._ask("log", LogEntry(timeline, sequence, tuple(pushes), last_sums)):
            raise ServiceError("the keeper was started again")

    async def keep(self, copy: Copy, memory: Tensor) -> None:
        """Give it a copy, which lies in ``memory``, ``(size,)`` uint8, of the shard's own.

        Raises:
            ServiceError: If it does not have it now.
        """
        if not self.is_near:
            copy = dataclasses.replace(copy, memory=(await self._send([memory])).address)
        if not await self._ask("keep", copy):
            raise ServiceError("the keeper was started again")
        self._cut(copy.status.timeline, copy.status.sequence)

    async def admit(self, workers: Mapping[int, Worker], left: frozenset[int]) -> None:
        """Tell it whom the shard has admitted."""
        await self._ask("admit", workers, left)

    def forget(self) -> None:
        """Have it drop what it has: or a shard would come back as it was long ago."""
        if self.logged_after is not None:
            self.place.handle.forget.remote(self._shard)
        self.reset()

    def reset(self) -> None:
        """Begin anew with the next copy."""
        self.logged_after, self._lent, self._begun = None, {}, None

    # Coming back

    async def fetch(self) -> Found | None:
        """What it has of this shard."""
        found: tuple[Copy, list[LogEntry]] | None = await self._ask("fetch")
        return None if found is None else Found(*found)

    def go_on_with(self, found: Found) -> None:
        """Go on with the log of the shard's process before this one."""
        self.reset()
        self.logged_after = found.copy.status.timeline, found.copy.status.sequence
        for entry in found.entries:  # which of them lie in workers' memory the keeper alone knows
            for rank in range(len(entry.pushes)):
                self._lent.setdefault(rank, []).append(entry.sequence)

    async def segment(self, address: Address) -> Segment:
        """Memory that :meth:`fetch` named, mapped or brought here.

        Raises:
            SegmentError: If it cannot be had.
        """
        if self.is_near:
            return open_segment(address)
        segment, (memory,) = await asyncio.to_thread(allocate, [(address.size_bytes - ALIGNMENT, torch.uint8)])

        async def bring(begin: int) -> None:
            size_bytes = min(PIECE_BYTES, len(memory) - begin)
            call = self.place.handle.read.remote(address.token, ALIGNMENT + begin, size_bytes)
            memory.numpy()[begin : begin + size_bytes] = await self._answer(call)

        await _a_few_at_once(range(0, len(memory), PIECE_BYTES), bring)
        return segment

    # Within

    def _cut(self, timeline: int, sequence: int) -> None:
        self.logged_after, self.failed_at = (timeline, sequence), None
        self._lent = {rank: [step for step in steps if step > sequence] for rank, steps in self._lent.items()}

    async def _logged(self, rank: int, push: Received, sequence: int) -> LoggedPush:
        """A push as the keeper can hold it."""
        if self.is_near and push.placement is not None:
            self._lent.setdefault(rank, []).append(sequence)
            return LoggedPush(push.request, push.placement, push.reloaded)
        return LoggedPush(push.request, await self._send(push.gradient), push.reloaded)

    async def _send(self, parts: Sequence[Tensor]) -> Placement:
        """Send flat tensors, piece by piece; where they lie then."""
        spans, size_bytes = spans_of([(part.numel(), part.dtype) for part in parts])
        # Of no process: the keeper knows it by its token.
        name = Address(0, -1, size_bytes, new_token())

        async def put(piece: tuple[int, Tensor]) -> None:
            await self._ask("put", name, piece[0], piece[1].numpy())

        (first, *others) = _pieces(spans, parts)
        await put(first)
        await _a_few_at_once(others, put)
        return Placement(name, spans)

    async def _ask(self, method: str, *args: Any) -> Any:
        return await self._answer(getattr(self.place.handle, method).remote(self._shard, *args))

    async def _answer(self, call: Any) -> Any:
        what = f"keeper {self.place.index} of shard {self._shard}"
        return (await gather([call], timeout_s=KEEPER_TIMEOUT_S, what=what))[0]


def _pieces(spans: Sequence[Span], parts: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Offset and bytes of each piece; at least one, at the memory's beginning."""
    pieces = []
    for span, part in zip(spans, parts, strict=True):
        if part.numel():
            flat = part.detach().view(torch.uint8)
            pieces += [
                (span.offset + begin, flat[begin : begin + PIECE_BYTES]) for begin in range(0, len(flat), PIECE_BYTES)
            ]
    return pieces or [(ALIGNMENT, torch.empty(0, dtype=torch.uint8))]


async def _a_few_at_once(items: Iterable[T], do: Callable[[T], Awaitable[None]]) -> None:
    """Do something with each item, for :data:`NUM_IN_FLIGHT` of them at once."""
    left = iter(items)

    async def some() -> None:
        for item in left:
            await do(item)

    await asyncio.gather(*(some() for _ in range(NUM_IN_FLIGHT)))
