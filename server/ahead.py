"""Pieces of gradients that came ahead of their push, as backward produced them."""

from __future__ import annotations

from collections.abc import Sequence

from ..sharding.errors import MessageError, ShapeMismatchError, ShardLostError
from ..sharding.members import Members
from ..sharding.push import piece_numels
from .messages import PieceHeader
from .wire import WireTensor, from_wire


class Ahead:
    """What a shard holds of them: of each rank at most one gradient, whatever becomes of the push.

    A piece is no part of a push until an exchange names it. What an exchange does not name is dropped with it.
    """

    def __init__(self) -> None:
        self._held: dict[int, dict[int, tuple[int, WireTensor]]] = {}

    def hold(self, header: PieceHeader, wire: WireTensor, members: Members) -> None:
        """Keep a piece, in place of an older one.

        Raises:
            RequestError: If another process has the sender's rank, or the piece is none of the rank's.
        """
        members.require_incarnation(header.rank, header.incarnation)
        numels, got = piece_numels(members[header.rank].pushed_numels), len(from_wire(wire))
        if header.piece >= len(numels) or got != numels[header.piece]:
            raise ShapeMismatchError(
                f"gradient of rank {header.rank}: expected pieces of {numels} elements, got {got} as piece "
                f"{header.piece}; the worker's layout is not the shard's"
            )
        held = self._held.setdefault(header.rank, {})
        if header.piece not in held or held[header.piece][0] < header.serial:
            held[header.piece] = header.serial, wire

    def merge(self, rank: int, ahead: Sequence[int], sent: Sequence[WireTensor]) -> list[WireTensor]:
        """The whole gradient of a push; of this rank nothing is held any more.

        Args:
            rank: Whose push it is.
            ahead: See :class:`Exchange`.
            sent: What came with the push.

        Raises:
            MessageError: If the numbers do not fit what came.
            ShardLostError: If a piece is not here: a process that this shard was before had it.
        """
        held = {serial: wire for serial, wire in self._held.pop(rank, {}).values()}
        if ahead and ahead.count(0) != len(sent):
            raise MessageError(
                f"gradient of rank {rank}: expected {ahead.count(0)} pieces with its push, got {len(sent)}"
            )
        missing = [serial for serial in ahead if serial and serial not in held]
        if missing:
            raise ShardLostError(
                f"{len(missing)} pieces of rank {rank}'s gradient were lost with the shard that had them. Call step() "
                "again"
            )
        left = iter(sent)
        return [held[serial] if serial else next(left) for serial in ahead] if ahead else list(sent)

    def forget(self, rank: int) -> None:
        """Drop what is held of a rank: its worker has left, or another process takes its place."""
        self._held.pop(rank, None)
