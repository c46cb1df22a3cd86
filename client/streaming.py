"""Gradients on their way to shards that share no memory with their worker: piece by piece, as backward makes them."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor

from ..optim import TILE_NUMEL
from ..sharding.errors import ServiceTimeoutError
from ..sharding.layout import Layout
from ..sharding.push import PIECE_NUMEL
from .flat import FlatBuffer

Send = Callable[[int, int, int, Tensor], Any]
"""Sends a piece of a gradient, ``(shard, piece, serial, values)``; returns what to wait for."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """Elements of one extent that go to one shard together; ``number`` counts the shard's."""

    shard: int
    number: int
    extent: int
    start: int
    stop: int
    places: range

    def values(self, buffer: FlatBuffer) -> Tensor:
        return buffer.parts[self.extent][self.start : self.stop]


class PieceStream:
    """Sends each piece of a gradient once all of it is there, and knows at ``step()`` which of them still count.

    A gradient is taken to be complete when backward has added to it as often as for the step before: so nothing is
    sent ahead of the first step, and of several accumulated gradients the last one is sent. Where that was wrong the
    piece counts for nothing, and is sent again with the push.

    Args:
        layout: The flat space.
        num_shards: How many shards there are.
        buffer: Holds the whole gradient.
        is_near: Whether a shard reads the gradient where it is, and is sent nothing.
        send: See there; called in a thread, so that backward does not wait for it.

    Attributes:
        buffer: The memory of the step that is being prepared.
        mark: Gives what waits until all is there that was written by now.
    """

    def __init__(
        self, layout: Layout, num_shards: int, buffer: FlatBuffer, *, is_near: Callable[[int], bool], send: Send
    ) -> None:
        self.buffer, self._layout, self._is_near, self._send = buffer, layout, is_near, send
        self.mark: Callable[[], Callable[[], None]] = lambda: _is_there
        self._cut(num_shards)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pieces")
        self._serial = 0
        self._sent: dict[int, int] = {}
        self._named: dict[int, int] = {}
        self._under_way: list[Future[Any]] = []
        self._usual = self._counts = [0] * len(buffer.places)
        self._begin()

    def _cut(self, num_shards: int) -> None:
        self._pieces = _cut(self._layout, num_shards, self.buffer)
        self._of_place: list[list[int]] = [[] for _ in self.buffer.places]
        for index, piece in enumerate(self._pieces):
            for place in piece.places:
                self._of_place[place].append(index)

    def turn_to(self, num_shards: int, timeout_s: float) -> None:
        """Send to other shards from now on; what was sent to those before counts for nothing."""
        self.finish(timeout_s, what="the shards before these to take pieces of a gradient")
        self._cut(num_shards)
        self._named = {}
        self._begin()

    def use(self, buffer: FlatBuffer) -> None:
        """Go on with other memory, of the same layout."""
        self.buffer, self._sent = buffer, {}

    def written(self, place: int) -> None:
        """A gradient was copied to its place within backward."""
        self.spoil([place])
        self._counts[place] += 1
        if self._counts[place] != self._usual[place]:
            return
        for index in self._of_place[place]:
            self._left[index] -= 1
            if self._left[index] == 0 and not self._is_near(self._pieces[index].shard):
                self._serial += 1
                self._sent[index] = self._serial
                self._under_way.append(
                    self._thread.submit(self._send_piece, self._pieces[index], self._serial, self.buffer, self.mark())
                )

    def _send_piece(self, piece: _Piece, serial: int, buffer: FlatBuffer, wait_until_there: Callable[[], None]) -> Any:
        wait_until_there()
        return self._send(piece.shard, piece.number, serial, piece.values(buffer))

    def spoil(self, places: Iterable[int]) -> None:
        """What was sent of these places does not count: they are written once more."""
        for place in places:
            for index in self._of_place[place]:
                self._sent.pop(index, None)

    def finish(self, timeout_s: float, *, what: str) -> list[Any]:
        """End the step's sending; what to wait for before shards are told of it, by :meth:`ahead_of`.

        Raises:
            ServiceTimeoutError: If what was to be sent was not in time; ``what`` names the wait.
        """
        under_way, self._under_way = self._under_way, []
        self._named, self._sent = self._sent, {}
        self._begin()
        if wait(under_way, timeout_s).not_done:
            raise ServiceTimeoutError(f"waited {timeout_s:g} s for {what}; see `stepwell status`")
        return [future.result() for future in under_way]

    def ahead_of(self, shard: int) -> tuple[tuple[int, ...], list[Tensor]]:
        """Of a shard's pieces, in order, the serial numbers of those that were sent, 0 for others; and these others."""
        pieces = [(index, piece) for index, piece in enumerate(self._pieces) if piece.shard == shard]
        serials = tuple(self._named.get(index, 0) for index, _ in pieces)
        return serials, [piece.values(self.buffer) for index, piece in pieces if index not in self._named]

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        """Wait for the next gradient, in the way that the last one came."""
        if any(self._counts):
            self._usual = self._counts
        self._counts = [0] * len(self._of_place)
        self._left = [sum(self._usual[place] > 0 for place in piece.places) for piece in self._pieces]


def _is_there() -> None:
    """Nothing to wait for: what was written is there."""


def _cut(layout: Layout, num_shards: int, buffer: FlatBuffer) -> list[_Piece]:
    """All shards' pieces, each shard's in order."""
    pieces, counts = [], [0] * num_shards
    for index, extent in enumerate(layout.extents):
        first = bisect.bisect_left(buffer.places, index, key=lambda place: place.part)
        last = bisect.bisect_right(buffer.places, index, key=lambda place: place.part)
        starts = [place.start for place in buffer.places[first:last]]
        stops = [place.start + place.view.numel() for place in buffer.places[first:last]]
        for shard in range(num_shards):
            tiles = extent.tile_range(shard, num_shards)
            begin, end = tiles.start * TILE_NUMEL, tiles.stop * TILE_NUMEL
            for start in range(begin, max(end, begin + 1), PIECE_NUMEL):
                stop = min(start + PIECE_NUMEL, end)
                among = bisect.bisect_right(stops, start), bisect.bisect_left(starts, stop)
                places = range(first + among[0], first + among[1]) if start < stop else range(0)
                pieces.append(_Piece(shard, counts[shard], index, start, stop, places))
                counts[shard] += 1
    return pieces
