"""A worker's side of the flat space: buffers for gradients and parameters, with a view for each parameter's part."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..optim import TILE_NUMEL
from ..sharding.coverage import Coverage, Part
from ..sharding.layout import Extent, Layout, wire_dtype


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a run of one parameter lies in a buffer.

    Attributes:
        param: Parameter index.
        offset: Where the run begins in the flattened parameter.
        view: ``(numel,)`` of the buffer.
    """

    param: int
    offset: int
    view: Tensor


class FlatBuffer:
    """What a rank pushes or holds, packed into one flat tensor per extent. Padding is and stays zero.

    Args:
        layout: The flat space.
        coverage: Where the rank's part lies in it; None for everything.
        device: Where the buffer lives.
        part: Which of the rank's two coverages it is.
        parts: Memory to use, of at least the sizes needed and all zero; None allocates it.

    Attributes:
        parts: Per extent ``(coverage.numel(extent),)`` in the extent's wire dtype.
        places: Every run of every parameter, in order.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        *,
        coverage: Coverage | None = None,
        part: Part = "held",
        parts: Sequence[Tensor] | None = None,
    ) -> None:
        self.part = part
        self._coverage = Coverage.whole(layout) if coverage is None else coverage
        if parts is None:
            sizes = (self._coverage.numel(index) for index in range(len(layout.extents)))
            dtypes = (wire_dtype(layout, extent) for extent in layout.extents)
            parts = [torch.zeros(n, dtype=dtype, device=device) for n, dtype in zip(sizes, dtypes, strict=True)]
        self.parts = [each[: self._coverage.numel(index)] for index, each in enumerate(parts)]
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
            yield Place(param, first, packed[taken : taken + last - first])
            taken += last - first
