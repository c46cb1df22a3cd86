"""The two ways of gradients and parameters, memory that both map and the object store: the same to the bit."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch

import stepwell
from stepwell.client.node_memory import NodeMemory
from stepwell.client.streaming import PieceStream
from stepwell.sharding.errors import MissingRankError
from tests.integration.conftest import Launch
from tests.integration.processes import pid_of
from tests.integration.training import D0, LIMIT_S, Oracle, Trainer, assert_same_training, make_workers, on_all
from tests.zoo import Problem, assert_same_tensors, straddling

NUM_STEPS = 12


def far(*shards: int) -> Any:
    """Within this block these shards say that they are on another node."""
    note = NodeMemory.note

    def note_far(self: NodeMemory, why_not: Sequence[str | None]) -> None:
        note(self, [f"a test of {index}" if index in shards else why for index, why in enumerate(why_not)])

    return mock.patch.object(NodeMemory, "note", note_far)


def train(problem: Problem, **keywords: Any) -> Trainer:
    return Trainer(problem, stepwell.Prodigy, d0=D0, **keywords).run(NUM_STEPS)


@pytest.mark.parametrize(
    ("dtype", "num_shards", "far_shards"),
    [
        ("float32", 1, [0]),
        ("float32", 3, []),
        ("float32", 3, [0, 1, 2]),
        ("bfloat16", 2, []),
        ("bfloat16", 2, [0]),
    ],
)
def test_either_way_gives_the_bits_of_one_process(
    launch: Launch, dtype: str, num_shards: int, far_shards: Sequence[int]
) -> None:
    problem = straddling().as_dtype(dtype)
    with far(*far_shards):
        trained = train(problem, service=launch(num_shards))
        assert_same_training(trained, train(problem, service="inprocess"))
        trained.optimizer.close()


def test_replicas_that_go_different_ways_have_the_same_parameters(launch: Launch) -> None:
    """Each pushes a share of the one gradient, one through memory and one through the object store."""
    service, problem = launch(2), straddling()

    def work(rank: int) -> Trainer:
        worker = Trainer(
            problem, stepwell.Prodigy, d0=D0, service=service, rank=rank, world_size=2, gradients="replicated"
        )
        if rank == 1:
            transport: Any = worker.optimizer._registered.transport
            transport._memory.note(["a test", "a test"])
        worker.rank, worker.world_size = 0, 1  # of the gradient
        return worker.run(NUM_STEPS)

    with ThreadPoolExecutor(2) as pool:
        workers = list(pool.map(work, range(2), timeout=LIMIT_S))
    expected = train(problem, service="inprocess")
    for worker in workers:
        assert_same_tensors(worker.params, expected.params, "parameter")
    on_all(workers, lambda worker: worker.optimizer.close())


def test_ways_are_told_once(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stepwell"), far(1):
        trained = train(straddling(), service=launch(2))
        trained.optimizer.refresh()
        trained.optimizer.close()
    ways = [message for message in caplog.messages if message.startswith("gradients and parameters go by")]
    assert ways == ["gradients and parameters go by shard 0: shared memory; shard 1: the object store (a test of 1)"]


def test_attempt_that_was_given_up_is_replaced_by_one_in_other_memory(launch: Launch) -> None:
    workers, oracle = make_workers(launch(2, worker_timeout_s=2.0), 2), Oracle(2)
    buffers: Any = workers[0].optimizer._registered._buffers
    workers[0].set_gradients()
    before = buffers.pushed.parts[0]
    with pytest.raises(MissingRankError):
        workers[0].optimizer.step()
    pushed = before.clone()
    on_all(workers, lambda worker: worker.run(2))
    assert buffers.pushed.parts[0].data_ptr() != before.data_ptr()
    assert torch.equal(before, pushed)
    for worker in workers:
        oracle.to(2).require_same(worker)
    on_all(workers, lambda worker: worker.optimizer.close())


class Backward(Trainer):
    """A trainer whose gradients come out of a backward pass."""

    def set_gradients(self) -> None:
        super().set_gradients()
        wanted = [(param, param.grad) for param in self.params if param.grad is not None]
        for param in self.params:
            param.grad = None
        torch.stack([(param * grad).sum() for param, grad in wanted]).sum().backward()  # type: ignore[no-untyped-call]


def test_gradients_that_are_sent_within_backward_give_the_bits_of_one_process(launch: Launch) -> None:
    """Also where a shard is lost that has been sent its gradient: the step is tried again, with all of it."""
    problem, named = straddling(), []
    ahead_of = PieceStream.ahead_of

    def note(self: PieceStream, shard: int) -> Any:
        ahead, left = ahead_of(self, shard)
        named.append(len(ahead) - len(left))
        return ahead, left

    service = launch(2, redundancy=1)
    with far(0, 1), mock.patch.object(PieceStream, "ahead_of", note):
        trained = Backward(problem, stepwell.Prodigy, d0=D0, service=service, overlap=True).run(5)
        assert named == [0, 0, *[1] * 8]
        trained.set_gradients()
        os.kill(pid_of(service.shards[1]), signal.SIGKILL)
        trained.take_step()
        assert_same_training(trained.run(NUM_STEPS), train(problem, service="inprocess"))
        assert named[-2:] == [1, 1]
        trained.optimizer.close()
