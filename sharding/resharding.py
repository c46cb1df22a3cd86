"""State that goes from one number of shards to another: runs of tiles, as they lie in the shards' memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from .buffers import Buffers

RUN_BYTES = 32 * 2**20
"""What a run holds at most, so that what is on its way takes no second memory of the state's size."""


@dataclasses.dataclass(frozen=True, slots=True)
class TileRun:
    """Some tiles of one slot, and of one extent.

    Attributes:
        extent: Its position among the layout's.
        slot: The slot's name.
        first_tile, last_tile: The tiles of the extent, the last one exclusive.
    """

    extent: int
    slot: str
    first_tile: int
    last_tile: int


def runs_in_common(buffers: Buffers, shard: int, num_shards: int) -> Iterator[TileRun]:
    """What of ``buffers`` belongs to ``shard`` where the state is cut for ``num_shards``."""
    for index, extent in enumerate(buffers.extents):
        theirs = extent.extent.tile_range(shard, num_shards)
        first, last = max(theirs.start, extent.tiles.start), min(theirs.stop, extent.tiles.stop)
        for slot, rows in extent.slots.items():
            tiles_per_run = max(RUN_BYTES // (rows.shape[1] * rows.itemsize), 1)
            for begin in range(first, last, tiles_per_run):
                yield TileRun(index, slot, begin, min(begin + tiles_per_run, last))


def rows_of(buffers: Buffers, run: TileRun) -> Tensor:
    """The memory of a run that lies within ``buffers``, ``(last_tile - first_tile, width)`` in the slot's dtype."""
    extent = buffers.extents[run.extent]
    return extent.slots[run.slot][run.first_tile - extent.tiles.start : run.last_tile - extent.tiles.start]
