"""Workers that join an elastic service, stay away and leave; the oracle averages their gradients by hand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

import stepwell
from stepwell.sharding.errors import JobMismatchError, RankExcludedError
from tests.integration.conftest import Launch
from tests.integration.training import D0, ByHand, Trainer, make_workers, on_all, small_in_order

WORKER_TIMEOUT_S = 6.0


def train(oracle: ByHand, workers: Sequence[Trainer], *, num_steps: int = 3) -> None:
    """Some steps of these workers, after which they and the oracle have the same."""
    on_all(workers, lambda worker: worker.run(worker.step + num_steps))
    for _ in range(num_steps):
        oracle.average([(each.rank, each.world_size) for each in workers])
    for worker in workers:
        oracle.require_same(worker)
        assert worker.optimizer.ranks == tuple(sorted(each.rank for each in workers))


@pytest.mark.timeout(240)
def test_two_workers_become_three_then_two_then_one(launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="stepwell")
    service = launch(2, elastic=True, redundancy=1, kernel="eager", worker_timeout_s=WORKER_TIMEOUT_S)
    keywords: dict[str, Any] = {"service": service, "d0": D0}
    first, second = make_workers(service, 2)
    oracle = ByHand()
    train(oracle, [first, second])
    with pytest.raises(JobMismatchError, match="is elastic, which needs gradients='local'"):
        Trainer(small_in_order(), stepwell.Prodigy, rank=2, world_size=3, gradients="replicated", **keywords)

    third = Trainer(small_in_order(), stepwell.Prodigy, shift=2.0, rank=2, world_size=3, **keywords)
    third.step = first.step
    oracle.require_same(third)
    train(oracle, [first, second, third])
    assert [record.getMessage() for record in caplog.records] == [
        "step 4 was taken with rank 2: gradients are averaged over 3 ranks from now on"
    ]

    caplog.clear()
    train(oracle, [first, third])
    assert [record.getMessage() for record in caplog.records] == [
        "step 7 was taken without rank 1: gradients are averaged over 2 ranks from now on"
    ]
    status = service.status()
    assert (status["world_size"], status["ranks"], status["excluded"]) == (2, [0, 2], {1: 7})
    second.set_gradients()
    with pytest.raises(RankExcludedError, match="rank 1: from step 7 on the job goes on with ranks 0, 2, as this"):
        second.optimizer.step()
    second.optimizer.refresh()
    second.step = first.step
    train(oracle, [first, second, third])

    for worker in (first, second):
        worker.optimizer.close()
    train(oracle, [third])
    third.optimizer.close()
