"""A worker's side of the flat space: one buffer for gradients, one for parameters, with a view for each parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..optim import TILE_NUMEL
from ..sharding.layout import Extent, Layout, dtype_from_name


class FlatBuffer:
    """One padded flat tensor per extent, and a view of each parameter's place in it. Padding is and stays zero.

    Args:
        layout: The flat space.
        device: Where the buffer lives.

    Attributes:
        parts: Per extent ``(padded_numel,)`` in the extent's wire dtype.
        views: Per parameter a view of its shape.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.parts = [
            torch.zeros(extent.padded_numel, dtype=wire_dtype(layout, extent), device=device)
            for extent in layout.extents
        ]
        views: dict[int, Tensor] = {}
        for extent, part in zip(layout.extents, self.parts, strict=True):
            for position, index in enumerate(extent.params):
                param = layout.params[index]
                start = int(extent.first_tile[position]) * TILE_NUMEL
                views[index] = part[start : start + param.numel].view(param.shape)
        self.views = [views[index] for index in range(len(layout.params))]

    def shard_parts(self, layout: Layout, shard: int, num_shards: int) -> list[Tensor]:
        """The parts of the buffer that a shard owns, as views."""
        ranges = (extent.tile_range(shard, num_shards) for extent in layout.extents)
        return [
            part[tiles.start * TILE_NUMEL : tiles.stop * TILE_NUMEL]
            for part, tiles in zip(self.parts, ranges, strict=True)
        ]


def wire_dtype(layout: Layout, extent: Extent) -> torch.dtype:
    """What an extent's gradients and parameters travel in: the model's dtype if it is one, else the state's."""
    dtypes = {layout.params[index].dtype for index in extent.params}
    return dtype_from_name(dtypes.pop()) if len(dtypes) == 1 else extent.dtype


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy many tensors, converting dtype and device."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
