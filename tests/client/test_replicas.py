"""Replicas that exchange their shares of the parameters among themselves, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import stepwell
from stepwell.sharding.errors import ServiceError, ServiceTimeoutError
from tests.client.lines import WAIT_S, Fault, FaultyTransport, SharedShards, SharedTransport, reached_by
from tests.client.training import assert_equal, make_net, set_grads


class Exchange:
    """torch.distributed's all_gather among threads, each of which says which rank it is."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=WAIT_S)
        self._parts: dict[int, Tensor] = {}
        self._local = threading.local()
        self.num_calls = [0] * world_size
        self.faults: set[tuple[int, int]] = set()
        """(rank, call) that fails once the others have their parts."""

    def enter(self, rank: int) -> None:
        self._local.rank = rank

    def rank(self) -> int:
        return int(self._local.rank)

    def size(self) -> int:
        return WORLD_SIZE

    def all_gather(self, outputs: list[Tensor], mine: Tensor, group: object) -> None:
        assert group is self, "not the group that the training script uses"
        rank = self.rank()
        self._parts[rank] = mine
        self.num_calls[rank] += 1
        self._barrier.wait()
        for sender, output in enumerate(outputs):
            output.copy_(self._parts[sender])
        self._barrier.wait()
        if (rank, self.num_calls[rank]) in self.faults:
            raise RuntimeError("connection reset")


WORLD_SIZE = 2
NUM_EXCHANGES = 1 + 6
"""In the first step the gradients are compared; the parameters are exchanged in every one of six."""


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    it = Exchange(WORLD_SIZE)
    with mock.patch.multiple(
        dist,
        is_initialized=lambda: True,
        get_world_size=lambda: WORLD_SIZE,
        get_rank=it.rank,
        all_gather=it.all_gather,
        new_group=lambda: it,
    ):
        yield it


def make_params() -> list[nn.Parameter]:
    return list(make_net().parameters())


def train(
    exchange: Exchange,
    on_error: Callable[[int], Any],
    *faults: Fault,
    make: Callable[[], list[nn.Parameter]] = make_params,
) -> list[list[nn.Parameter]]:
    """Six steps of two replicas; ``faults`` are rank 1's, which goes on with the next step after ``on_error``."""
    shared = SharedShards(num_shards=2)
    models = [make() for _ in range(WORLD_SIZE)]

    def line(rank: int) -> FaultyTransport:
        return FaultyTransport(SharedTransport(shared, rank), *(faults if rank == 1 else ()))

    optimizers = []
    for rank, params in enumerate(models):
        exchange.enter(rank)
        with reached_by(line):
            optimizers.append(stepwell.AdamW(params, lr=0.1, rank=rank, world_size=WORLD_SIZE, gradients="replicated"))

    def run(rank: int) -> None:
        exchange.enter(rank)
        for step in range(6):
            set_grads(models[rank], step)
            try:
                optimizers[rank].step()
            except ServiceError:
                on_error(rank)

    with ThreadPoolExecutor(WORLD_SIZE) as pool:
        for future in [pool.submit(run, rank) for rank in range(WORLD_SIZE)]:
            future.result(timeout=3 * WAIT_S)
    return models


def trained_alone(make: Callable[[], list[nn.Parameter]] = make_params) -> list[nn.Parameter]:
    params = make()
    optimizer = stepwell.AdamW(params, lr=0.1, rank=0, world_size=1)
    for step in range(6):
        set_grads(params, step)
        optimizer.step()
    return params


def test_replicas_train_as_one(exchange: Exchange) -> None:
    for params in train(exchange, lambda rank: pytest.fail(f"rank {rank} failed")):
        assert_equal(params, trained_alone())


def test_replica_whose_step_failed_joins_the_exchange_that_the_others_wait_in(exchange: Exchange) -> None:
    failed: list[int] = []
    fault = Fault("step", 3, "after", ServiceTimeoutError("the line broke"))
    models = train(exchange, failed.append, fault)
    assert failed == [1]
    assert exchange.num_calls == [NUM_EXCHANGES] * 2
    for params in models:
        assert_equal(params, trained_alone())


def test_replica_whose_exchange_failed_does_not_begin_it_again(exchange: Exchange) -> None:
    """The others are done with it, and would take its share for that of the next step."""
    failed: list[int] = []
    exchange.faults.add((1, 1 + 3))
    models = train(exchange, failed.append)
    assert failed == [1]
    assert exchange.num_calls == [NUM_EXCHANGES] * 2
    for params in models:
        assert_equal(params, trained_alone())


def test_ranks_in_another_order_than_torchs_are_refused(exchange: Exchange) -> None:
    exchange.enter(1)
    with (
        reached_by(lambda rank: SharedTransport(SharedShards(), rank)),
        pytest.raises(ValueError, match=r"rank: expected 1, as torch\.distributed has it, got 0"),
    ):
        stepwell.AdamW(make_net().parameters(), rank=0, world_size=WORLD_SIZE, gradients="replicated")


def test_replicas_of_fewer_tiles_than_ranks_train_as_one(exchange: Exchange) -> None:
    def make() -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(0, 3))]

    for params in train(exchange, lambda rank: pytest.fail(f"rank {rank} failed"), make=make):
        assert_equal(params, trained_alone(make))
