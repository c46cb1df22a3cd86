"""Partials and totals: sums over the flat space whose bits do not depend on how it is sharded.

A kernel returns one partial per tile, or one term per element where sums are over channels. They are added in float64,
in order or on a GPU by halves, into one partial per (block, key); a block lies in one chunk, so each of these is
computed by exactly one shard, all others hold 0.0 for it. An all-reduce therefore only ever adds zeros, which is exact
in any order. Then every shard adds a key's partials in block order.
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
from .layout import Extent, Layout, number_runs, runs_within
from .run_sums import RunSums


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
        return torch.zeros(num_sums, self.num_segments, dtype=torch.float64, device="cpu")

    def folded(self, num_sums: int, outputs: Iterable[Output]) -> Tensor:
        """Add what a kernel returns to the segments, in order; what a GPU returns all at once, so as to wait once.

        Args:
            num_sums: How many sums there are.
            outputs: Of the kernel's calls, in the order of their tiles.

        Returns:
            ``(num_sums, num_segments)`` float64 on the CPU, 0 in segments that no output is of.
        """
        partials, elsewhere = self.empty(num_sums), dict[int, list[Output]]()
        for output in outputs:
            if _is_at_hand(output):
                _add(partials, *self._reduced(output))
            else:
                elsewhere.setdefault(output.extent, []).append(output)
        for waiting in elsewhere.values():
            segments, sums = self._folded_there(waiting)
            _add(partials, segments, sums.cpu())
        return partials

    @abc.abstractmethod
    def _reduced(self, output: Output) -> tuple[Tensor, Tensor]:
        """Segments ``(n,)`` int64 on the CPU, ascending, and what goes to each, ``(num_sums, n)`` float64, there."""

    @abc.abstractmethod
    def _folded_there(self, outputs: Sequence[Output]) -> tuple[Tensor, Tensor]:
        """The same for all that a shard has of an extent, added up per segment where the outputs are."""

    def totals(self, names: Sequence[str], partials: Tensor) -> dict[str, Tensor]:
        """Add every key's partials in block order: sum name to ``(num_keys,)`` float64."""
        totals = torch.zeros(len(names), self.num_keys, dtype=torch.float64, device="cpu")
        for row, values in zip(totals, partials, strict=True):
            row.index_add_(0, self._key_of_segment, values)
        return dict(zip(names, totals, strict=True))


@final
class TileSumTable(SumTable):
    """Sums over the model, groups or tensors: a segment is the run of tiles of one block with one key."""

    def __init__(self, layout: Layout, scope: Scope, num_groups: int) -> None:
        groups = layout.group_of_tensor().numpy()
        self._edges: list[NDArray[np.int64]] = []
        self._first_segment: list[int] = []
        keys_of_segments: list[NDArray[np.int64]] = []
        for extent in layout.extents:
            first_tiles, keys = _segments(extent, scope, groups)
            self._first_segment.append(sum(map(len, keys_of_segments)))
            self._edges.append(np.append(first_tiles, extent.num_tiles))
            keys_of_segments.append(keys)
        num_keys = {Scope.MODEL: 1, Scope.GROUP: num_groups, Scope.TENSOR: len(layout.params)}[scope]
        super().__init__(num_keys, keys_of_segments)
        self._folds: dict[object, tuple[Tensor, RunSums]] = {}

    def _reduced(self, output: Output) -> tuple[Tensor, Tensor]:
        """See :class:`SumTable`."""
        values, first = torch.stack(list(output.parts)).to(torch.float64), output.first_tile
        numbers = number_runs(self._edges[output.extent], range(first, first + values.shape[1]))
        return torch.from_numpy(numbers + self._first_segment[output.extent]), values

    def _folded_there(self, outputs: Sequence[Output]) -> tuple[Tensor, Tensor]:
        """See :class:`SumTable`. Which tiles go to which segment is worked out once."""
        extent, first = outputs[0].extent, outputs[0].first_tile
        values = torch.cat([torch.stack(list(output.parts)) for output in outputs], dim=1)
        key = extent, first, values.shape[1], values.device
        if key not in self._folds:
            run, lengths = runs_within(self._edges[extent], range(first, first + values.shape[1]))
            segments = torch.arange(run, run + len(lengths), device="cpu") + self._first_segment[extent]
            self._folds[key] = segments, RunSums(lengths, values.device)
        segments, sums = self._folds[key]
        return segments, sums.of(values)


@final
class ChannelSumTable(SumTable):
    """Sums over output channels: a segment is the run of elements of one block in one channel."""

    def __init__(self, layout: Layout, keys: Keys) -> None:
        self._channels = [ChannelMap(extent, keys) for extent in layout.extents]
        self._segments: list[_ChannelSegments] = []
        keys_of_segments: list[NDArray[np.int64]] = []
        for extent in layout.extents:
            self._segments.append(_ChannelSegments(extent, keys, sum(map(len, keys_of_segments))))
            keys_of_segments.append(self._segments[-1].keys)
        super().__init__(keys.num_channels, keys_of_segments)

    def _reduced(self, output: Output) -> tuple[Tensor, Tensor]:
        """See :class:`SumTable`."""
        parts, channels = output.parts, self._channels[output.extent]
        tiles = range(output.first_tile, output.first_tile + len(parts[0]))
        if not channels.any_in(tiles):
            return torch.zeros(0, dtype=torch.int64, device="cpu"), parts[0].new_zeros(
                (len(parts), 0), dtype=torch.float64
            )
        runs = channels.runs(tiles)
        is_within = runs.channel >= 0
        base = self._segments[output.extent].bases(tiles)
        segments = torch.from_numpy((base[runs.tile] + runs.channel)[is_within])
        kept = torch.from_numpy(np.flatnonzero(is_within)).to(parts[0].device, non_blocking=True)
        return segments, run_sums(torch.stack(list(parts)), runs.lengths)[:, kept]

    def _folded_there(self, outputs: Sequence[Output]) -> tuple[Tensor, Tensor]:
        """See :class:`SumTable`. A segment may go on from one output to the next."""
        parts, values = zip(*map(self._reduced, outputs), strict=True)
        segments, lengths = np.unique_counts(torch.cat(parts).numpy())
        return torch.from_numpy(segments), RunSums(lengths, values[0].device).of(torch.cat(values, dim=1))


def sum_table(layout: Layout, rule: Rule, *, keys: Keys, num_groups: int) -> SumTable:
    """The table of a rule's sums; an elementwise rule has none, and gets one that is never filled."""
    scope = rule.scope if isinstance(rule, ReducingRule) else Scope.MODEL
    return ChannelSumTable(layout, keys) if scope is Scope.CHANNEL else TileSumTable(layout, scope, num_groups)


def sum_vectors(vectors: Sequence[Tensor]) -> Tensor:
    """The all-reduce of shards that live in one process."""
    return torch.stack(list(vectors)).sum(dim=0) if len(vectors) > 1 else vectors[0]


def _is_at_hand(output: Output) -> bool:
    """Whether reading it waits for no other device."""
    return output.parts[0].device.type == "cpu"


def _add(partials: Tensor, segments: Tensor, values: Tensor) -> None:
    for row, its_values in zip(partials, values, strict=True):
        row.index_add_(0, segments, its_values)


def _segments(
    extent: Extent, scope: Scope, group_of_tensor: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the runs of equal (block, key) of an extent begin, and their keys; ``(num_segments,)`` int64 each."""
    params = np.asarray(extent.params, np.int64)
    key_of_tensor: Mapping[Scope, NDArray[np.int64]] = {
        Scope.MODEL: np.zeros(len(params), np.int64),
        Scope.GROUP: group_of_tensor[params],
        Scope.TENSOR: params,
    }
    blocks = np.arange(0, extent.num_tiles, extent.tiles_per_block)
    begun = extent.first_tile[:-1]
    tiles = np.unique(np.concatenate((blocks, begun[begun < extent.num_tiles])))
    keys = key_of_tensor[scope][_position_of(extent, tiles)]
    is_begun = np.concatenate(([True], keys[1:] != keys[:-1]))[: len(tiles)] | (tiles % extent.tiles_per_block == 0)
    return tiles[is_begun], keys[is_begun]


class _ChannelSegments:
    """The runs of equal (block, channel) of an extent.

    Args:
        extent: The extent.
        keys: The channels.
        first_segment: Number of the first of them.

    Attributes:
        keys: ``(num_segments,)`` int64, the channel of each.
    """

    def __init__(self, extent: Extent, keys: Keys, first_segment: int) -> None:
        self._extent = extent
        tensors = np.asarray(extent.params, np.int64)
        counts = np.diff(keys.first_channel)[tensors]
        self._channels_before = first_segment + np.cumsum(counts) - counts
        # A segment begins with each channel, and where a block begins within one.
        blocks = np.arange(0, extent.num_tiles, extent.tiles_per_block)
        positions = _position_of(extent, blocks)
        start, of = (blocks - extent.first_tile[positions]) * TILE_NUMEL, tensors[positions]
        is_cut = start % keys.channel_numel[of] != 0
        self._cuts = blocks[is_cut]
        cut_channels = (keys.first_channel[of] + start // keys.channel_numel[of])[is_cut]
        channels = [np.arange(keys.first_channel[tensor], keys.first_channel[tensor + 1]) for tensor in tensors]
        self.keys: NDArray[np.int64] = np.sort(np.concatenate((*channels, cut_channels)))

    def bases(self, tiles: range) -> NDArray[np.int64]:
        """What makes the number of an element's segment when its channel in its tensor is added, for each tile."""
        cuts_before = np.searchsorted(self._cuts, np.arange(tiles.start, tiles.stop), side="right")
        return self._channels_before[self._extent.positions(tiles)] + cuts_before


def _position_of(extent: Extent, tiles: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position in ``extent.params`` of the tensor that each of some tiles is of."""
    return np.searchsorted(extent.first_tile, tiles, side="right") - 1
