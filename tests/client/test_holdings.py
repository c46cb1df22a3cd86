"""What a rank holds of DTensor parameters, against torch's own arithmetic, for every rank of a pretended world."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.fake_pg import FakeStore

from stepwell.client.holdings import (
    holding_of,
    holdings_of,
    is_distributed,
    local_part,
    resolve_gradients,
    version_of,
)
from stepwell.sharding.coverage import require_exact_cover
from stepwell.sharding.errors import UnsupportedParameterError
from stepwell.sharding.layout import ParamSpec

SHAPES = [(7, 5), (3,), (1, 9), (16, 4), (12,), (2, 3, 4), ()]
MESHES: list[tuple[tuple[int, ...], tuple[Placement, ...]]] = [
    ((2,), (Shard(0),)),
    ((3,), (Shard(0),)),
    ((5,), (Shard(0),)),
    ((3,), (Replicate(),)),
    ((2, 2), (Replicate(), Shard(0))),
    ((3, 2), (Replicate(), Shard(0))),
    ((2, 3), (Shard(0), Replicate())),
    ((2, 3), (Shard(0), Shard(0))),
]


@contextlib.contextmanager
def world(rank: int, size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def distributed(shape: Sequence[int], mesh_shape: tuple[int, ...], placements: Sequence[Placement]) -> Tensor:
    """A DTensor of the present rank; no operation makes it, as torch remembers their results for the next world."""
    mesh = init_device_mesh("cpu", mesh_shape)
    local_shape, _ = compute_local_shape_and_global_offset(tuple(shape), mesh, placements)
    local = torch.zeros(local_shape)
    stride = torch.empty(tuple(shape)).stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


@pytest.mark.parametrize(("mesh_shape", "placements"), MESHES, ids=str)
def test_holdings_are_torchs_and_cover_every_parameter_once(
    mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]
) -> None:
    size = math.prod(mesh_shape)
    shapes = SHAPES if Shard(0) not in placements else SHAPES[:-1]
    found = {}
    for rank in range(size):
        with world(rank, size):
            named = [(str(shape), distributed(shape, mesh_shape, placements)) for shape in shapes]
            found[rank] = holdings_of(named)
            for (_, param), held in zip(named, found[rank].held, strict=True):
                assert is_distributed(param)
                shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, placements)
                assert held.numel == math.prod(shape) == local_part(param).numel()
                if held.numel and offset:
                    assert held.offset == offset[0] * math.prod(param.shape[1:])
    require_exact_cover([ParamSpec(str(shape), shape, "float32", 0) for shape in shapes], found)


@pytest.mark.parametrize("placement", [Shard(1), Shard(2)])
def test_other_placements_are_refused_by_name(placement: Placement) -> None:
    with world(0, 2):
        param = distributed((4, 6, 2), (2,), [placement])
        with pytest.raises(UnsupportedParameterError, match=r"parameter 'attention\.weight' \[4, 6, 2\]: .* Shard"):
            holding_of(param, "attention.weight")


def test_changes_of_a_distributed_parameter_are_seen_either_way() -> None:
    with world(0, 2), torch.no_grad():
        param = distributed((4, 6), (2,), [Shard(0)])
        versions = [version_of(param)]
        local_part(param).add_(1)
        versions.append(version_of(param))
        param.mul_(2)
        versions.append(version_of(param))
        assert versions == sorted(set(versions))


def test_meaning_of_gradients_is_detected_and_said(caplog: pytest.LogCaptureFixture) -> None:
    plain = [("0.weight", torch.zeros(3)), ("0.bias", torch.zeros(3))]
    wrapped = [(f"module.{name}", param) for name, param in plain]
    with caplog.at_level(logging.INFO, "stepwell"):
        assert resolve_gradients(None, plain, 1) == "local"
        assert not caplog.messages, "with one worker there is nothing to say"
        assert resolve_gradients(None, plain, 2) == "local"
        assert resolve_gradients(None, wrapped, 2) == "replicated"
        assert resolve_gradients("local", wrapped, 2) == "local"
        with world(0, 2):
            sharded = [("0.weight", distributed((4, 6), (2,), [Shard(0)]))]
            assert resolve_gradients(None, sharded, 2) == "sharded"
    starts = [message.split(":")[0] for message in caplog.messages]
    assert starts == [
        "gradients='local' (detected)",
        "gradients='replicated' (detected)",
        "gradients='local'",
        "gradients='sharded' (detected)",
    ]


def test_meaning_that_does_not_fit_is_refused() -> None:
    plain = ("head.bias", torch.zeros(3))
    with pytest.raises(ValueError, match="gradients: expected one of local, replicated, sharded or None, got 'ddp'"):
        resolve_gradients("ddp", [plain], 2)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedParameterError, match="expected DTensor parameters, as fully_shard makes them"):
        resolve_gradients("sharded", [plain], 2)
    with world(0, 2):
        sharded = ("0.weight", distributed((4, 6), (2,), [Shard(0)]))
        with pytest.raises(UnsupportedParameterError, match=r"'head\.bias' is a plain tensor and others are DTensors"):
            resolve_gradients(None, [sharded, plain], 2)
        with pytest.raises(UnsupportedParameterError, match="DTensors with gradients='local'"):
            resolve_gradients("local", [sharded], 2)
