"""Running a rule's passes over a shard's tiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..optim import Coefficients, ReducingRule, Rule
from .buffers import MASTER, Buffers, ExtentBuffers
from .channels import ChannelMap
from .keys import Keys
from .partials import SumTable

PIECE_TILES = 256
"""Tiles in one eager call: few enough for every operand to stay in cache.

Fewer never touch the bits. More could: torch cuts a call of 257 tiles and three threads at an element that is no
multiple of the vector width, and functions that are not correctly rounded (exp, log) give other bits in the remainder.
"""


class TileCoefficients:
    """A step's coefficients, looked up per tile.

    Args:
        per_tensor: Name to ``(num_tensors,)`` float64.
        buffers: The extent that they are for.
    """

    def __init__(self, per_tensor: Mapping[str, Tensor], buffers: ExtentBuffers) -> None:
        self._names = list(per_tensor)
        self._tensor_of_tile = buffers.tensor_of_tile
        self._stacked = _stack(per_tensor, buffers.extent.dtype)
        self._device = buffers.slots[MASTER.name].device

    def of(self, rows: slice) -> Coefficients:
        """Name to ``(tiles, 1)`` for the tiles of ``rows``."""
        values = self._stacked[:, self._tensor_of_tile[rows]].unsqueeze(-1).to(self._device)
        return dict(zip(self._names, values, strict=True))


class ChannelCoefficients:
    """A step's coefficients of output channels, looked up per element.

    Args:
        per_channel: Name to ``(num_channels + 1,)`` float64, the last one for elements outside any channel.
        buffers: The extent that they are for.
        keys: The channels.
    """

    def __init__(self, per_channel: Mapping[str, Tensor], buffers: ExtentBuffers, keys: Keys) -> None:
        self._names = list(per_channel)
        self._stacked = _stack(per_channel, buffers.extent.dtype).to(buffers.slots[MASTER.name].device)
        self._channels = ChannelMap(buffers.extent, keys)
        self._first_tile = buffers.tiles.start

    def of(self, rows: slice) -> Coefficients:
        """Name to ``(tiles, 256)`` for the tiles of ``rows``, or to ``(1, 1)`` if none has a channel."""
        if not self._names:
            return {}
        tiles = slice(self._first_tile + rows.start, self._first_tile + rows.stop)
        if not self._channels.any_in(tiles):
            return dict(zip(self._names, self._stacked[:, -1:, None], strict=True))
        return dict(zip(self._names, self._channels.spread(self._stacked, tiles), strict=True))


def run_local(
    rule: ReducingRule, buffers: Buffers, grads: Sequence[Tensor], c: Mapping[str, Tensor], table: SumTable
) -> Tensor:
    """First pass over everything the shard owns.

    Args:
        rule: The rule.
        buffers: The shard's memory; slots change, and the parameters with a rule of one pass.
        grads: Averaged gradient per extent, ``(tiles, 256)``.
        c: Coefficients per tensor.
        table: Where partials go.

    Returns:
        ``(len(rule.sums), num_segments)`` float64, 0 where the shard owns nothing.
    """
    partials = table.empty(len(rule.sums))
    for index, (extent, grad) in enumerate(zip(buffers.extents, grads, strict=True)):
        coefficients = TileCoefficients(c, extent)
        for rows in _rows(len(extent.tiles)):
            slots, sums = rule.local(extent.view(rows, grad), coefficients.of(rows))
            extent.store(rows, slots)
            table.fold(partials, index, extent.tiles.start + rows.start, [sums[name] for name in rule.sums])
    return partials


def run_apply(
    rule: Rule,
    buffers: Buffers,
    grads: Sequence[Tensor],
    c: Mapping[str, Tensor],
    per_channel: Mapping[str, Tensor],
    keys: Keys,
) -> None:
    """Second pass over everything the shard owns; parameters and slots change.

    Args:
        rule: The rule.
        buffers: The shard's memory.
        grads: As for :func:`run_local`.
        c: Coefficients per tensor.
        per_channel: Coefficients per channel, ``(num_channels + 1,)``.
        keys: The channels.
    """
    for extent, grad in zip(buffers.extents, grads, strict=True):
        coefficients, of_channels = TileCoefficients(c, extent), ChannelCoefficients(per_channel, extent, keys)
        for rows in _rows(len(extent.tiles)):
            param, slots = rule.apply(extent.view(rows, grad), {**coefficients.of(rows), **of_channels.of(rows)})
            extent.store(rows, {**slots, MASTER.name: param})


def _stack(coefficients: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """``(num_coefficients, num_keys)`` in ``dtype``: float64 is rounded once, here."""
    return torch.stack(list(coefficients.values())).to(dtype) if coefficients else torch.zeros(0, 1, dtype=dtype)


def _rows(num_tiles: int) -> Iterator[slice]:
    for first in range(0, num_tiles, PIECE_TILES):
        yield slice(first, min(first + PIECE_TILES, num_tiles))
