"""Partials and totals: sums over the flat space whose bits do not depend on how it is sharded.

A kernel returns one partial per tile. They are added, in tile order and float64, into one partial per (block, key); a
block lies in one chunk, so each of these is computed by exactly one shard, all others hold 0.0 for it. An all-reduce
therefore only ever adds zeros, which is exact in any order. Then every shard adds a key's partials in block order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..optim import Scope
from .layout import Extent, Layout


class SumTable:
    """Where each tile's partial goes, for one scope.

    A *segment* is the run of tiles of one block with one key. Segments are numbered in tile order over all extents.

    Attributes:
        num_segments: (block, key) pairs.
        num_keys: 1, the number of groups, or the number of tensors.
    """

    def __init__(self, layout: Layout, scope: Scope, num_groups: int) -> None:
        self.num_keys = {Scope.MODEL: 1, Scope.GROUP: num_groups, Scope.TENSOR: len(layout.params)}[scope]
        groups = layout.group_of_tensor().numpy()
        self._segment_of_tile: list[Tensor] = []
        keys_of_segments = []
        first_segment = 0
        for extent in layout.extents:
            keys = _key_of_tile(extent, scope, groups)
            segments, first_tiles = _number_runs(np.arange(extent.num_tiles) // extent.tiles_per_block, keys)
            self._segment_of_tile.append(torch.from_numpy(segments + first_segment))
            keys_of_segments.append(keys[first_tiles])
            first_segment += len(first_tiles)
        self.num_segments = first_segment
        self._key_of_segment = torch.from_numpy(np.concatenate([*keys_of_segments, np.zeros(0, np.int64)]))

    def empty(self, num_sums: int) -> Tensor:
        """A vector of partials with nothing in it, ``(num_sums, num_segments)`` float64."""
        return torch.zeros(num_sums, self.num_segments, dtype=torch.float64)

    def fold(self, partials: Tensor, extent: int, first_tile: int, tile_partials: Sequence[Tensor]) -> None:
        """Add tile partials to their segments, in tile order.

        Args:
            partials: ``(num_sums, num_segments)`` float64, changed in place.
            extent: The extent that the tiles are of.
            first_tile: Index of the first of them.
            tile_partials: One ``(tiles,)`` tensor per sum.
        """
        segments = self._segment_of_tile[extent][first_tile : first_tile + len(tile_partials[0])]
        for row, values in zip(partials, tile_partials, strict=True):
            row.index_add_(0, segments, values.to("cpu", torch.float64))

    def totals(self, names: Sequence[str], partials: Tensor) -> dict[str, Tensor]:
        """Add every key's partials in block order: sum name to ``(num_keys,)`` float64."""
        totals = torch.zeros(len(names), self.num_keys, dtype=torch.float64)
        for row, values in zip(totals, partials, strict=True):
            row.index_add_(0, self._key_of_segment, values)
        return dict(zip(names, totals, strict=True))


def sum_vectors(vectors: Sequence[Tensor]) -> Tensor:
    """The all-reduce of shards that live in one process."""
    return torch.stack(list(vectors)).sum(dim=0) if len(vectors) > 1 else vectors[0]


def _key_of_tile(extent: Extent, scope: Scope, group_of_tensor: NDArray[np.int64]) -> NDArray[np.int64]:
    by_scope: Mapping[Scope, NDArray[np.int64]] = {
        Scope.MODEL: np.zeros(extent.num_tiles, np.int64),
        Scope.GROUP: group_of_tensor[extent.tensor_of_tile],
        Scope.TENSOR: extent.tensor_of_tile,
    }
    return by_scope[scope]


def _number_runs(blocks: NDArray[np.int64], keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the runs of equal (block, key): the run of each tile, and the first tile of each run."""
    if len(keys) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.concatenate(([True], (blocks[1:] != blocks[:-1]) | (keys[1:] != keys[:-1])))
    return np.cumsum(starts) - 1, np.flatnonzero(starts)
