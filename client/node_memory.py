"""A worker's side of the memory that it shares with the shards of its node."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..sharding.pinning import pin
from ..sharding.segments import Placement, Segment, Span, allocate

logger = logging.getLogger("stepwell")


class NodeMemory:
    """Memory of one worker's buffers, and which shards map it.

    Attributes:
        is_near: Which shards do; nothing need be told to them but where it is.
    """

    def __init__(self) -> None:
        self.is_near: list[bool] = []
        # A segment lives as long as a tensor of it: with the buffers, whoever has them.
        self._segments: weakref.WeakSet[Segment] = weakref.WeakSet()
        self._why: list[str | None] | None = None

    def note(self, why_not: Sequence[str | None]) -> None:
        """Take in which shards can map a worker's memory: None, or why one cannot."""
        if self._why != list(why_not):
            ways = (
                f"shard {shard}: {'shared memory' if why is None else f'the object store ({why})'}"
                for shard, why in enumerate(why_not)
            )
            logger.info("gradients and parameters go by %s", "; ".join(ways))
        self._why, self.is_near = list(why_not), [why is None for why in why_not]

    def is_near_now(self, shard: int) -> bool:
        """Whether a shard maps this memory, as far as is known at the moment."""
        return self.is_near[shard]

    def allocate(self, sizes: Sequence[tuple[int, torch.dtype]], device: torch.device) -> list[Tensor] | None:
        """Flat tensors, all zero, that near shards can map, and ``device`` too; None if nobody would.

        Raises:
            SegmentError: If there is not enough memory.
        """
        if device.type == "cpu" and not any(self.is_near):
            return None
        segment, parts = allocate(sizes)
        if device.type == "cuda":
            pin(segment)
        self._segments.add(segment)
        return parts

    def placement(self, parts: Sequence[Tensor]) -> Placement | None:
        """Where flat tensors lie, if they all lie in one of the segments; empty ones lie anywhere."""
        for segment in self._segments:
            spans = [Span(0, 0, part.dtype) if part.numel() == 0 else segment.span_of(part) for part in parts]
            found = tuple(span for span in spans if span is not None)
            if len(found) == len(parts):
                return Placement(segment.address, found)
        return None
