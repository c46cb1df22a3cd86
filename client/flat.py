"""A worker's side of the flat space: buffers for gradients and parameters, with a view for each parameter's part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..optim import TILE_NUMEL
from ..sharding.coverage import Coverage, Part
from ..sharding.layout import Extent, Layout, wire_dtype

Allocate = Callable[[Sequence[tuple[int, torch.dtype]], torch.device], list[Tensor]]
"""Gives flat tensors, all zero, of these numbers of elements and dtypes on a device."""


def allocate_zeros(sizes: Sequence[tuple[int, torch.dtype]], device: torch.device) -> list[Tensor]:
    """Memory of this process alone."""
    return [torch.zeros(numel, dtype=dtype, device=device) for numel, dtype in sizes]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a run of one parameter lies in a buffer.

    Attributes:
        param: Parameter index.
        offset: Where the run begins in the flattened parameter.
        part: Which of the buffer's parts it lies in.
        start: Where it begins there.
        view: ``(numel,)`` of the buffer.
    """

    param: int
    offset: int
    part: int
    start: int
    view: Tensor


class FlatBuffer:
    """What a rank pushes or holds, packed into one flat tensor per extent. Padding is and stays zero.

    Args:
        layout: The flat space.
        coverage: Where the rank's part lies in it; None for everything.
        device: Where the buffer lives.
        part: Which of the rank's two coverages it is.
        parts: Memory to use, of at least the sizes needed and with zeros as padding; None allocates it.
        dtype: What to hold, where there is no memory to use; None takes each extent's wire dtype.
        allocate: Where memory comes from otherwise.

    Attributes:
        parts: Per extent ``(coverage.numel(extent),)``.
        places: Every run of every parameter, in order.
        elsewhere: By its number among the places, what stands in for one whose memory here does not count.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        *,
        coverage: Coverage | None = None,
        part: Part = "held",
        parts: Sequence[Tensor] | None = None,
        dtype: torch.dtype | None = None,
        allocate: Allocate = allocate_zeros,
    ) -> None:
        self.part = part
        self._coverage = Coverage.whole(layout) if coverage is None else coverage
        if parts is None:
            sizes = (self._coverage.numel(index) for index in range(len(layout.extents)))
            dtypes = (dtype or wire_dtype(layout, extent) for extent in layout.extents)
            parts = allocate(list(zip(sizes, dtypes, strict=True)), device)
        self.parts = [each[: self._coverage.numel(index)] for index, each in enumerate(parts)]
        self.elsewhere: Mapping[int, Tensor] = {}
        self._shard_parts: dict[tuple[int, int], list[Tensor]] = {}
        self.places = tuple(
            place
            for index, extent in enumerate(layout.extents)
            for place in _places(layout, extent, self.parts[index], self._coverage, index)
        )

    def shard_parts(self, layout: Layout, shard: int, num_shards: int) -> list[Tensor]:
        """The parts of the buffer that a shard owns, as views."""
        if (shard, num_shards) not in self._shard_parts:
            parts = []
            for index, (extent, part) in enumerate(zip(layout.extents, self.parts, strict=True)):
                tiles = extent.tile_range(shard, num_shards)
                _, where = self._coverage.within(index, tiles.start * TILE_NUMEL, tiles.stop * TILE_NUMEL)
                parts.append(part[where])
            self._shard_parts[shard, num_shards] = parts
        return self._shard_parts[shard, num_shards]

    def shard_pieces(self, layout: Layout, shard: int, num_shards: int) -> list[Tensor]:
        """The same, with what lies elsewhere; in one or more pieces for each extent. Of a buffer of everything."""
        if not self.elsewhere:
            return self.shard_parts(layout, shard, num_shards)
        pieces = []
        for index, (extent, part) in enumerate(zip(layout.extents, self.parts, strict=True)):
            tiles = extent.tile_range(shard, num_shards)
            taken, stop = tiles.start * TILE_NUMEL, tiles.stop * TILE_NUMEL
            its_pieces = []
            for at, values in sorted(self.elsewhere.items()):
                place = self.places[at]
                first, last = max(place.start, taken), min(place.start + len(values), stop)
                if place.part == index and first < last:
                    its_pieces += [part[taken:first], values[first - place.start : last - place.start]]
                    taken = last
            its_pieces.append(part[taken:stop])
            pieces += [piece for piece in its_pieces if len(piece)] or its_pieces  # of no tiles one piece
        return pieces


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy many tensors, converting dtype and device."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def _places(layout: Layout, extent: Extent, packed: Tensor, coverage: Coverage, index: int) -> Iterator[Place]:
    """The runs of an extent's parameters, cut where the coverage's runs are."""
    for position, param in enumerate(extent.params):
        start = int(extent.first_tile[position]) * TILE_NUMEL
        runs, where = coverage.within(index, start, start + layout.params[param].numel)
        taken = where.start
        for first, last in runs.tolist():
            yield Place(param, first, index, taken, packed[taken : taken + last - first])
            taken += last - first
