"""A shard's state as of one step, read by one thread while another takes the steps that follow."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ..optim import Rule, Slot
from .buffers import MASTER, Buffers, ExtentBuffers
from .errors import CheckpointError
from .layout import Piece
from .reports import ShardStatus

UNIT_TILES = 1024
"""Tiles of one slot that are copied at once; of float32 this is 1 MiB, which stays in cache until it is written."""

Unit = tuple[int, int]
"""(position among the snapshot's slots, first row)."""


class Snapshot:
    """A shard's state as of one step.

    It begins as a mere note of what to read, in the shard's own memory. Who is about to change that calls
    :meth:`detach`, which copies what :meth:`read` has not come to, from the end backwards while ``read`` goes on from
    the front. No thread waits for another for longer than the copy of one unit takes, whatever the file system does.

    Args:
        buffers: The shard's memory.
        rule: Says which slots there are, and which of them no step changes.
        status: Where the shard stands.

    Attributes:
        status: Where the shard stood.
    """

    def __init__(self, buffers: Buffers, rule: Rule, status: ShardStatus) -> None:
        self.status = status
        self._buffers = buffers.with_key_state_kept()
        slots = [(slot, extent) for slot in (MASTER, *rule.slots) for extent in buffers.extents]
        self._slots: list[tuple[Slot, ExtentBuffers]] = sorted(slots, key=lambda of: -_dtype(*of).itemsize)
        self._lock = threading.Lock()
        self._closed: str | None = None
        # Both in the order of `read`; a unit is in one of them until it is read.
        self._shared: dict[Unit, None] = dict.fromkeys(
            (index, first)
            for index, (_, extent) in enumerate(self._slots)
            for first in range(0, len(extent.tiles), UNIT_TILES)
        )
        self._copies: dict[Unit, Tensor] = {}

    def pieces(self) -> Iterator[tuple[str, Piece, torch.dtype]]:
        """Slot name, piece and dtype of all that :meth:`read` gives, in its order: the wider dtypes first."""
        for name, piece, values in self._buffers.export_key_state():
            yield name, piece, values.dtype
        for slot, extent in self._slots:
            for piece in extent.pieces(slot.name):
                if piece.numel:
                    yield slot.name, piece, _dtype(slot, extent)

    def read(self) -> Iterator[Tensor]:
        """All elements of :meth:`pieces`, flat, on the CPU; each tensor is good until the next is asked for.

        Raises:
            CheckpointError: If the snapshot is closed.
        """
        for _, _, values in self._buffers.export_key_state():
            yield values
        staging = torch.empty(0, dtype=torch.uint8)
        for index, (slot, extent) in enumerate(self._slots):
            buffer = extent.slots[slot.name]
            row_bytes = buffer.shape[1] * buffer.element_size()
            if staging.numel() < UNIT_TILES * row_bytes:
                staging = torch.empty(UNIT_TILES * row_bytes, dtype=torch.uint8, pin_memory=buffer.is_cuda)
            for first in range(0, len(extent.tiles), UNIT_TILES):
                rows = slice(first, min(first + UNIT_TILES, len(extent.tiles)))
                staged = staging[: (rows.stop - first) * row_bytes].view(buffer.dtype).view(-1, buffer.shape[1])
                yield from extent.without_padding(slot.name, rows, self._take((index, first), staged))

    def detach(self, *, for_step: bool) -> None:
        """Copy what is still to be read from the shard's memory, before that changes.

        Args:
            for_step: Whether it is a step that changes it, and so leaves constant slots as they are.
        """
        with self._lock:
            units = [unit for unit in reversed(self._shared) if not (for_step and self._slots[unit[0]][0].constant)]
        for unit in units:
            rows = self._rows(unit)
            try:
                copied = torch.empty_like(rows, device="cpu")
            except RuntimeError as error:  # there is no memory for it; the step is worth more than the save
                self.close(f"the state that a step was about to change could not be kept ({error})")
                return
            with self._lock:
                if unit in self._shared:
                    self._copies[unit] = copied.copy_(rows)
                    del self._shared[unit]

    def close(self, why: str) -> None:
        """Let go of all memory; :meth:`read` raises from now on.

        Args:
            why: Completes "the snapshot is closed:".
        """
        with self._lock:
            self._closed = self._closed or why
            self._shared.clear()
            self._copies.clear()

    def _take(self, unit: Unit, staged: Tensor) -> Tensor:
        """The rows of a unit, which is now read."""
        with self._lock:
            if self._closed is not None:
                raise CheckpointError(f"the snapshot is closed: {self._closed}; save again")
            if unit in self._copies:
                return self._copies.pop(unit)
            del self._shared[unit]
            return staged.copy_(self._rows(unit))

    def _rows(self, unit: Unit) -> Tensor:
        slot, extent = self._slots[unit[0]]
        return extent.slots[slot.name][unit[1] : unit[1] + UNIT_TILES]


def _dtype(slot: Slot, extent: ExtentBuffers) -> torch.dtype:
    return slot.dtype(extent.extent.dtype)
