"""The memory of workers on its node that a shard has mapped."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Literal

from torch import Tensor

from ..sharding.errors import SegmentError
from ..sharding.pinning import pin
from ..sharding.segments import Address, Placement, Segment, open_segment

logger = logging.getLogger("stepwell")

Use = Literal["gradient", "parameters"]


class Mappings:
    """Of each rank what its last requests named; on a shard actor's event loop.

    A request names the memory that it means, so that all that is kept here can be forgotten at any time. What a push
    in an inbox lies in stays mapped by the push itself.

    Args:
        num_kept: How many mappings of each rank and use are kept.
        are_pinned: Whether a GPU copies from and to them.
    """

    def __init__(self, num_kept: int = 1, *, are_pinned: bool = False) -> None:
        self._num_kept, self._are_pinned = num_kept, are_pinned
        self._segments: dict[tuple[int, Use], list[Segment]] = {}
        self._owners: dict[int, tuple[int, int]] = {}

    def tensors(self, rank: int, use: Use, placement: Placement) -> tuple[Tensor, ...]:
        """Map what a rank names; of the same use the last few mappings are kept, as gradients take turns in memory.

        Raises:
            SegmentError: If it cannot be reached.
            MessageError: If a tensor is not within it.
        """
        known = self._segments.get((rank, use), [])
        segment = next((each for each in known if each.address == placement.address), None)
        if segment is None:
            segment = self._open(placement.address)
        tensors = tuple(map(segment.tensor, placement.spans))
        self._watch(rank, placement.address.pid)
        others = [each for each in known if each is not segment]
        self._segments[rank, use] = [*others[1 - self._num_kept :], segment] if self._num_kept > 1 else [segment]
        return tensors

    def forget(self, rank: int) -> None:
        """Give up what a rank's worker had named: it has left, or ended, or another process takes its place."""
        for key in [key for key in self._segments if key[0] == rank]:
            del self._segments[key]
        _, descriptor = self._owners.pop(rank, (0, None))
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    def _open(self, address: Address) -> Segment:
        segment = open_segment(address)
        if self._are_pinned:
            try:
                pin(segment)
            except SegmentError as error:
                logger.warning("copies between this shard's GPU and workers' memory take longer: %s", error)
                self._are_pinned = False
        return segment

    def _watch(self, rank: int, pid: int) -> None:
        """See to it that a worker's memory is given up when its process ends."""
        if rank in self._owners:
            if self._owners[rank][0] == pid:
                return
            self.forget(rank)
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise SegmentError(f"rank {rank}: its process {pid} has ended") from error
        self._owners[rank] = pid, descriptor
        asyncio.get_running_loop().add_reader(descriptor, self.forget, rank)
