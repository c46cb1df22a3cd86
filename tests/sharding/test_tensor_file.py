"""The safetensors format against safetensors itself: what one writes the other reads."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from stepwell.sharding.digests import PieceDigests
from stepwell.sharding.tensor_file import ALIGNMENT, TensorFile, byte_view, pack_header, write_values

DTYPES = [torch.float64, torch.float32, torch.bfloat16]

tensor_lists = st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 40)), max_size=12)


def tensors_of(kinds: list[tuple[torch.dtype, int]]) -> dict[str, Tensor]:
    """Random bits, the wider dtypes first."""
    kinds = sorted(kinds, key=lambda kind: -kind[0].itemsize)
    return {
        f"{index}/exp_avg/0": torch.arange(1, numel + 1).to(dtype) / (index + 3)
        for index, (dtype, numel) in enumerate(kinds)
    }


def packed(tensors: dict[str, Tensor]) -> bytes:
    header = pack_header([(name, values.dtype, values.numel()) for name, values in tensors.items()])
    return header + b"".join(bytes(byte_view(values)) for values in tensors.values())


def opened(data: bytes) -> TensorFile:
    """With the header's true length and digest, so that what it says counts."""
    header_bytes = min(8 + int.from_bytes(data[:8], "little"), 2**61)
    digest = xxhash.xxh3_64_intdigest(data[:header_bytes])
    return TensorFile(io.BytesIO(data), size_bytes=len(data), header_bytes=header_bytes, header_digest=digest)


def read(data: bytes, name: str, numel: int, first: int, out: Tensor) -> None:
    opened(data).read_into(name, numel, first, out)


@given(tensor_lists)
def test_safetensors_reads_what_we_write(kinds: list[tuple[torch.dtype, int]]) -> None:
    tensors = tensors_of(kinds)
    data = packed(tensors)
    assert (8 + int.from_bytes(data[:8], "little")) % ALIGNMENT == 0
    found = safetensors.torch.load(data)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values)


@pytest.mark.parametrize("kinds", [[], [(torch.bfloat16, 3), (torch.float32, 5), (torch.float64, 1)]])
def test_safe_open_maps_what_we_write(tmp_path: Path, kinds: list[tuple[torch.dtype, int]]) -> None:
    """From a file it takes another way than from bytes: into memory, where alignment counts."""
    tensors = tensors_of(kinds)
    (tmp_path / "file.safetensors").write_bytes(packed(tensors))
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert set(file.keys()) == tensors.keys()
        for name, values in tensors.items():
            assert torch.equal(file.get_tensor(name), values)
            assert file.get_slice(name).get_shape() == [values.numel()]


@given(tensor_lists, st.data())
def test_we_read_what_safetensors_writes(kinds: list[tuple[torch.dtype, int]], data: st.DataObject) -> None:
    tensors = tensors_of(kinds)
    written = safetensors.torch.save(tensors)
    for name, values in tensors.items():
        first = data.draw(st.integers(0, values.numel()))
        stop = data.draw(st.integers(first, values.numel()))
        for dtype in (values.dtype, torch.float64):
            out = torch.empty(stop - first, dtype=dtype)
            read(written, name, values.numel(), first, out)
            assert torch.equal(out, values[first:stop].to(dtype))


def test_what_lies_elsewhere_in_memory_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell.sharding.tensor_file.STAGED_BYTES", 16)
    tensors = {"a": torch.arange(23, dtype=torch.float32)}
    strided = torch.zeros(23, 2)
    read(packed(tensors), "a", 23, 0, strided[:, 1])
    assert torch.equal(strided[:, 1], tensors["a"])


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        (2**60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{]",
        header(),
        header(a=5),
        header(a={"dtype": "F32", "shape": [4]}),
        header(a={"dtype": "I32", "shape": [4], "data_offsets": [0, 16]}),
        header(a={"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}),
        header(a={"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}),
        header(a={"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}),
        header(a={"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}),
        header(a={"dtype": "F32", "shape": [4], "data_offsets": [0.5, 16.5]}),
        header(a={"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]}),
        header(a={"dtype": "F32", "shape": [4, 1], "data_offsets": [0, 16]}),
        header(a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, b={}),
        header(
            a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            b={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        ),
        header(
            a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            b={"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
        ),
        header(b={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}),
        (2**20).to_bytes(8, "little") + b"[" * 2**20,
        (5000).to_bytes(8, "little") + b'{"a":' + b"9" * 4994 + b"}",
    ],
)
def test_file_that_does_not_hold_the_tensor_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"header|expected 4 elements|tensors end at"):
        read(data, "a", 4, 0, torch.empty(4))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "BF16", "dtype", "", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner, max_size=3)
    ),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "I8"]) | json_values,
        "shape": st.lists(st.integers(-2, 5) | st.integers(), max_size=2) | json_values,
        "data_offsets": st.lists(st.integers(-2, 20) | st.integers(), min_size=2, max_size=2) | json_values,
    }
)


@given(st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3) | json_values)
def test_any_header_is_an_error_or_places_side_by_side(fields: object) -> None:
    text = json.dumps(fields).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(16)
    try:
        places = opened(data).places.values()
    except ValueError:
        return
    begins = sorted((place.begin, place.begin + place.size_bytes) for place in places)
    edges = [8 + len(text), *(edge for place in begins for edge in place), len(data)]
    assert edges == sorted(edges)
    assert sum(place.size_bytes for place in places) == 16


@given(st.binary(max_size=80))
def test_any_bytes_are_an_error_or_a_file(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        opened(data)


def test_file_that_has_become_shorter_is_an_error() -> None:
    whole = packed({"a": torch.ones(100)})
    file = opened(whole)
    file._stream = io.BytesIO(whole[:-4])
    with pytest.raises(ValueError, match="ends 4 bytes too early"):
        file.read_into("a", 100, 0, torch.empty(100))
    with pytest.raises(ValueError, match="ends 4 bytes too early"):
        file.digest(file.places["a"])


def test_header_with_another_digest_or_length_is_an_error() -> None:
    data = packed({"a": torch.ones(100)})
    for length, digest in ((4096, 0), (4088, xxhash.xxh3_64_intdigest(data[:4088])), (2, 0), (2**62, 0)):
        with pytest.raises(ValueError, match="its header"):
            TensorFile(io.BytesIO(data), size_bytes=len(data), header_bytes=length, header_digest=digest)


@given(tensor_lists, st.data())
def test_digests_are_those_of_the_pieces_however_they_are_cut(
    kinds: list[tuple[torch.dtype, int]], data: st.DataObject
) -> None:
    tensors = [values for values in tensors_of(kinds).values() if values.numel()]
    digests = PieceDigests([values.nbytes for values in tensors])
    stream, left = io.BytesIO(), b"".join(bytes(byte_view(values)) for values in tensors)
    while left:
        length = data.draw(st.integers(1, len(left)))
        if data.draw(st.booleans()):  # overtaken: other bytes were written first
            begin, mark = stream.tell(), digests.mark()
            write_values(stream, torch.full((length,), 7, dtype=torch.uint8), digests)
            stream.seek(begin)
            digests.rewind(mark)
        write_values(stream, torch.frombuffer(bytearray(left[:length]), dtype=torch.uint8), digests)
        left = left[length:]
    assert digests.values() == [xxhash.xxh3_64_intdigest(bytes(byte_view(values))) for values in tensors]
    assert stream.getvalue() == b"".join(bytes(byte_view(values)) for values in tensors)


def test_digests_of_more_or_fewer_bytes_than_there_are_pieces_are_an_error() -> None:
    digests = PieceDigests([4, 4])
    digests.update(memoryview(bytes(7)))
    with pytest.raises(ValueError, match="expected 2 pieces, got 1 whole"):
        digests.values()
    with pytest.raises(ValueError, match="expected 8 bytes in all, got 1 more"):
        digests.update(memoryview(bytes(2)))
