"""Where output channels lie in the flat space: of any length, over the edges of tiles, blocks and shards."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from ..optim import TILE_NUMEL
from .keys import Keys
from .layout import Extent


@final
class ElementChannels:
    """Which channel each element of an extent is in.

    Args:
        extent: The extent.
        keys: The channels.
    """

    def __init__(self, extent: Extent, keys: Keys) -> None:
        self._extent, self._keys = extent, keys
        self._has_channels = np.diff(keys.first_channel) > 0

    def any_in(self, tiles: slice) -> bool:
        """Whether a tile of ``tiles`` (counted in the extent) holds elements of a channel."""
        return bool(self._has_channels[self._extent.tensor_of_tile[tiles]].any())

    def of(self, tiles: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Each element's channel in its tensor, and whether it is in one at all.

        Returns:
            ``(tiles, 256)`` int64, counted from the tensor's first channel, and ``(tiles, 256)`` bool: False in
            padding and in tensors without channels, where the number has no meaning.
        """
        tensors = self._extent.tensor_of_tile[tiles]
        valid = np.where(self._has_channels[tensors], self._extent.valid_numel[tiles], 0)
        start, numel, stop = (
            torch.from_numpy(column).to(device)[:, None]
            for column in (self._extent.index_in_tensor[tiles] * TILE_NUMEL, self._keys.channel_numel[tensors], valid)
        )
        columns = torch.arange(TILE_NUMEL, device=device)
        return torch.div(start + columns, numel, rounding_mode="floor"), columns < stop

    def keys_of(self, tiles: slice, device: torch.device) -> Tensor:
        """Each element's channel among all, ``(tiles, 256)`` int64; the number of channels where it is in none."""
        channel, is_within = self.of(tiles, device)
        first = torch.from_numpy(self._keys.first_channel[self._extent.tensor_of_tile[tiles]]).to(device)
        return torch.where(is_within, first[:, None] + channel, self._keys.num_channels)


def run_sums(values: Tensor, runs: Tensor) -> Tensor:
    """Sum each row from the beginning of an element's run up to the element, ``(tiles, 256)``.

    Args:
        values: ``(tiles, 256)``.
        runs: ``(tiles, 256)`` int64; neighbours with the same number are in one run.

    Elementwise additions alone, so that the bits depend on nothing but the row. The last element of a run has its sum.
    """
    step = 1
    while step < values.shape[1]:
        before = torch.where(runs[:, step:] == runs[:, :-step], values[:, :-step], 0.0)
        values = torch.cat((values[:, :step], values[:, step:] + before), dim=1)
        step *= 2
    return values
