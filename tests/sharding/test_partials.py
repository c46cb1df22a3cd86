"""Partials and totals: exact for any sharding, and the right sums."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stepwell.optim import AdamGCCRule, Scope, StableAdamRule
from stepwell.sharding import partials
from stepwell.sharding.channels import run_sums
from stepwell.sharding.keys import Keys
from stepwell.sharding.layout import Layout, ParamSpec
from stepwell.sharding.partials import ChannelSumTable, Output, SumTable, TileSumTable, sum_vectors
from stepwell.sharding.run_sums import RunSums

TILE_SCOPES = (Scope.MODEL, Scope.GROUP, Scope.TENSOR)
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


def fold_on_shards(
    table: SumTable, layout: Layout, values: list[Tensor], num_shards: int, at_once: int, *, as_on_gpu: bool
) -> Tensor:
    vectors = []
    for shard in range(num_shards):
        outputs = []
        for index, extent in enumerate(layout.extents):
            tiles = extent.tile_range(shard, num_shards)
            for first in range(tiles.start, tiles.stop, at_once):
                outputs.append(Output(index, first, [values[index][first : min(first + at_once, tiles.stop)]]))
        with mock.patch.object(partials, "_is_at_hand", return_value=not as_on_gpu):
            vectors.append(table.folded(1, outputs))
    return sum_vectors(vectors)


@given(SHAPES, st.sampled_from(TILE_SCOPES), st.integers(1, 9), st.sampled_from([1, 3, 256]), st.booleans())
def test_totals_are_the_same_for_any_number_of_shards(
    shapes: list[tuple[int]], scope: Scope, num_shards: int, at_once: int, as_on_gpu: bool
) -> None:
    layout = layout_of(shapes)
    table, values = TileSumTable(layout, scope, num_groups=2), tile_partials(layout)
    (expected,) = table.totals(["x"], fold_on_shards(table, layout, values, 1, 10**6, as_on_gpu=as_on_gpu)).values()
    (actual,) = table.totals(
        ["x"], fold_on_shards(table, layout, values, num_shards, at_once, as_on_gpu=as_on_gpu)
    ).values()
    assert torch.equal(actual, expected)


@given(SHAPES, st.sampled_from(TILE_SCOPES), st.booleans())
def test_totals_are_the_sums_over_their_keys(shapes: list[tuple[int]], scope: Scope, as_on_gpu: bool) -> None:
    layout = layout_of(shapes)
    table, values = TileSumTable(layout, scope, num_groups=2), tile_partials(layout)
    terms: dict[int, list[float]] = {}
    for extent, tiles in zip(layout.extents, values, strict=True):
        for param, value in zip(
            extent.table(range(extent.num_tiles)).tensor_of_tile.tolist(), tiles.tolist(), strict=True
        ):
            key = {Scope.MODEL: 0, Scope.GROUP: layout.params[param].group, Scope.TENSOR: param}[scope]
            terms.setdefault(key, []).append(value)
    (totals,) = table.totals(["x"], fold_on_shards(table, layout, values, 1, 100, as_on_gpu=as_on_gpu)).values()
    assert totals.dtype == torch.float64
    assert len(totals) == table.num_keys
    for key, total in enumerate(totals.tolist()):
        size = math.fsum(abs(term) for term in terms.get(key, []))
        assert abs(total - math.fsum(terms.get(key, []))) <= 1e-13 * size


@given(SHAPES, st.sampled_from(TILE_SCOPES), st.integers(2, 5))
def test_each_partial_is_computed_by_one_shard(shapes: list[tuple[int]], scope: Scope, num_shards: int) -> None:
    """So the all-reduce adds nothing but zeros to it."""
    layout = layout_of(shapes)
    table = TileSumTable(layout, scope, num_groups=2)
    owners = torch.zeros(table.num_segments)
    for shard in range(num_shards):
        owned = [(index, extent.tile_range(shard, num_shards)) for index, extent in enumerate(layout.extents)]
        outputs = [Output(index, tiles.start, [torch.ones(len(tiles))]) for index, tiles in owned if tiles]
        owners += table.folded(1, outputs)[0] > 0
    assert torch.equal(owners, torch.ones(table.num_segments))


def test_model_without_parameters_has_no_partials() -> None:
    table = TileSumTable(Layout.build([]), Scope.MODEL, num_groups=1)
    assert table.num_segments == 0
    assert table.totals(["x"], table.empty(1))["x"].tolist() == [0.0]


CHANNEL_SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 700), st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(0, 600)),
        st.just((3, 0, 2, 2)),
    ),
    min_size=1,
    max_size=8,
)


def channel_layout(shapes: list[tuple[int, ...]]) -> Layout:
    dtypes = ("float32", "float64", "float32")
    return Layout.build([ParamSpec("", shape, dtypes[i % 3], 0) for i, shape in enumerate(shapes)])


def element_terms(layout: Layout) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(extent.num_tiles, 256) for extent in layout.extents]
    return [
        torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 7, shape, generator=generator)
        for shape in shapes
    ]


@given(CHANNEL_SHAPES, st.integers(1, 9), st.sampled_from([1, 3, 256]), st.booleans())
def test_channel_totals_are_the_same_for_any_number_of_shards(
    shapes: list[tuple[int, ...]], num_shards: int, at_once: int, as_on_gpu: bool
) -> None:
    layout = channel_layout(shapes)
    table, values = ChannelSumTable(layout, Keys.build(layout.params, AdamGCCRule())), element_terms(layout)
    (expected,) = table.totals(["x"], fold_on_shards(table, layout, values, 1, 10**6, as_on_gpu=as_on_gpu)).values()
    (actual,) = table.totals(
        ["x"], fold_on_shards(table, layout, values, num_shards, at_once, as_on_gpu=as_on_gpu)
    ).values()
    assert torch.equal(actual, expected)


@given(CHANNEL_SHAPES, st.booleans())
def test_channel_totals_are_the_sums_over_their_channels(shapes: list[tuple[int, ...]], as_on_gpu: bool) -> None:
    layout = channel_layout(shapes)
    table, values = ChannelSumTable(layout, Keys.build(layout.params, AdamGCCRule())), element_terms(layout)
    expected: list[Tensor] = []
    where = {
        param: (extent, int(first))
        for extent, which in enumerate(layout.extents)
        for param, first in zip(which.params, which.first_tile, strict=False)
    }
    for index, param in enumerate(layout.params):
        if len(param.shape) == 4 and param.numel:
            extent, first = where[index]
            expected += values[extent].flatten()[first * 256 :][: param.numel].view(param.shape[0], -1)
    (totals,) = table.totals(["x"], fold_on_shards(table, layout, values, 1, 100, as_on_gpu=as_on_gpu)).values()
    assert len(totals) == table.num_keys == len(expected)
    for total, terms in zip(totals.tolist(), expected, strict=True):
        size = math.fsum(terms.abs().tolist())
        assert abs(total - math.fsum(terms.tolist())) <= 1e-13 * size


def test_channels_that_a_rule_excludes_have_no_sum() -> None:
    specs = [ParamSpec("", shape, "float32", 0) for shape in ((4, 256, 1, 1), (256, 256, 1, 1), (4, 255, 1, 1))]
    assert Keys.build(specs, StableAdamRule()).num_channels == 260
    assert Keys.build(specs, StableAdamRule(excluded_c_in=None)).num_channels == 264
    assert Keys.build(specs, StableAdamRule(excluded_c_in=255)).num_channels == 260


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(0, 2**31))
def test_run_sums_on_the_cpu_are_added_up_in_order(lengths: list[int], seed: int) -> None:
    ends = np.unique(np.concatenate((np.cumsum(lengths), np.arange(256, sum(lengths) + 256, 256))))
    ends = ends[ends <= -(-sum(lengths) // 256) * 256]
    runs = np.diff(ends, prepend=0)
    values = torch.randn(1, int(ends[-1]) // 256, 256, generator=torch.Generator().manual_seed(seed))
    (sums,) = run_sums(values, runs)
    for actual, terms in zip(sums.tolist(), torch.split(values.flatten().double(), runs.tolist()), strict=True):
        total = 0.0
        for term in terms.tolist():
            total += term
        assert actual == total


@given(st.lists(st.integers(0, 400), min_size=1, max_size=30), st.integers(0, 2**31))
def test_runs_are_folded_alike_wherever_they_lie(lengths: list[int], seed: int) -> None:
    """As on a GPU, where several are added up side by side."""
    runs, device = np.array(lengths), torch.device("cpu")
    values = torch.randn(2, int(runs.sum()), generator=torch.Generator().manual_seed(seed))
    sums = RunSums(runs, device).of(values)
    assert sums.dtype == torch.float64
    for index, terms in enumerate(torch.split(values.double(), lengths, dim=1)):
        alone = RunSums(runs[index : index + 1], device).of(terms.float())
        assert torch.equal(sums[:, index], alone[:, 0])
        assert torch.allclose(alone[:, 0], terms.sum(dim=1), rtol=1e-13, atol=1e-13 * float(terms.abs().sum()))


def test_what_is_not_finite_stays_in_its_run() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, torch.nan, torch.inf, 4.0]])
    (sums,) = RunSums(np.array([3, 1, 1, 1]), torch.device("cpu")).of(values).tolist()
    assert (sums[0], sums[2], sums[3]) == (6.0, torch.inf, 4.0)
    assert sums[1] != sums[1]
