"""Where output channels lie in the flat space: of any length, over the edges of tiles, blocks and shards."""

from __future__ import annotations

import dataclasses
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..optim import TILE_NUMEL
from .keys import Keys
from .layout import Extent
from .run_sums import RunSums


@dataclasses.dataclass(frozen=True, slots=True)
class Runs:
    """The elements of some tiles, cut where a tile or a channel ends. Runs outside any channel are among them.

    Attributes:
        lengths: ``(num_runs,)`` int64, elements of each; they add up to all elements of the tiles.
        tile: ``(num_runs,)`` int64, the tile of each, counted from the first of the tiles.
        channel: ``(num_runs,)`` int64, the channel of each, counted in its tensor; -1 outside any channel.
    """

    lengths: NDArray[np.int64]
    tile: NDArray[np.int64]
    channel: NDArray[np.int64]


@final
class ChannelMap:
    """Which channels the tiles of an extent hold.

    Args:
        extent: The extent.
        keys: The channels.
    """

    def __init__(self, extent: Extent, keys: Keys) -> None:
        self._extent, self._keys = extent, keys
        self._has_channels = np.diff(keys.first_channel) > 0

    def any_in(self, tiles: range) -> bool:
        """Whether a tile of ``tiles`` (counted in the extent) holds elements of a channel."""
        return bool(self._has_channels[self._extent.table(tiles).tensor_of_tile].any())

    def runs(self, tiles: range) -> Runs:
        """The runs of ``tiles``, in order."""
        table = self._extent.table(tiles)
        tensors = table.tensor_of_tile
        numel, start = self._keys.channel_numel[tensors], table.index_in_tensor * TILE_NUMEL
        valid = np.where(self._has_channels[tensors], table.valid_numel, 0)
        first = start // numel
        num_channels = np.where(valid > 0, (start + valid - 1) // numel - first + 1, 0)
        num_runs = num_channels + (valid < TILE_NUMEL)
        tile = np.repeat(np.arange(len(tensors)), num_runs)
        position = np.arange(len(tile)) - np.repeat(np.cumsum(num_runs) - num_runs, num_runs)
        channel = first[tile] + position
        begin = np.maximum(channel * numel[tile] - start[tile], 0)
        end = np.minimum((channel + 1) * numel[tile] - start[tile], valid[tile])
        is_outside = position == num_channels[tile]
        lengths = np.where(is_outside, TILE_NUMEL - valid[tile], end - begin)
        return Runs(lengths, tile, np.where(is_outside, -1, channel))

    def spread(self, values: Tensor, tiles: range) -> Tensor:
        """Give each element its channel's value.

        Args:
            values: ``(n, num_channels + 1)``, the last one for elements outside any channel.
            tiles: The tiles.

        Returns:
            ``(n, tiles, 256)``.
        """
        runs = self.runs(tiles)
        first = self._keys.first_channel[self._extent.table(tiles).tensor_of_tile]
        key = torch.from_numpy(np.where(runs.channel < 0, self._keys.num_channels, first[runs.tile] + runs.channel))
        lengths = torch.from_numpy(runs.lengths).to(values.device, non_blocking=True)
        num_tiles = len(first)
        spread = values[:, key.to(values.device, non_blocking=True)].repeat_interleave(
            lengths, dim=1, output_size=num_tiles * TILE_NUMEL
        )
        return spread.view(len(values), num_tiles, TILE_NUMEL)


def run_sums(values: Tensor, lengths: NDArray[np.int64]) -> Tensor:
    """Sum runs of elements, in float64; a run's bits depend on nothing but its elements.

    On the CPU each is added up in order; on CUDA, where nothing promises an order, as :class:`RunSums` does.

    Args:
        values: ``(n, tiles, 256)``.
        lengths: ``(num_runs,)`` int64; no run is in two rows, and together they are all of ``values[0]``.

    Returns:
        ``(n, num_runs)`` float64, where ``values`` are.
    """
    flat = values.reshape(len(values), -1).to(torch.float64)
    if values.device.type == "cpu":
        sizes = torch.from_numpy(lengths)
        return torch.stack([torch.segment_reduce(row, "sum", lengths=sizes, unsafe=True) for row in flat])
    return RunSums(lengths, values.device).of(flat)
