"""State in pieces: runs of slots, wherever they come from, put together as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

PieceValues = Mapping[tuple[int, str, int], Tensor]
"""(parameter index, slot, offset in the flattened slot) to ``(numel,)``."""

Place = TypeVar("Place")


class MissingPieceError(LookupError):
    """Elements that no piece holds; whoever knows where the pieces come from says so in an error of ours."""


def read_across(
    pieces: Sequence[tuple[int, int, Place]], offset: int, out: Tensor, read: Callable[[Place, int, Tensor], object]
) -> None:
    """Fill ``out`` with elements from ``offset`` on, whichever pieces they lie in.

    Args:
        pieces: (offset, numel, place) of each, ascending.
        offset: Where to begin.
        out: ``(numel,)``.
        read: ``(place, first, part)``: fills a part of ``out`` with one piece's elements from ``first`` on.

    Raises:
        MissingPieceError: If some lie in none.
    """
    wanted, stop = offset, offset + len(out)
    for begin, length, place in pieces:
        if begin <= wanted < min(begin + length, stop):
            end = min(begin + length, stop)
            read(place, wanted - begin, out[wanted - offset : end - offset])
            wanted = end
    if wanted != stop:
        raise MissingPieceError(f"elements {wanted} to {stop}")


class HeldPieces:
    """Pieces that this process holds, such as the ranks' parts of the first parameters.

    Args:
        parts: Each rank's.
    """

    def __init__(self, parts: Iterable[PieceValues]) -> None:
        self._by_slot: dict[tuple[int, str], list[tuple[int, int, Tensor]]] = {}
        for part in parts:
            for (param, slot, offset), values in part.items():
                self._by_slot.setdefault((param, slot), []).append((offset, values.numel(), values))
        for pieces in self._by_slot.values():
            pieces.sort(key=lambda piece: piece[:2])

    @property
    def available(self) -> frozenset[tuple[int, str]]:
        """The (param, slot) pairs that there are pieces of."""
        return frozenset(self._by_slot)

    def read(self, param: int, slot: str, offset: int, out: Tensor) -> None:
        """Fill ``out`` with elements of a slot from ``offset`` on."""
        pieces = self._by_slot[param, slot]
        read_across(pieces, offset, out, lambda values, first, part: part.copy_(values[first : first + len(part)]))
