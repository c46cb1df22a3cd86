"""The safetensors format, written as a stream and read in parts: a header in JSON, then the tensors' bytes.

Eight bytes hold the header's length, little-endian. The header maps each tensor's name to its dtype, shape and place
among the bytes behind it, which it must cover without holes. ``safetensors`` itself reads and writes whole tensors in
memory or local files alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .digests import PieceDigests, digest_of

ALIGNMENT = 4096
"""The tensors begin at a multiple of this, a page, for whoever maps them into memory; spaces behind the header."""
WRITE_BYTES = 2**20
"""Written at once, or read for a digest. For longer writes Linux looks for larger runs of free memory, and at times
takes much longer."""
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
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def byte_view(values: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return values.view(torch.uint8).numpy().data


def write_values(stream: BinaryIO, values: Tensor, digests: PieceDigests) -> None:
    """Write the bytes of a contiguous CPU tensor, not copied; their digest is taken while they are in the cache."""
    data = byte_view(values)
    for begin in range(0, len(data), WRITE_BYTES):
        part = data[begin : begin + WRITE_BYTES]
        digests.update(part)
        stream.write(part)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in its file: its dtype and number of elements, and its first byte."""

    dtype: torch.dtype
    numel: int
    begin: int

    @property
    def size_bytes(self) -> int:
        """Its bytes."""
        return self.numel * self.dtype.itemsize


class TensorFile:
    """A file of tensors that is open for reading.

    Args:
        stream: The file.
        size_bytes: Its size.
        header_bytes: How many of them stand before the tensors.
        header_digest: Their digest.

    Attributes:
        places: Where each tensor lies, by name. Together they are all that follows the header, each byte once.

    Raises:
        ValueError: If its header is another, or none.
    """

    def __init__(self, stream: BinaryIO, *, size_bytes: int, header_bytes: int, header_digest: int) -> None:
        self._stream = stream
        if not 8 < header_bytes <= min(8 + MAX_HEADER_BYTES, size_bytes):
            raise ValueError(f"its header has {header_bytes} bytes, the file {size_bytes}")
        stream.seek(0)
        header = bytearray(header_bytes)
        self._fill(memoryview(header))
        if digest_of(memoryview(header)) != header_digest:
            raise ValueError("its header is damaged: it has not the digest that the manifest says")
        if int.from_bytes(header[:8], "little") != header_bytes - 8:
            raise ValueError(
                f"its header has {int.from_bytes(header[:8], 'little')} bytes, expected {header_bytes - 8}"
            )
        self.places = _places(bytes(header[8:]), header_bytes, size_bytes)

    def require_tensors(self, expected: Mapping[str, tuple[torch.dtype, int]]) -> None:
        """See that it holds these tensors, of these dtypes and numbers of elements, and no other.

        Raises:
            ValueError: Naming one that differs.
        """
        found = {name: (place.dtype, place.numel) for name, place in self.places.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(f"{name}: expected {expected.get(name)}, got {found.get(name)}")

    def digest(self, place: Place) -> int:
        """The digest of a tensor as it lies in the file.

        Raises:
            ValueError: If the file has become shorter.
        """
        self._stream.seek(place.begin)
        digests, left = PieceDigests([place.size_bytes]), place.size_bytes
        staged = memoryview(bytearray(min(left, WRITE_BYTES)))
        while left:
            part = staged[:left]
            self._fill(part)
            digests.update(part)
            left -= len(part)
        return digests.values()[0]

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
        place = self.places.get(name)
        if place is None or place.numel != numel:
            raise ValueError(f"{name}: expected {numel} elements, got {place.numel if place else 'no such tensor'}")
        dtype = place.dtype
        self._stream.seek(place.begin + first * dtype.itemsize)
        if out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
            self._fill(byte_view(out))
            return
        staged = torch.empty(min(out.numel(), STAGED_BYTES // dtype.itemsize), dtype=dtype, device="cpu")
        for begin in range(0, out.numel(), max(len(staged), 1)):
            part = out[begin : begin + len(staged)]
            self._fill(byte_view(staged[: len(part)]))
            part.copy_(staged[: len(part)])

    def _fill(self, target: memoryview) -> None:
        filled = 0
        while filled < len(target):
            count = self._stream.readinto(target[filled:])  # type: ignore[attr-defined]  # as every file of fsspec has
            if not count:
                raise ValueError(f"it ends {len(target) - filled} bytes too early")
            filled += count


def _places(text: bytes, begin: int, size_bytes: int) -> dict[str, Place]:
    """What a header says, if that is tensors of ours that lie side by side from ``begin`` to the file's end.

    Raises:
        ValueError: If it is not.
    """
    try:
        fields: Mapping[str, Any] = json.loads(text)
        entries = sorted((tuple(entry["data_offsets"]), name, entry) for name, entry in fields.items())
        places, reached = dict[str, Place](), begin
        for (first, last), name, entry in entries:
            (numel,) = entry["shape"]
            place = Place(_DTYPES[entry["dtype"]], numel, reached)
            if numel < 0 or (begin + first, last - first) != (reached, place.size_bytes):
                raise ValueError(f"{name} has {numel} elements and lies at {first} to {last}")
            places[name], reached = place, begin + last
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is none of ours ({type(error).__name__}: {error})") from error
    if reached != size_bytes:
        raise ValueError(f"its tensors end at byte {reached}, the file at {size_bytes}")
    return places
