"""A shard's state as of one step, written by one thread while another takes the steps that follow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from ..optim import Rule, Slot
from .buffers import MASTER, Buffers, ExtentBuffers
from .digests import PieceDigests
from .errors import CheckpointError
from .layout import Piece
from .reports import ShardStatus
from .tensor_file import write_values

UNIT_TILES = 4096
"""Tiles of one slot that are written or copied at once: 4 MiB of float32."""

Unit = tuple[int, int]
"""(position among the snapshot's slots, first row)."""


class Snapshot:
    """A shard's state as of one step.

    It begins as a mere note of what to write, in the shard's own memory. Who is about to change that calls
    :meth:`detach`, which copies what :meth:`write` has not done, from the end backwards while ``write`` goes on from
    the front. A unit that ``write`` is at is copied too, and written once more. No thread waits for the other for
    longer than the copy of one unit takes, whatever the file system does.

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
        # Both in the order of `write`; a unit is in one of them until it is written.
        self._shared: dict[Unit, None] = dict.fromkeys(
            (index, first)
            for index, (_, extent) in enumerate(self._slots)
            for first in range(0, len(extent.tiles), UNIT_TILES)
        )
        self._copies: dict[Unit, Tensor] = {}

    def pieces(self) -> Iterator[tuple[str, Piece, torch.dtype]]:
        """Slot name, piece and dtype of all that :meth:`write` writes, in its order: the wider dtypes first."""
        for name, piece, values in self._buffers.export_key_state():
            yield name, piece, values.dtype
        for slot, extent in self._slots:
            for piece in extent.pieces(slot.name):
                if piece.numel:
                    yield slot.name, piece, _dtype(slot, extent)

    def write(self, stream: BinaryIO) -> list[int]:
        """Write all elements of :meth:`pieces`, in that order; returns the digest of each.

        Raises:
            CheckpointError: If the snapshot is closed.
            OSError: If the stream cannot be written.
        """
        digests = PieceDigests([piece.numel * dtype.itemsize for _, piece, dtype in self.pieces()])
        for _, _, values in self._buffers.export_key_state():
            write_values(stream, values, digests)
        for index, (_, extent) in enumerate(self._slots):
            for first in range(0, len(extent.tiles), UNIT_TILES):
                self._write_unit(stream, (index, first), digests)
        return digests.values()

    def detach(self, *, for_step: bool) -> None:
        """Copy what is still to be written from the shard's memory, before that changes.

        Args:
            for_step: Whether it is a step that changes it, and so leaves constant slots as they are.
        """
        with self._lock:
            units = [unit for unit in reversed(self._shared) if not (for_step and self._slots[unit[0]][0].constant)]
        for unit in units:
            self._copy(unit)

    @property
    def is_open(self) -> bool:
        """Whether it still holds what it was made for."""
        return self._closed is None

    def close(self, why: str) -> None:
        """Let go of all copies; :meth:`write` raises from now on.

        Args:
            why: Completes "the snapshot is closed:".
        """
        with self._lock:
            self._closed = self._closed or why
            self._shared.clear()
            self._copies.clear()

    def _write_unit(self, stream: BinaryIO, unit: Unit, digests: PieceDigests) -> None:
        """Write a unit straight from the shard's memory; again, from the copy, if it was changed meanwhile."""
        shared, can_rewrite = self._rows(unit), stream.seekable()
        if shared.is_cuda or not can_rewrite:
            self._copy(unit)
        begin, mark, copied = stream.tell() if can_rewrite else 0, digests.mark(), self._copy_of(unit)
        self._write_rows(stream, unit, shared if copied is None else copied, digests)
        copied_since = self._let_go(unit)
        if copied is None and copied_since is not None:
            stream.seek(begin)
            digests.rewind(mark)
            self._write_rows(stream, unit, copied_since, digests)

    def _write_rows(self, stream: BinaryIO, unit: Unit, rows: Tensor, digests: PieceDigests) -> None:
        (slot, extent), first = self._slots[unit[0]], unit[1]
        for run in extent.without_padding(slot.name, slice(first, first + len(rows)), rows):
            write_values(stream, run, digests)

    def _copy(self, unit: Unit) -> None:
        """Copy a unit unless it was copied or written before; without memory for it, close."""
        rows = self._rows(unit)
        try:
            copied = torch.empty_like(rows, device="cpu")
        except RuntimeError as error:  # a step is worth more than a save
            self.close(f"there is no memory to keep what a step changes ({error})")
            return
        with self._lock:
            if unit in self._shared:
                self._copies[unit] = copied.copy_(rows)
                del self._shared[unit]

    def _copy_of(self, unit: Unit) -> Tensor | None:
        with self._lock:
            self._require_open()
            return self._copies.get(unit)

    def _let_go(self, unit: Unit) -> Tensor | None:
        """Note that a unit was written; its copy, if there is one."""
        with self._lock:
            self._require_open()  # else the unit may have been changed without a copy
            self._shared.pop(unit, None)
            return self._copies.pop(unit, None)

    def _require_open(self) -> None:
        if self._closed is not None:
            raise CheckpointError(f"the snapshot is closed: {self._closed}; save again")

    def _rows(self, unit: Unit) -> Tensor:
        slot, extent = self._slots[unit[0]]
        return extent.slots[slot.name][unit[1] : unit[1] + UNIT_TILES]


def _dtype(slot: Slot, extent: ExtentBuffers) -> torch.dtype:
    return slot.dtype(extent.extent.dtype)
