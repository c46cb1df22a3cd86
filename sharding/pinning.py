"""Shared memory that a GPU reads and writes by itself."""

from __future__ import annotations

import weakref

import torch

from .errors import SegmentError
from .segments import Segment

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of the process."""


def pin(segment: Segment) -> None:
    """Lock a segment in memory, so that a GPU reads and writes it without the CPU, for as long as it lives.

    Raises:
        SegmentError: If CUDA refuses.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = torch.frombuffer(segment, dtype=torch.uint8).data_ptr()
    error = int(runtime.cudaHostRegister(address, len(segment), _PORTABLE))
    if error:
        raise SegmentError(
            f"{len(segment)} bytes of shared memory: expected cudaHostRegister to pin them, got CUDA's error {error}; "
            "give this process more memory that it may lock, or see whether an earlier operation on the GPU failed"
        )
    # Before the memory is unmapped, as weak references are told first.
    weakref.finalize(segment, runtime.cudaHostUnregister, address)
