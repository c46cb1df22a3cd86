"""Where parameters go after a step: memory that a shard fills for a worker that can be reached there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ..optim import TILE_NUMEL
from .buffers import MASTER, Buffers, ExtentBuffers
from .coverage import Part, Runs, packed
from .errors import MessageError
from .layout import dtype_from_name, dtype_name


@dataclasses.dataclass(frozen=True, slots=True)
class Sink:
    """One rank's memory for what one shard owns of the parameters. It belongs to the shard from push to reply.

    Attributes:
        part: Which of the rank's two coverages.
        parts: Per extent the rank's runs, packed, in the wire's dtype.
    """

    part: Part
    parts: tuple[Tensor, ...]

    def require_fits(self, runs: Sequence[Runs], rank: int) -> None:
        """Refuse memory that is not of the runs' sizes, before anything is written to it.

        Raises:
            MessageError: If the number of extents or a length is off.
            UnsupportedParameterError: If a dtype is none that parameters have.
        """
        expected, got = [int((each[:, 1] - each[:, 0]).sum()) for each in runs], [len(part) for part in self.parts]
        if got != expected:
            raise MessageError(f"parameters of rank {rank}: expected memory for {expected} elements, got {got}")
        for part in self.parts:
            dtype_from_name(dtype_name(part.dtype))

    def fill(self, runs: Sequence[Runs], buffers: Buffers) -> None:
        """Copy the runs' parameters there, rounded to the wire's dtype."""
        for target, extent, its_runs in zip(self.parts, buffers.extents, runs, strict=True):
            _fill(target, extent, its_runs)


class Delivery:
    """All ranks' sinks in one step.

    Args:
        sinks: Sinks and the runs that they are for.
        buffers: The shard's memory.

    Attributes:
        direct: Per extent what is of whole tiles, for the pass that writes parameters to write there as well: tiles,
            counted from the shard's first, and ``(tiles, 256)`` memory in the wire's dtype.
    """

    def __init__(self, sinks: Sequence[tuple[Sink, Sequence[Runs]]], buffers: Buffers) -> None:
        self._sinks, self._buffers = sinks, buffers
        self._rest: list[tuple[Tensor, ExtentBuffers, Runs]] = []
        self.direct: list[list[tuple[range, Tensor]]] = [[] for _ in buffers.extents]
        for sink, runs in sinks:
            for target, extent, its_runs, direct in zip(sink.parts, buffers.extents, runs, self.direct, strict=True):
                tiles = _whole_tiles(its_runs)
                if tiles is not None and target.device == extent.device:
                    direct.append((tiles, target.view(-1, TILE_NUMEL)))
                else:
                    self._rest.append((target, extent, its_runs))

    def finish(self, *, is_begun: bool) -> None:
        """Copy what no pass has written; all of it, if none has."""
        if is_begun:
            for target, extent, its_runs in self._rest:
                _fill(target, extent, its_runs)
        else:
            for sink, runs in self._sinks:
                sink.fill(runs, self._buffers)


def _fill(target: Tensor, extent: ExtentBuffers, runs: Runs) -> None:
    target.copy_(packed(extent.slots[MASTER.name].view(-1), runs))


def _whole_tiles(runs: Runs) -> range | None:
    """The tiles of runs that are one of whole tiles; else None."""
    if len(runs) != 1 or (runs % TILE_NUMEL).any():
        return None
    return range(*(runs[0] // TILE_NUMEL).tolist())
