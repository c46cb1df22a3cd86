"""Several workers on one job: threads that each hold an optimizer, and processes that nothing but torch connects."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import stepwell
from stepwell.sharding.errors import JobMismatchError, MissingRankError, NonFiniteGradientError
from tests.integration.conftest import Launch
from tests.integration.processes import assert_all_end, processes_with
from tests.integration.training import D0, LIMIT_S, Oracle, Trainer, errors_on_all, make_workers, on_all, small_in_order
from tests.zoo import Problem, ZooTensor, assert_same_tensors

ROOT = Path(__file__).parents[2]
NUM_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two workers and their oracle."""

    service: stepwell.Service
    workers: list[Trainer]
    oracle: Oracle

    def train(self) -> None:
        """Some steps, after which everything must be as the oracle has it."""
        on_all(self.workers, lambda worker: worker.run(worker.step + 3))
        self.oracle.to(self.workers[0].step)
        self.require_same()

    def require_same(self) -> None:
        for worker in self.workers:
            self.oracle.require_same(worker)


@pytest.fixture(scope="module")
def module_pair(module_launch: Launch) -> Pair:
    service = module_launch(2, worker_timeout_s=2.0)
    return Pair(service, make_workers(service, 2, on_nonfinite="raise"), Oracle(2))


@pytest.fixture
def pair(module_pair: Pair) -> Iterator[Pair]:
    """A pair in the middle of its training, which goes on after the test as if nothing had been."""
    module_pair.train()
    yield module_pair
    module_pair.train()


def test_two_workers_give_what_one_does(pair: Pair) -> None:
    on_all(pair.workers, lambda worker: worker.run(NUM_STEPS))
    pair.oracle.to(NUM_STEPS)
    require_close_to_one_worker(pair.workers)


def test_four_workers_give_what_one_does(launch: Launch) -> None:
    workers = make_workers(launch(2), 4)
    for worker in workers[1:]:
        assert_same_tensors(worker.params, workers[0].params, "parameter as registered")
    on_all(workers, lambda worker: worker.run(NUM_STEPS))
    oracle = Oracle(4).to(NUM_STEPS)
    for worker in workers:
        oracle.require_same(worker)
    require_close_to_one_worker(workers)
    on_all(workers, lambda worker: worker.optimizer.close())


def test_load_state_dict_waits_for_a_rank_that_has_not_registered_yet(launch: Launch) -> None:
    """Rank 1 registers after rank 0 wants to load; it would else wait for a load that has been."""
    service = launch(1, worker_timeout_s=LIMIT_S)
    saved = Trainer(small_in_order(), stepwell.Prodigy, d0=D0).run(3).optimizer.state_dict()

    def load(rank: int) -> Trainer:
        worker = Trainer(small_in_order(), stepwell.Prodigy, d0=D0, service=service, rank=rank, world_size=2)
        worker.optimizer.load_state_dict(saved)
        worker.step = 3
        return worker

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(load, 0)
        while not service.status().get("timeline"):
            assert not first.done()
        second = pool.submit(load, 1)
        workers = [loading.result(timeout=LIMIT_S) for loading in (first, second)]
    on_all(workers, lambda worker: worker.run(5))
    assert_same_tensors(workers[0].params, workers[1].params, "parameter")
    on_all(workers, lambda worker: worker.optimizer.close())


def require_close_to_one_worker(workers: list[Trainer]) -> None:
    """That saw the same batches whole."""
    alone = Trainer(small_in_order(), stepwell.Prodigy, d0=D0, service="inprocess").run(NUM_STEPS)
    for worker in workers:
        for left, right in zip(worker.params, alone.params, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_nan_from_one_worker_is_told_to_both_and_moves_nothing(pair: Pair) -> None:
    for worker in pair.workers:
        worker.set_gradients()
    grad = pair.workers[1].params[0].grad
    assert grad is not None
    grad.view(-1)[3] = float("nan")
    for error in errors_on_all(pair.workers, lambda worker: worker.optimizer.step()):
        assert isinstance(error, NonFiniteGradientError)
        assert "was skipped on all shards: the averaged gradient holds inf or NaN" in str(error)
    pair.require_same()
    assert pair.service.status()["skipped_steps"] == 1


def test_missing_rank_is_told_to_the_other_and_moves_nothing(pair: Pair) -> None:
    for worker in pair.workers:
        worker.set_gradients()
        with pytest.raises(MissingRankError, match=f"rank {1 - worker.rank} of 2 did not push to shard 0 within 2 s"):
            worker.optimizer.step()
        pair.require_same()


MISMATCHES: dict[str, tuple[Problem, dict[str, Any], str]] = {
    "a shape": (
        Problem((*small_in_order().tensors[:2], ZooTensor((8,), has_grad=False), *small_in_order().tensors[3:])),
        {},
        r"rank 1 does not match the service's job: parameter 2: the service has '' \[7\] float32 in group 0, "
        r"rank 1 has '' \[8\] float32 in group 0\. Build the same model",
    ),
    "a tensor more": (
        Problem((*small_in_order().tensors, ZooTensor((5,), group=1))),
        {},
        "number of parameters: the service has 8, rank 1 has 9",
    ),
    "dtypes": (
        small_in_order().as_dtype("bfloat16"),
        {},
        r"parameter 0: the service has '' \[40, 13\] float32 .* bfloat16",
    ),
    "a form of the rule": (small_in_order(), {"slice_p": 11}, "slice_p: the service has 1, rank 1 has 11"),
    "the number of workers": (small_in_order(), {"world_size": 3}, "world_size: the service has 2, rank 1 has 3"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_model_that_does_not_match_is_told_its_first_difference(pair: Pair, case: str) -> None:
    problem, keywords, text = MISMATCHES[case]
    with pytest.raises(JobMismatchError, match=text):
        Trainer(problem, stepwell.Prodigy, **{"service": pair.service, "rank": 1, "world_size": 2, **keywords})


def test_successor_of_a_worker_goes_on_with_the_service_s_parameters(pair: Pair) -> None:
    old = pair.workers[1]
    keywords: dict[str, Any] = {"service": pair.service, "rank": 1, "world_size": 2, "d0": D0, "on_nonfinite": "raise"}
    pair.workers[1] = Trainer(small_in_order(), stepwell.Prodigy, shift=5.0, **keywords)
    pair.workers[1].step = old.step
    pair.require_same()


@pytest.mark.timeout(180)
def test_processes_without_a_named_service_share_an_embedded_one(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    environment = {**os.environ, "STEPWELL_TEST_MARK": mark, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.embedded_worker", str(rank), "2", str(tmp_path)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=150)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert_all_end(processes_with("STEPWELL_TEST_MARK", mark))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = Oracle(2).to(30).run
    for result in results:
        assert_same_tensors(result["began_with"], small_in_order().parameters(), "initial parameter")
        assert_same_tensors(result["params"], expected.params(), "parameter")
        for index, state in result["state"].items():
            assert torch.equal(state["s"].flatten(), expected.state().slots["s"][index])
        assert (result["status"]["num_shards"], result["status"]["step"]) == (2, 30)
