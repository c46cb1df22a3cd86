"""Large gradients that shards in this process read where backward left them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.client import gathering
from stepwell.client.flat import FlatBuffer
from stepwell.client.gathering import Gatherer
from stepwell.client.inprocess import InProcessService, InProcessTransport
from stepwell.sharding.errors import ServiceTimeoutError
from stepwell.sharding.layout import Layout, ParamSpec
from tests.client.lines import Fault, FaultyTransport, reached_by
from tests.client.training import assert_equal, drive, set_grads

MAKERS: list[Callable[..., stepwell.ServiceOptimizer]] = [stepwell.Prodigy, stepwell.AdamW, stepwell.LAMB]
SHAPES = [(64, 64), (7,), (512,), (300,), (256,), (16, 16, 8), (3, 5), (128, 130)]
"""Of whole tiles and not, next to each other and not."""


@pytest.fixture
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "CPU_LARGE_NUMEL", 1)


def params_of(dtypes: Sequence[torch.dtype] = (torch.float32,)) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[index % len(dtypes)]))
        for index, shape in enumerate(SHAPES)
    ]


def trained(
    make: Callable[..., stepwell.ServiceOptimizer], num_shards: int, dtypes: Sequence[torch.dtype]
) -> tuple[list[nn.Parameter], dict[str, object]]:
    """Parameters after six steps: in one a gradient is missing, in one it is transposed, in one it is not finite."""
    params = params_of(dtypes)
    optimizer = make(params, num_shards=num_shards)
    for step in range(6):
        set_grads(params, step)
        if step == 1:
            params[0].grad = None
        if step == 2:
            params[0].grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(params[0].dtype).t()
        if step == 3:
            grad = params[0].grad
            assert grad is not None
            grad[1, 1] = torch.inf
        optimizer.step()
    return params, optimizer.service.status()


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32), (torch.float64, torch.float32)])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("make", MAKERS)
def test_bits_are_those_of_copies(
    make: Callable[..., stepwell.ServiceOptimizer],
    num_shards: int,
    dtypes: Sequence[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, _ = trained(make, 1, dtypes)
    monkeypatch.setattr(gathering, "CPU_LARGE_NUMEL", 1)
    actual, status = trained(make, num_shards, dtypes)
    assert_equal(actual, expected)
    assert (status["step"], status["skipped_steps"]) == (6, 1)


def gathered(num_shards: int) -> tuple[FlatBuffer, list[Tensor], list[list[Tensor]]]:
    layout = Layout.build([ParamSpec("", shape, "float32", 0) for shape in SHAPES])
    buffer = FlatBuffer(layout, torch.device("cpu"))
    shapes = [torch.Size(shape) for shape in SHAPES]
    gatherer = Gatherer(buffer, shapes, [None] * len(SHAPES), are_read_in_place=True)
    grads = [torch.randn(shape) for shape in SHAPES]
    gatherer.gather(grads, {})
    return buffer, grads, [buffer.shard_pieces(layout, shard, num_shards) for shard in range(num_shards)]


@pytest.mark.parametrize("num_shards", [1, 2, 5])
@pytest.mark.usefixtures("all_are_large")
def test_whole_tiles_stay_where_they_are(num_shards: int) -> None:
    buffer, grads, pieces = gathered(num_shards)
    whole = [index for index, shape in enumerate(SHAPES) if torch.Size(shape).numel() % 256 == 0]
    assert sorted(buffer.elsewhere) == whole
    assert all(buffer.elsewhere[index].data_ptr() == grads[index].data_ptr() for index in whole)
    expected = torch.cat([torch.cat((grad.view(-1), torch.zeros(-grad.numel() % 256))) for grad in grads])
    assert torch.equal(torch.cat([piece for its_pieces in pieces for piece in its_pieces]), expected)
    assert not any(buffer.places[index].view.any() for index in whole), "nothing was copied there"


def test_small_gradients_are_copied() -> None:
    buffer, _, (pieces,) = gathered(1)
    assert not buffer.elsewhere
    assert len(pieces) == 1


@pytest.mark.usefixtures("all_are_large")
def test_gradients_are_let_go_after_the_step() -> None:
    params = params_of()
    optimizer = stepwell.AdamW(params)
    set_grads(params, 0)
    kept = weakref.ref(params[0].grad)
    optimizer.step()
    assert kept() is not None
    optimizer.zero_grad()
    assert kept() is None


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.usefixtures("all_are_large")
def test_step_that_failed_is_taken_with_the_gradients_of_then_or_of_now(when: Literal["before", "after"]) -> None:
    """Before it reached the shards the next try brings what is there by then; after it, it was taken."""
    params, expected = params_of(), params_of()
    fault = Fault("step", 2, when, ServiceTimeoutError("no answer"))
    with reached_by(lambda rank: FaultyTransport(InProcessTransport(InProcessService(num_shards=2)), fault)):
        optimizer = stepwell.Prodigy(params)
    drive(params, optimizer, [0])
    with pytest.raises(ServiceTimeoutError):
        drive(params, optimizer, [1])
    drive(params, optimizer, [2])
    drive(expected, stepwell.Prodigy(expected), [0, 2] if when == "before" else [0, 1, 2])
    assert_equal(params, expected)
