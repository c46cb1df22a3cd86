"""The flat space: every element has one place, however it is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell.optim import ProdigyRule
from stepwell.sharding.buffers import MASTER
from stepwell.sharding.errors import UnsupportedParameterError
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import Layout, ParamSpec, dtype_from_name
from stepwell.sharding.shard import Shard
from tests.zoo import state_source

NUMELS = st.one_of(st.sampled_from([0, 1, 2, 255, 256, 257, 511, 512, 513]), st.integers(0, 6000))
SHAPES = st.one_of(st.just(()), st.tuples(NUMELS), st.tuples(st.integers(0, 40), st.integers(0, 90)))
DTYPES = st.sampled_from(["float32", "bfloat16", "float64"])
CHUNKS = st.sampled_from([None, 256, 512, 4096])
SHARDS = st.integers(1, 9)


@st.composite
def params(draw: st.DrawFn) -> tuple[ParamSpec, ...]:
    drawn = draw(st.lists(st.tuples(SHAPES, DTYPES, st.integers(0, 1)), max_size=25))
    return tuple(ParamSpec("", shape, dtype, group) for shape, dtype, group in drawn)


@given(params(), CHUNKS)
def test_layout_gives_every_element_one_place(specs: tuple[ParamSpec, ...], chunk_numel: int | None) -> None:
    layout = Layout.build(specs, chunk_numel=chunk_numel)
    places = [np.zeros(math.prod(spec.shape), np.int64) for spec in specs]
    for extent in layout.extents:
        assert extent.num_tiles * 256 == extent.padded_numel
        table = extent.table(range(extent.num_tiles))
        for param, index, valid in zip(table.tensor_of_tile, table.index_in_tensor, table.valid_numel, strict=True):
            assert 1 <= valid <= 256
            assert specs[param].state_dtype == extent.dtype
            places[param][index * 256 : index * 256 + valid] += 1
        order = list(zip(table.tensor_of_tile.tolist(), table.index_in_tensor.tolist(), strict=True))
        assert order == sorted(order)
        for position, param in enumerate(extent.params):
            first, stop = extent.first_tile[position : position + 2]
            assert (extent.table(range(first, stop)).tensor_of_tile == param).all()
    for place in places:
        assert (place == 1).all()
    assert layout.numel == sum(math.prod(spec.shape) for spec in specs)


@given(params(), CHUNKS, SHARDS)
def test_shards_partition_the_tiles_into_equal_runs_of_chunks(
    specs: tuple[ParamSpec, ...], chunk_numel: int | None, num_shards: int
) -> None:
    for extent in Layout.build(specs, chunk_numel=chunk_numel).extents:
        ranges = [extent.tile_range(shard, num_shards) for shard in range(num_shards)]
        assert [tile for tiles in ranges for tile in tiles] == list(range(extent.num_tiles))
        assert all(tiles.start % extent.tiles_per_chunk == 0 for tiles in ranges if tiles)
        chunks = [math.ceil(len(tiles) / extent.tiles_per_chunk) for tiles in ranges]
        assert max(chunks) - min(chunks) <= 1


@given(params(), CHUNKS, SHARDS, st.sampled_from([1, 2, 11, 256, 257, 1000]))
def test_pieces_cover_every_slot_once(
    specs: tuple[ParamSpec, ...], chunk_numel: int | None, num_shards: int, stride: int
) -> None:
    covered = [np.zeros(math.ceil(math.prod(spec.shape) / stride), np.int64) for spec in specs]
    for extent in Layout.build(specs, chunk_numel=chunk_numel).extents:
        for shard in range(num_shards):
            tiles = extent.tile_range(shard, num_shards)
            for piece in extent.pieces(tiles, stride):
                assert 0 <= piece.offset <= piece.offset + piece.numel <= len(covered[piece.param])
                assert tiles.start <= piece.first_tile < piece.last_tile <= tiles.stop
                assert set(extent.table(range(piece.first_tile, piece.last_tile)).tensor_of_tile) == {piece.param}
                covered[piece.param][piece.offset : piece.offset + piece.numel] += 1
    for cover in covered:
        assert (cover == 1).all()


@given(params(), CHUNKS)
def test_block_lies_in_one_chunk_and_does_not_depend_on_it(
    specs: tuple[ParamSpec, ...], chunk_numel: int | None
) -> None:
    chosen = Layout.build(specs)
    for extent, default in zip(Layout.build(specs, chunk_numel=chunk_numel).extents, chosen.extents, strict=True):
        assert extent.tiles_per_chunk % extent.tiles_per_block == 0
        assert extent.tiles_per_block == default.tiles_per_block
        assert extent.tiles_per_block.bit_count() == extent.tiles_per_chunk.bit_count() == 1


@settings(max_examples=50)
@given(params(), CHUNKS, st.integers(1, 4), st.sampled_from([1, 3, 11, 300]))
def test_buffers_give_back_what_was_loaded(
    specs: tuple[ParamSpec, ...], chunk_numel: int | None, num_shards: int, slice_p: int
) -> None:
    """Every slot of every tensor, whole, in pieces; p0 is what torch's own slicing gives."""
    rule = ProdigyRule(slice_p=slice_p)
    generator = torch.Generator().manual_seed(0)
    values = {
        (index, name): torch.randn(math.ceil(spec.numel / stride), generator=generator, dtype=spec.state_dtype)
        for index, spec in enumerate(specs)
        for name, stride in ((MASTER.name, 1), ("exp_avg", 1), ("exp_avg_sq", 1), ("s", slice_p))
    }
    expected = dict(values)
    for index in range(len(specs)):
        expected[index, "p0"] = values[index, MASTER.name][::slice_p]
    shards = [
        Shard(JobSpec(rule, specs, 2, 1, chunk_numel), shard=shard, num_shards=num_shards)
        for shard in range(num_shards)
    ]
    found = {key: torch.full_like(value, torch.nan) for key, value in expected.items()}
    for shard in shards:
        shard.load(state_source(values), timeline=1)
        for slot, piece, part in shard.buffers.export():
            assert part.shape == (piece.numel,)
            found[piece.param, slot][piece.offset : piece.offset + piece.numel] = part
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_blocks_and_chunks_of_a_large_model_reach_their_largest_sizes() -> None:
    layout = Layout.build([ParamSpec("", (2**16, 2**12), "float32", 0)])
    (extent,) = layout.extents
    assert (extent.tiles_per_block * 256, extent.tiles_per_chunk * 256) == (2**18, 2**20)


@pytest.mark.parametrize("chunk_numel", [-256, 0, 100, 128, 768])
def test_layout_refuses_a_chunk_that_is_no_power_of_two_of_tiles(chunk_numel: int) -> None:
    with pytest.raises(ValueError, match=f"got {chunk_numel}"):
        Layout.build([ParamSpec("", (1000,), "float32", 0)], chunk_numel=chunk_numel)


@pytest.mark.parametrize("dtype", ["int64", "complex64", "float8_e4m3fn", "bool", ""])
def test_dtype_that_cannot_be_kept_is_refused(dtype: str) -> None:
    with pytest.raises(UnsupportedParameterError, match="expected a dtype of float16, bfloat16, float32, float64"):
        dtype_from_name(dtype)


def test_layout_of_a_model_beyond_any_memory_is_made_and_a_shard_reads_its_own_tiles() -> None:
    """What a process keeps of the layout does not grow with the model's elements."""
    layout = Layout.build([ParamSpec("", (2**44 + 300,), "float32", 0), ParamSpec("", (5,), "float32", 0)])
    (extent,) = layout.extents
    tiles = extent.tile_range(2**24 - 1, 2**24)
    assert tiles.stop == extent.num_tiles == 2**36 + 3
    table = extent.table(range(extent.num_tiles - 3, extent.num_tiles))
    assert table.tensor_of_tile.tolist() == [0, 0, 1]
    assert table.index_in_tensor.tolist() == [2**36, 2**36 + 1, 0]
    assert table.valid_numel.tolist() == [256, 44, 5]
