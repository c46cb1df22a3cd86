"""Several workers on the shards of one job, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.sharding.errors import IncarnationError, JobMismatchError, MissingRankError, ServiceTimeoutError
from tests.client.lines import WAIT_S, FaultyTransport, SharedShards, SharedTransport, reached_by
from tests.client.training import assert_close, assert_equal, assert_same_state, copies_of, make_net, values_of

Maker = Callable[..., stepwell.ServiceOptimizer]


class Workers:
    """The workers of one job. Each rank's model begins with other values; rank 0's are to count."""

    def __init__(self, shared: SharedShards, make: Maker = stepwell.Prodigy, *, world_size: int = 2) -> None:
        self.shared, self.make, self.world_size = shared, make, world_size
        self.params: list[list[nn.Parameter]] = []
        self.optimizers: list[stepwell.ServiceOptimizer] = []
        self.transports: list[FaultyTransport] = []
        for rank in range(world_size):
            self.add(rank, [nn.Parameter(param.detach() + rank) for param in make_net().parameters()])

    def add(self, rank: int, params: list[nn.Parameter]) -> None:
        """Make the optimizer of ``rank``; one that is there already is a process that died."""
        transport = FaultyTransport(SharedTransport(self.shared, rank))
        with reached_by(lambda _: transport):
            optimizer = self.make(params, rank=rank, world_size=self.world_size)
        self.params[rank:] = [params, *self.params[rank + 1 :]]
        self.optimizers[rank:] = [optimizer, *self.optimizers[rank + 1 :]]
        self.transports[rank:] = [transport, *self.transports[rank + 1 :]]

    def set_grads(self, step: int, absent: Sequence[tuple[int, int]] = ()) -> list[Tensor | None]:
        """Give each rank its gradients, but none for the (rank, parameter) of ``absent``; the means over the others."""
        means: list[Tensor | None] = []
        for index, param in enumerate(self.params[0]):
            generator = torch.Generator().manual_seed(100 * step + index)
            grads = [torch.randn(param.shape, generator=generator) for _ in self.params]
            here = [rank for rank in range(len(self.params)) if (rank, index) not in absent]
            for rank, grad in enumerate(grads):
                self.params[rank][index].grad = grad if rank in here else None
            means.append(sum((grads[rank] for rank in here), torch.zeros(())) / len(here) if here else None)
        return means

    def on_all(self, call: Callable[[int], Any]) -> None:
        """Run ``call(rank)`` on every rank at once."""
        with ThreadPoolExecutor(self.world_size) as pool:
            for future in [pool.submit(call, rank) for rank in range(self.world_size)]:
                future.result(timeout=2 * WAIT_S)

    def step(self) -> None:
        """One step on every rank."""
        self.on_all(lambda rank: self.optimizers[rank].step())


ABSENT = [(), ((0, 1),), ((1, 0), (1, 3)), ((0, 2), (1, 2)), ()]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_gradients_are_averaged_over_the_ranks_that_have_one(num_shards: int) -> None:
    workers = Workers(SharedShards(num_shards=num_shards), stepwell.AdamW)
    expected = copies_of(make_net().parameters())
    reference = torch.optim.AdamW(expected)
    assert_equal(workers.params[1], expected)
    for step, absent in enumerate(ABSENT):
        for param, mean in zip(expected, workers.set_grads(step, absent), strict=True):
            param.grad = mean
        workers.step()
        reference.step()
        assert_equal(workers.params[0], workers.params[1])
    assert_close(workers.params[0], expected)


def test_ranks_show_the_same_state_whatever_the_number_of_shards() -> None:
    def trained(num_shards: int) -> Workers:
        workers = Workers(SharedShards(num_shards=num_shards), world_size=3)
        for step in range(5):
            workers.set_grads(step)
            workers.step()
        return workers

    one, four = trained(1), trained(4)
    for workers in (one, four):
        for params, optimizer in zip(workers.params, workers.optimizers, strict=True):
            assert_equal(params, one.params[0])
            assert_same_state(optimizer.state_dict(), one.optimizers[0].state_dict())


def test_groups_and_changes_of_rank_0_count() -> None:
    workers, alike = Workers(SharedShards()), Workers(SharedShards())
    for each in (workers, alike):
        each.optimizers[0].param_groups[0].update(lr=0.5, d=1e-3, d_max=1e-3)
        with torch.no_grad():
            each.params[0][0].mul_(2.0)
    workers.optimizers[1].param_groups[0].update(lr=9.0, d=7.0)
    with torch.no_grad():
        workers.params[1][0].zero_()
    for step in range(3):
        for each in (workers, alike):
            each.set_grads(step)
            each.step()
    for params in workers.params:
        assert_equal(params, alike.params[0])
    assert workers.optimizers[1].param_groups[0]["d"] == workers.optimizers[0].param_groups[0]["d"]


def test_step_without_a_rank_is_given_up_and_may_be_tried_again() -> None:
    workers, undisturbed = Workers(SharedShards(num_shards=2)), Workers(SharedShards(num_shards=2))
    for each in (workers, undisturbed):
        each.set_grads(0)
        each.step()
    before, state = values_of(workers.params[0]), workers.optimizers[0].state_dict()
    workers.set_grads(50)
    workers.shared.missing = "give up"
    for _ in range(2):
        with pytest.raises(
            MissingRankError, match=r"step 2: rank 1 of 2 did not push .* Call step\(\) again on every rank"
        ):
            workers.optimizers[0].step()
    workers.shared.missing = "wait"
    assert_equal(workers.params[0], before)
    assert_same_state(workers.optimizers[0].state_dict(), state)
    for each in (workers, undisturbed):
        each.set_grads(1)
        each.step()
    assert_equal(workers.params[0], undisturbed.params[0])
    pushes = [(header.sequence, header.attempt) for header in workers.transports[0].headers]
    assert pushes == [(1, 0), (2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize("refresh", [False, True])
def test_newer_gradient_replaces_one_whose_push_was_not_answered(refresh: bool) -> None:
    workers, undisturbed = Workers(SharedShards(num_shards=2)), Workers(SharedShards(num_shards=2))
    workers.set_grads(50)
    workers.shared.missing = "fail"
    with pytest.raises(ServiceTimeoutError, match="the line broke"):
        workers.optimizers[0].step()
    workers.shared.missing = "wait"
    if refresh:
        workers.optimizers[0].refresh()
    for each in (workers, undisturbed):
        each.set_grads(0)
    undisturbed.step()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(workers.optimizers[0].step)
        workers.shared.wait_for_push(rank=0, attempt=1)
        workers.optimizers[1].step()
        first.result(timeout=2 * WAIT_S)
    assert_equal(workers.params[0], undisturbed.params[0])
    assert workers.transports[0].headers[-1].attempt == 1


def test_push_that_was_not_answered_keeps_its_memory() -> None:
    """A shard may hold it and read it yet; the worker gathers its next gradient elsewhere."""
    workers = Workers(SharedShards(num_shards=2))
    workers.set_grads(50)
    workers.shared.missing = "fail"
    held = []
    for _ in range(3):
        with pytest.raises(ServiceTimeoutError, match="the line broke"):
            workers.optimizers[0].step()
        pushes = [shard._inbox._pushes[0] for shard in workers.shared.service.group.shards]
        parts = [part for push in pushes for part in push.gradient]
        held.append([(part, part.clone()) for part in parts])
        workers.set_grads(len(held))
    for attempt in held:
        for part, then in attempt:
            assert torch.equal(part, then)
    assert len({part.data_ptr() for attempt in held for part, _ in attempt}) == 6


def test_gradient_that_comes_after_its_step_was_taken_is_the_next_steps() -> None:
    workers, undisturbed = Workers(SharedShards(num_shards=2)), Workers(SharedShards(num_shards=2))
    for each in (workers, undisturbed):
        each.set_grads(0)
    undisturbed.step()
    workers.shared.missing = "fail"
    with pytest.raises(ServiceTimeoutError, match="the line broke"):
        workers.optimizers[0].step()
    workers.shared.missing = "wait"
    workers.optimizers[1].step()
    assert_equal(workers.params[1], undisturbed.params[1])
    # Asked before rank 1 came, the shards had said that the step was not taken.
    workers.optimizers[0]._registered._is_open = False
    for each in (workers, undisturbed):
        each.set_grads(1)
        each.step()
    assert_equal(workers.params[0], undisturbed.params[0])
    assert workers.optimizers[0].param_groups[0]["k"] == 2


def test_successor_of_a_dead_worker_takes_its_place() -> None:
    workers, undisturbed = Workers(SharedShards(num_shards=2)), Workers(SharedShards(num_shards=2))
    for each in (workers, undisturbed):
        each.set_grads(0)
        each.step()
    dead = workers.optimizers[1]
    workers.add(1, copies_of(make_net().parameters()))
    assert_equal(workers.params[1], undisturbed.params[0])
    for each in (workers, undisturbed):
        each.set_grads(1)
        each.step()
    assert_equal(workers.params[1], undisturbed.params[0])
    assert workers.optimizers[1].param_groups[0]["k"] == 2
    with pytest.raises(IncarnationError, match="another process has registered as this rank since"):
        dead.step()


def test_every_rank_loads_the_state_of_rank_0() -> None:
    workers, resumed = Workers(SharedShards()), Workers(SharedShards(num_shards=3))
    for step in range(3):
        workers.set_grads(step)
        workers.step()
    saved = workers.optimizers[1].state_dict()
    with torch.no_grad():
        for rank in range(2):
            for target, source in zip(resumed.params[rank], workers.params[0], strict=True):
                target.copy_(source)
    resumed.on_all(lambda rank: resumed.optimizers[rank].load_state_dict(saved))
    for each in (workers, resumed):
        each.set_grads(3)
        each.step()
    for params in resumed.params:
        assert_equal(params, workers.params[0])
    assert_same_state(resumed.optimizers[1].state_dict(), workers.optimizers[0].state_dict())


def test_rank_that_is_slow_loads_as_often_as_rank_0() -> None:
    workers = Workers(SharedShards())
    workers.set_grads(0)
    workers.step()
    saved = workers.optimizers[0].state_dict()
    for rank in range(2):
        for _ in range(2):
            workers.optimizers[rank].load_state_dict(saved)
    workers.set_grads(1)
    workers.step()
    assert_equal(workers.params[0], workers.params[1])


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ([torch.zeros(40, 12)], {}, "number of parameters: the service has 4, a worker has 1"),
        ([torch.zeros(3)], {}, r"parameter 0: the service has '' \[40, 12\] .*, a worker has '' \[3\]"),
        (None, {"slice_p": 2}, "slice_p: the service has 1, a worker has 2"),
        (None, {"world_size": 3}, "world_size: the service has 2, a worker has 3"),
    ],
)
def test_worker_with_another_job_is_told_the_difference(
    params: list[Tensor] | None, options: dict[str, Any], message: str
) -> None:
    shared = SharedShards()
    Workers(shared)
    ranks: dict[str, Any] = {"rank": 1, "world_size": 2, **options}
    with reached_by(lambda rank: SharedTransport(shared, rank)), pytest.raises(JobMismatchError, match=message):
        stepwell.Prodigy(make_net().parameters() if params is None else map(nn.Parameter, params), **ranks)
