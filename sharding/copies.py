"""A copy of a shard's state in memory that outlives the shard's process."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .buffers import StateSource
from .pieces import HeldPieces
from .reports import ShardStatus
from .snapshot import Snapshot


@dataclasses.dataclass(frozen=True, slots=True)
class CopiedPiece:
    """Where a piece of a slot lies in a copy; ``begin`` in bytes, a multiple of the dtype's size."""

    param: int
    slot: str
    offset: int
    numel: int
    dtype: torch.dtype
    begin: int


def pieces_of(snapshot: Snapshot) -> tuple[CopiedPiece, ...]:
    """Where everything goes that a snapshot writes: one after the other, the wider dtypes first."""
    pieces, begin = [], 0
    for slot, piece, dtype in snapshot.pieces():
        pieces.append(CopiedPiece(piece.param, slot, piece.offset, piece.numel, dtype, begin))
        begin += piece.numel * dtype.itemsize
    return tuple(pieces)


def size_of(pieces: Sequence[CopiedPiece]) -> int:
    """Bytes that they take."""
    return sum(piece.numel * piece.dtype.itemsize for piece in pieces)


def write_copy(snapshot: Snapshot, memory: Tensor) -> None:
    """Copy a snapshot, while steps go on.

    Args:
        snapshot: It is of no more use afterwards.
        memory: ``(size_of(pieces),)`` uint8.

    Raises:
        CheckpointError: If the snapshot is closed meanwhile.
    """
    try:
        snapshot.write(_MemoryStream(memory))  # type: ignore[arg-type]
    finally:
        snapshot.close("it has been copied, or could not be")


def read_copy(memory: Tensor, pieces: Sequence[CopiedPiece], status: ShardStatus) -> StateSource:
    """A copy as a state to load, where the shard stood as ``status`` says."""
    held = HeldPieces(
        [{(piece.param, piece.slot, piece.offset): _part(memory, piece).view(piece.dtype) for piece in pieces}]
    )
    return StateSource(
        read=held.read,
        available=held.available,
        step_counts=dict(enumerate(status.step_counts)),
        scalars=status.scalars,
        sequence=status.sequence,
        step=status.step,
        skipped_steps=status.skipped_steps,
    )


def _part(memory: Tensor, piece: CopiedPiece) -> Tensor:
    return memory[piece.begin : piece.begin + piece.numel * piece.dtype.itemsize]


class _MemoryStream(io.RawIOBase):
    """Memory as a file. What is written is copied without Python's lock, as other threads compute meanwhile."""

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._at = memory, 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, "snapshots seek so alone"
        self._at = offset
        return offset

    def write(self, data: Any) -> int:
        if not len(data):
            return 0
        source = torch.frombuffer(data, dtype=torch.uint8)
        self._memory[self._at : self._at + len(source)].copy_(source)
        self._at += len(source)
        return len(source)
