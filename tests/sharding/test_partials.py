"""Partials and totals: exact for any sharding, and the right sums."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stepwell.optim import Scope
from stepwell.sharding.layout import Layout, ParamSpec
from stepwell.sharding.partials import SumTable, sum_vectors

SHAPES = st.lists(st.tuples(st.integers(1, 3000)), min_size=1, max_size=20)


def layout_of(shapes: list[tuple[int]]) -> Layout:
    dtypes = ("float32", "float64", "float32")
    return Layout.build([ParamSpec("", shape, dtypes[i % 3], i % 2) for i, shape in enumerate([*shapes, *shapes])])


def tile_partials(layout: Layout) -> list[Tensor]:
    """Numbers whose float64 sum depends on the order."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(extent.num_tiles, generator=generator)
        * 10.0 ** torch.randint(-6, 7, (extent.num_tiles,), generator=generator)
        for extent in layout.extents
    ]


def fold_on_shards(table: SumTable, layout: Layout, values: list[Tensor], num_shards: int, at_once: int) -> Tensor:
    vectors = []
    for shard in range(num_shards):
        partials = table.empty(1)
        for index, extent in enumerate(layout.extents):
            tiles = extent.tile_range(shard, num_shards)
            for first in range(tiles.start, tiles.stop, at_once):
                table.fold(partials, index, first, [values[index][first : min(first + at_once, tiles.stop)]])
        vectors.append(partials)
    return sum_vectors(vectors)


@given(SHAPES, st.sampled_from(Scope), st.integers(1, 9), st.sampled_from([1, 3, 256]))
def test_totals_are_the_same_for_any_number_of_shards(
    shapes: list[tuple[int]], scope: Scope, num_shards: int, at_once: int
) -> None:
    layout = layout_of(shapes)
    table, values = SumTable(layout, scope, num_groups=2), tile_partials(layout)
    (expected,) = table.totals(["x"], fold_on_shards(table, layout, values, 1, 10**6)).values()
    (actual,) = table.totals(["x"], fold_on_shards(table, layout, values, num_shards, at_once)).values()
    assert torch.equal(actual, expected)


@given(SHAPES, st.sampled_from(Scope))
def test_totals_are_the_sums_over_their_keys(shapes: list[tuple[int]], scope: Scope) -> None:
    layout = layout_of(shapes)
    table, values = SumTable(layout, scope, num_groups=2), tile_partials(layout)
    terms: dict[int, list[float]] = {}
    for extent, tiles in zip(layout.extents, values, strict=True):
        for param, value in zip(extent.tensor_of_tile.tolist(), tiles.tolist(), strict=True):
            key = {Scope.MODEL: 0, Scope.GROUP: layout.params[param].group, Scope.TENSOR: param}[scope]
            terms.setdefault(key, []).append(value)
    (totals,) = table.totals(["x"], fold_on_shards(table, layout, values, 1, 100)).values()
    assert totals.dtype == torch.float64
    assert len(totals) == table.num_keys
    for key, total in enumerate(totals.tolist()):
        size = math.fsum(abs(term) for term in terms.get(key, []))
        assert abs(total - math.fsum(terms.get(key, []))) <= 1e-13 * size


@given(SHAPES, st.sampled_from(Scope), st.integers(2, 5))
def test_each_partial_is_computed_by_one_shard(shapes: list[tuple[int]], scope: Scope, num_shards: int) -> None:
    """So the all-reduce adds nothing but zeros to it."""
    layout = layout_of(shapes)
    table = SumTable(layout, scope, num_groups=2)
    owners = torch.zeros(table.num_segments)
    for shard in range(num_shards):
        partials = table.empty(1)
        for index, extent in enumerate(layout.extents):
            tiles = extent.tile_range(shard, num_shards)
            if tiles:
                table.fold(partials, index, tiles.start, [torch.ones(len(tiles))])
        owners += partials[0] > 0
    assert torch.equal(owners, torch.ones(table.num_segments))


def test_model_without_parameters_has_no_partials() -> None:
    table = SumTable(Layout.build([]), Scope.MODEL, num_groups=1)
    assert table.num_segments == 0
    assert table.totals(["x"], table.empty(1))["x"].tolist() == [0.0]
