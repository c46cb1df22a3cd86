"""The safetensors format, written as a stream and read in parts: a header in JSON, then the tensors' bytes.

Eight bytes hold the header's length, little-endian. The header maps each tensor's name to its dtype, shape and place
among the bytes behind it, which it must cover without holes. ``safetensors`` itself reads and writes whole tensors in
memory or local files alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

ALIGNMENT = 4096
"""The tensors begin at a multiple of this, a page, for whoever maps them into memory; spaces behind the header."""
WRITE_BYTES = 2**20
"""Written at once. For longer writes Linux looks for larger runs of free memory, and at times takes much longer."""
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
STAGED_BYTES = 2**22
"""Read at once where it cannot go straight to where it belongs."""

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def pack_header(tensors: Sequence[tuple[str, torch.dtype, int]]) -> bytes:
    """What stands before the bytes of ``tensors``, which follow in this order.

    Args:
        tensors: Name, dtype and number of elements of each. The wider dtypes come first, else some lie unaligned.
    """
    sizes = [dtype.itemsize for _, dtype, _ in tensors]
    assert sizes == sorted(sizes, reverse=True), "the wider dtypes come first"
    edges = itertools.accumulate((numel * dtype.itemsize for _, dtype, numel in tensors), initial=0)
    fields = {
        name: {"dtype": _CODES[dtype], "shape": [numel], "data_offsets": place}
        for (name, dtype, numel), place in zip(tensors, itertools.pairwise(edges), strict=True)
    }
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def byte_view(values: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return values.view(torch.uint8).numpy().data


def write_values(stream: BinaryIO, values: Tensor) -> int:
    """Write the bytes of a contiguous CPU tensor, not copied; returns how many."""
    data = byte_view(values)
    return sum(stream.write(data[begin : begin + WRITE_BYTES]) for begin in range(0, len(data), WRITE_BYTES))


class TensorFile:
    """A file of tensors that is open for reading.

    Args:
        stream: The file.
        size_bytes: Its size.

    Raises:
        ValueError: If its header is none.
    """

    def __init__(self, stream: BinaryIO, size_bytes: int) -> None:
        self._stream, self._size_bytes = stream, size_bytes
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size_bytes - 8):
            raise ValueError(f"its header has {length} bytes, the file {size_bytes}")
        header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no map")
        self._header: Mapping[str, Any] = header
        self._begin = 8 + length

    def read_into(self, name: str, numel: int, first: int, out: Tensor) -> None:
        """Fill ``out`` with elements of a tensor.

        Args:
            name: The tensor's.
            numel: How many elements it has.
            first: The first of them to read.
            out: ``(wanted,)``, any floating dtype and device; read into its memory where that is the file's form.

        Raises:
            ValueError: If the file does not hold the tensor so.
        """
        dtype, place = self._find(name, numel)
        self._stream.seek(place + first * dtype.itemsize)
        if out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
            self._fill(byte_view(out))
            return
        staged = torch.empty(min(out.numel(), STAGED_BYTES // dtype.itemsize), dtype=dtype)
        for begin in range(0, out.numel(), max(len(staged), 1)):
            part = out[begin : begin + len(staged)]
            self._fill(byte_view(staged[: len(part)]))
            part.copy_(staged[: len(part)])

    def _find(self, name: str, numel: int) -> tuple[torch.dtype, int]:
        """A tensor's dtype, and where it begins in the file."""
        fields = self._header.get(name)
        if fields is None:
            raise ValueError(f"it has no tensor {name}")
        dtype, shape, (begin, end) = _DTYPES[fields["dtype"]], fields["shape"], fields["data_offsets"]
        if shape != [numel] or end - begin != numel * dtype.itemsize or not 0 <= begin <= end:
            raise ValueError(f"{name}: expected {numel} elements, got shape {shape} at bytes {begin} to {end}")
        if self._begin + end > self._size_bytes:
            raise ValueError(f"{name} ends behind the file's end")
        return dtype, self._begin + begin

    def _fill(self, target: memoryview) -> None:
        filled = 0
        while filled < len(target):
            count = self._stream.readinto(target[filled:])  # type: ignore[attr-defined]  # as every file of fsspec has
            if not count:
                raise ValueError(f"it ends {len(target) - filled} bytes too early")
            filled += count
