"""The worker's side of the flat space."""

from __future__ import annotations

import pytest
import torch

from stepwell.client.flat import FlatBuffer
from stepwell.client.groups import param_specs
from stepwell.client.transport import join_pieces
from stepwell.sharding.layout import Layout, wire_dtype

CPU = torch.device("cpu")


def _layout(*shapes: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = ()) -> Layout:
    kinds = dtypes or (torch.float32,) * len(shapes)
    params = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, kinds, strict=True)]
    return Layout.build(list(param_specs([{"params": params}])))


def test_flat_buffer_has_a_place_for_each_parameter() -> None:
    shapes = [(), (0, 3), (7, 100), (256,), (1,)]
    buffer = FlatBuffer(_layout(*shapes), CPU)
    assert [(place.param, place.offset, place.view.numel()) for place in buffer.places] == [
        (0, 0, 1),
        (2, 0, 700),
        (3, 0, 256),
        (4, 0, 1),
    ]
    for place in buffer.places:
        place.view.fill_(place.param + 1)
    for place in buffer.places:
        assert torch.equal(place.view, torch.full_like(place.view, place.param + 1))
    assert (buffer.parts[0] != 0).sum() == 958, "padding stays zero"


@pytest.mark.parametrize("num_shards", [1, 2, 5, 64])
def test_shard_parts_are_the_whole_buffer_in_order(num_shards: int) -> None:
    layout = _layout((7, 100), (3,), (2000,), dtypes=(torch.float32, torch.float64, torch.float32))
    buffer = FlatBuffer(layout, CPU)
    for part in buffer.parts:
        part.copy_(torch.arange(len(part)))
    shards = [buffer.shard_parts(layout, shard, num_shards) for shard in range(num_shards)]
    for index, part in enumerate(buffer.parts):
        assert torch.equal(torch.cat([parts[index] for parts in shards]), part)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), [torch.bfloat16]),
        ((torch.bfloat16, torch.float16), [torch.float32]),
        ((torch.bfloat16, torch.float64), [torch.bfloat16, torch.float64]),
        ((torch.float32, torch.float16), [torch.float32]),
    ],
)
def test_wire_dtype_is_the_models_if_it_is_one(dtypes: tuple[torch.dtype, ...], expected: list[torch.dtype]) -> None:
    layout = _layout((3,), (4,), dtypes=dtypes)
    assert [wire_dtype(layout, extent) for extent in layout.extents] == expected


def test_join_pieces_puts_them_in_order() -> None:
    pieces = [(0, "s", 2, torch.tensor([3.0])), (1, "s", 0, torch.tensor([9.0])), (0, "s", 0, torch.tensor([1.0, 2.0]))]
    joined = join_pieces(pieces)
    assert joined[0, "s"].tolist() == [1.0, 2.0, 3.0]
    assert joined[1, "s"].tolist() == [9.0]
