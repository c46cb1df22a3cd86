"""Where parameters go after a step: memory that a shard fills for a worker that can be reached there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from .buffers import MASTER, Buffers
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
            source = packed(extent.slots[MASTER.name].view(-1), its_runs)
            if target.data_ptr() != source.data_ptr():  # else the rank reads the masters themselves
                target.copy_(source)
