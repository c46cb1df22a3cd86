"""Shared memory between the processes of one node, without a name: nothing is left over, whatever dies.

The owner makes anonymous memory, and another process that may look at the owner's opens it by the owner's process id
and descriptor, ``/proc/<pid>/fd/<fd>``. There is no file to remove and no size of /dev/shm to heed. The memory goes
when the last process that has it mapped or open lets go of it or ends; until the owner does, it can be opened again.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import math
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from .available import available_bytes
from .errors import MessageError, SegmentError

ALIGNMENT = mmap.PAGESIZE
"""Where parts begin; the token has a page of its own before them."""
TOKEN_BYTES = 16
_NAME = "stepwell"
_ELSEWHERE = "the worker has ended, is of another user or in another container (pid namespace)"


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """Where another process of the node finds a segment.

    Attributes:
        pid: The owner's process id, in its own pid namespace.
        fd: The owner's descriptor.
        size_bytes: The segment's size.
        token: What stands at its head. Of ids alone one could be led to other memory: in another pid namespace, or
            after the owner has ended and its id was given away.
    """

    pid: int
    fd: int
    size_bytes: int
    token: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A flat tensor within a segment; ``offset`` in bytes."""

    offset: int
    numel: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Flat tensors in one segment, as another process of the node finds them."""

    address: Address
    spans: tuple[Span, ...]


class Segment(mmap.mmap):
    """A mapped segment. It lives as long as any of its tensors; never close it by hand, they would point nowhere.

    Attributes:
        address: Where other processes find it.
    """

    address: Address

    def __new__(cls, fd: int, address: Address) -> Self:
        """Map what ``fd`` stands for; use :func:`allocate` and :func:`open_segment`."""
        try:
            segment = super().__new__(cls, fd, address.size_bytes)
        except OSError as error:
            raise SegmentError(f"{address.size_bytes} bytes of shared memory cannot be mapped: {error}") from error
        segment.address = address
        return segment

    def tensor(self, span: Span) -> Tensor:
        """``(span.numel,)`` with a storage of its own, which holds nothing else.

        Raises:
            MessageError: If it is not within the segment.
        """
        itemsize = span.dtype.itemsize
        if span.numel == 0:
            return torch.empty(0, dtype=span.dtype, device="cpu")
        is_within = span.offset >= ALIGNMENT and span.offset + span.numel * itemsize <= len(self)
        if not is_within or span.numel < 0 or span.offset % itemsize:
            raise MessageError(
                f"shared memory: expected a part within bytes {ALIGNMENT} to {len(self)}, got {span.numel} x "
                f"{span.dtype} at byte {span.offset}"
            )
        return torch.frombuffer(self, dtype=span.dtype, count=span.numel, offset=span.offset)

    def span_of(self, tensor: Tensor) -> Span | None:
        """Where a flat, contiguous tensor lies in this segment; None if it lies elsewhere."""
        start = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        offset = tensor.data_ptr() - start
        is_within = offset >= 0 and offset + tensor.numel() * tensor.itemsize <= len(self)
        return Span(offset, tensor.numel(), tensor.dtype) if is_within else None


def allocate(sizes: Sequence[tuple[int, torch.dtype]]) -> tuple[Segment, list[Tensor]]:
    """Make a segment that holds flat tensors, all zero; this process owns it.

    Args:
        sizes: Each tensor's number of elements and dtype.

    Raises:
        SegmentError: If there is no such memory here, or not enough of it. A process that touches shared memory which
            the machine does not have is ended by a signal, so all of it is taken at once.
    """
    spans, size_bytes = spans_of(sizes)
    address, fd = make_memory(size_bytes)
    try:
        segment = Segment(fd, address)
    except BaseException:
        os.close(fd)
        raise
    weakref.finalize(segment, os.close, fd)
    return segment, [segment.tensor(span) for span in spans]


def spans_of(sizes: Sequence[tuple[int, torch.dtype]]) -> tuple[tuple[Span, ...], int]:
    """Where flat tensors lie in a segment that holds them, and its size in bytes."""
    starts = [ALIGNMENT, *(-(-numel * dtype.itemsize // ALIGNMENT) * ALIGNMENT for numel, dtype in sizes)]
    *offsets, size_bytes = itertools.accumulate(starts)
    spans = (Span(offset, numel, dtype) for offset, (numel, dtype) in zip(offsets, sizes, strict=True))
    return tuple(spans), size_bytes


def open_segment(address: Address) -> Segment:
    """Map another process's segment.

    Raises:
        SegmentError: If it cannot be reached from here, or is not what was named.
    """
    fd = hold_segment(address)
    try:
        return Segment(fd, address)
    finally:
        os.close(fd)


def hold_segment(address: Address) -> int:
    """A descriptor of another process's segment, which lives as long as that is open.

    Raises:
        SegmentError: If it cannot be reached from here, or is not what was named.
    """
    path = f"/proc/{address.pid}/fd/{address.fd}"
    try:
        # Looked at before it is opened, which may mean something to what else has this name.
        name = os.readlink(path)
        if not name.startswith(f"/memfd:{_NAME}"):
            raise SegmentError(f"{path}: expected shared memory, got {name}; {_ELSEWHERE}")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentError(f"{path}: {error.strerror}; {_ELSEWHERE}") from error
    try:
        _check(fd, address, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(fd: int, address: Address, path: str) -> None:
    if os.fstat(fd).st_size != address.size_bytes:
        raise SegmentError(f"{path}: expected {address.size_bytes} bytes, got {os.fstat(fd).st_size}; {_ELSEWHERE}")
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise SegmentError(f"{path}: expected memory that its owner cannot cut short; {_ELSEWHERE}")
    if not secrets.compare_digest(os.pread(fd, TOKEN_BYTES, 0), address.token):
        raise SegmentError(f"{path}: other memory than was named lies there; {_ELSEWHERE}")


def make_memory(size_bytes: int) -> tuple[Address, int]:
    """Anonymous memory that is really there, all zero but for its token, and its descriptor, which nobody closes.

    Raises:
        SegmentError: As :func:`allocate`.
    """
    if not hasattr(os, "memfd_create") or not hasattr(fcntl, "F_ADD_SEALS"):
        raise SegmentError(
            "shared memory between worker and shards: expected Linux's memfd_create, got a system without"
        )
    available = available_bytes()
    if size_bytes > available:
        raise SegmentError(_too_large(size_bytes, available))
    fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(fd)
        raise SegmentError(f"{_too_large(size_bytes, available_bytes())} ({error.strerror})") from error
    except BaseException:
        os.close(fd)
        raise
    address = Address(os.getpid(), fd, size_bytes, new_token())
    os.pwrite(fd, address.token, 0)
    return address, fd


def new_token() -> bytes:
    """A token that no other memory has."""
    return secrets.token_bytes(TOKEN_BYTES)


def _too_large(size_bytes: int, available: int) -> str:
    return (
        f"shared memory for gradients or parameters: expected {math.ceil(size_bytes / 2**20)} MiB, got "
        f"{available // 2**20} MiB free on this machine or in this container; give it more memory, or run fewer "
        "workers on it"
    )
