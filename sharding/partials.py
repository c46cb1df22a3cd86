"""Partials and totals: sums over the flat space whose bits do not depend on how it is sharded.

A kernel returns one partial per tile, or one term per element where sums are over channels. They are added, in order
and in float64, into one partial per (block, key); a block lies in one chunk, so each of these is computed by exactly
one shard, all others hold 0.0 for it. An all-reduce therefore only ever adds zeros, which is exact in any order. Then
every shard adds a key's partials in block order.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..optim import TILE_NUMEL, ReducingRule, Rule, Scope
from .channels import ChannelMap, run_sums
from .keys import Keys
from .layout import Extent, Layout


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """What one call of a kernel returned.

    Attributes:
        extent: The extent that its tiles are of.
        first_tile: Index of the first of them.
        parts: One tensor per sum, ``(tiles,)`` or, over channels, ``(tiles, 256)``.
    """

    extent: int
    first_tile: int
    parts: Sequence[Tensor]


class SumTable(abc.ABC):
    """Where each part of a sum goes, for one scope.

    A *segment* is what one block has of one key. Segments are numbered in the order of the flat space, over all
    extents.

    Args:
        num_keys: How many keys there are.
        key_of_segment: ``(num_segments,)`` int64.

    Attributes:
        num_segments: (block, key) pairs.
        num_keys: 1, or the number of groups, tensors or channels.
    """

    def __init__(self, num_keys: int, key_of_segment: Sequence[NDArray[np.int64]]) -> None:
        self.num_keys = num_keys
        self._key_of_segment = torch.from_numpy(np.concatenate([*key_of_segment, np.zeros(0, np.int64)]))
        self.num_segments = len(self._key_of_segment)

    def empty(self, num_sums: int) -> Tensor:
        """A vector of partials with nothing in it, ``(num_sums, num_segments)`` float64."""
        return torch.zeros(num_sums, self.num_segments, dtype=torch.float64)

    def folded(self, num_sums: int, outputs: Iterable[Output]) -> Tensor:
        """Add what a kernel returns to the segments, in order; what a GPU returns all at once, so as to wait once.

        Args:
            num_sums: How many sums there are.
            outputs: Of the kernel's calls, in the order of their tiles.

        Returns:
            ``(num_sums, num_segments)`` float64 on the CPU, 0 in segments that no output is of.
        """
        partials, waiting = self.empty(num_sums), []
        for output in outputs:
            segments, values = self._reduced(output)
            if _is_at_hand(values):
                _add(partials, segments, values)
            else:
                waiting.append((segments, values))
        if waiting:
            segments, values = (torch.cat(each, dim=-1) for each in zip(*waiting, strict=True))
            _add(partials, segments, values.cpu())
        return partials

    @abc.abstractmethod
    def _reduced(self, output: Output) -> tuple[Tensor, Tensor]:
        """Segments ``(n,)`` int64 on the CPU, and what goes to each, ``(num_sums, n)`` float64 where the output is."""

    def totals(self, names: Sequence[str], partials: Tensor) -> dict[str, Tensor]:
        """Add every key's partials in block order: sum name to ``(num_keys,)`` float64."""
        totals = torch.zeros(len(names), self.num_keys, dtype=torch.float64)
        for row, values in zip(totals, partials, strict=True):
            row.index_add_(0, self._key_of_segment, values)
        return dict(zip(names, totals, strict=True))


@final
class TileSumTable(SumTable):
    """Sums over the model, groups or tensors: a segment is the run of tiles of one block with one key."""

    def __init__(self, layout: Layout, scope: Scope, num_groups: int) -> None:
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
        num_keys = {Scope.MODEL: 1, Scope.GROUP: num_groups, Scope.TENSOR: len(layout.params)}[scope]
        super().__init__(num_keys, keys_of_segments)

    def _reduced(self, output: Output) -> tuple[Tensor, Tensor]:
        """See :class:`SumTable`."""
        values = torch.stack(list(output.parts)).to(torch.float64)
        first = output.first_tile
        return self._segment_of_tile[output.extent][first : first + values.shape[1]], values


@final
class ChannelSumTable(SumTable):
    """Sums over output channels: a segment is the run of elements of one block in one channel."""

    def __init__(self, layout: Layout, keys: Keys) -> None:
        self._channels = [ChannelMap(extent, keys) for extent in layout.extents]
        self._base_of_tile: list[NDArray[np.int64]] = []
        keys_of_segments = []
        first_segment = 0
        for extent in layout.extents:
            bases, key_of_segment = _number_channel_segments(extent, keys)
            self._base_of_tile.append(bases + first_segment)
            keys_of_segments.append(key_of_segment)
            first_segment += len(key_of_segment)
        super().__init__(keys.num_channels, keys_of_segments)

    def _reduced(self, output: Output) -> tuple[Tensor, Tensor]:
        """See :class:`SumTable`."""
        parts, channels = output.parts, self._channels[output.extent]
        tiles = slice(output.first_tile, output.first_tile + len(parts[0]))
        if not channels.any_in(tiles):
            return torch.zeros(0, dtype=torch.int64), parts[0].new_zeros((len(parts), 0), dtype=torch.float64)
        runs = channels.runs(tiles)
        is_within = runs.channel >= 0
        base = self._base_of_tile[output.extent][tiles]
        segments = torch.from_numpy((base[runs.tile] + runs.channel)[is_within])
        lengths = torch.from_numpy(runs.lengths)
        kept = torch.from_numpy(np.flatnonzero(is_within)).to(parts[0].device, non_blocking=True)
        return segments, torch.stack([run_sums(values, lengths)[kept] for values in parts])


def sum_table(layout: Layout, rule: Rule, *, keys: Keys, num_groups: int) -> SumTable:
    """The table of a rule's sums; an elementwise rule has none, and gets one that is never filled."""
    scope = rule.scope if isinstance(rule, ReducingRule) else Scope.MODEL
    return ChannelSumTable(layout, keys) if scope is Scope.CHANNEL else TileSumTable(layout, scope, num_groups)


def sum_vectors(vectors: Sequence[Tensor]) -> Tensor:
    """The all-reduce of shards that live in one process."""
    return torch.stack(list(vectors)).sum(dim=0) if len(vectors) > 1 else vectors[0]


def _is_at_hand(values: Tensor) -> bool:
    """Whether reading values waits for no other device."""
    return values.device.type == "cpu"


def _add(partials: Tensor, segments: Tensor, values: Tensor) -> None:
    for row, its_values in zip(partials, values, strict=True):
        row.index_add_(0, segments, its_values)


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


def _number_channel_segments(extent: Extent, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the runs of equal (block, channel) of an extent.

    Returns:
        ``(num_tiles,)``, what makes the number of an element's segment when its channel in its tensor is added; and
        ``(num_segments,)``, the channel of each segment.
    """
    tensors, numel = np.asarray(extent.params, np.int64), keys.channel_numel[extent.tensor_of_tile]
    counts = np.diff(keys.first_channel)[tensors]
    channels_before = np.repeat(np.cumsum(counts) - counts, np.diff(extent.first_tile))
    # A segment begins with each channel, and where a block begins within one.
    start = extent.index_in_tensor * TILE_NUMEL
    is_cut = (np.arange(extent.num_tiles) % extent.tiles_per_block == 0) & (start % numel != 0)
    cut_channels = (keys.first_channel[extent.tensor_of_tile] + start // numel)[is_cut]
    channels = [np.arange(keys.first_channel[tensor], keys.first_channel[tensor + 1]) for tensor in tensors]
    return channels_before + np.cumsum(is_cut), np.sort(np.concatenate((*channels, cut_channels)))
