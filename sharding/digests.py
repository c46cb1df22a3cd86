"""Digests of what lies in a checkpoint: XXH3-64, which finds any damage and is several times faster than a disk.

They are no protection from somebody who means harm: whoever changes a file can change its digest too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import xxhash

DIGEST_BYTES = 8


def digest_of(data: bytes | memoryview) -> int:
    """The XXH3-64 of some bytes, with seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def to_bytes(digest: int) -> bytes:
    """A digest as it stands at a manifest's end: eight bytes, little-endian."""
    return digest.to_bytes(DIGEST_BYTES, "little")


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """Where a :class:`PieceDigests` stood."""

    num_done: int
    left_bytes: int
    hasher: xxhash.xxh3_64


class PieceDigests:
    """The digests of pieces that pass by one after the other, however they are cut into runs of bytes.

    Args:
        sizes_bytes: The pieces' sizes, none of them 0.
    """

    def __init__(self, sizes_bytes: Sequence[int]) -> None:
        self._sizes, self._done = sizes_bytes, list[int]()
        self._begin()

    def update(self, data: memoryview) -> None:
        """Take the next bytes.

        Raises:
            ValueError: If they go beyond the last piece.
        """
        while data:
            if not self._left:
                raise ValueError(f"expected {sum(self._sizes)} bytes in all, got {len(data)} more")
            part, data = data[: self._left], data[self._left :]
            self._hasher.update(part)
            self._left -= len(part)
            if not self._left:
                self._done.append(self._hasher.intdigest())
                self._begin()

    def mark(self) -> Mark:
        """Where this stands, for :meth:`rewind`."""
        return Mark(len(self._done), self._left, self._hasher.copy())

    def rewind(self, mark: Mark) -> None:
        """Go back to a mark: what came since is about to be written once more."""
        del self._done[mark.num_done :]
        self._left, self._hasher = mark.left_bytes, mark.hasher.copy()

    def values(self) -> list[int]:
        """The digest of each piece.

        Raises:
            ValueError: If bytes are missing.
        """
        if len(self._done) != len(self._sizes):
            raise ValueError(f"expected {len(self._sizes)} pieces, got {len(self._done)} whole ones")
        return self._done

    def _begin(self) -> None:
        self._hasher = xxhash.xxh3_64()
        self._left = self._sizes[len(self._done)] if len(self._done) < len(self._sizes) else 0
