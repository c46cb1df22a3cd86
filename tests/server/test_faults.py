"""Every declared fault, alone and in pairs: the run goes on to the same bits, or ends in the error that says so.

Without Ray; ``tests/integration/test_faults.py`` has some of them with it, ``make chaos ARGS=--matrix`` all.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import stepwell
from stepwell.client import object_store
from stepwell.client.patience import Patience
from stepwell.sharding.checkpoint import find_damages
from stepwell.sharding.errors import CheckpointRestoreNeededError, KernelError, StepwellError
from stepwell.sharding.manifest import MANIFEST_NAME
from tests.faults import (
    COORDINATOR_POINTS,
    COORDINATOR_SAVING_POINTS,
    KEEPER_POINTS,
    REBUILDING_POINTS,
    RECOVERY_POINTS,
    SAVING_POINTS,
    Fault,
    fail_at,
    shard_faults,
    shard_pairs,
)
from tests.integration.training import D0, Trainer, assert_same_training
from tests.server.simulated import LIMIT_S, Cluster, Disturb, simulated
from tests.zoo import small

# Processes die here with tasks under way; what is left of them goes when Python collects it, with no loop to run on.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def _leave_nothing_to_be_collected_in_other_modules() -> Iterator[None]:
    yield
    gc.collect()


NUM_SHARDS = 3
NUM_STEPS, FAILING = 9, 4
LOG_STEPS = 4
"""A copy is made every other step."""

RULES: dict[str, dict[str, Any]] = {"Prodigy": {"d0": D0}, "AdamW": {}, "LAMB": {}}
WORKER_POINTS = ("sending 0", "sending 1", "waiting", "taking")
"""Before the first or second shard has the push, all have it, or the worker has taken what they replied."""


class WorkerKilled(BaseException):
    """Ends a worker in the middle of its step."""


@contextlib.contextmanager
def killed_at(point: str) -> Iterator[None]:
    """Within this block the worker dies at a point of its next step."""
    num_sent = itertools.count()

    def at(where: str, original: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        if point == (f"sending {next(num_sent)}" if where == "sending" else where):
            raise WorkerKilled
        return original(*args, **keywords)

    hooked = {"pack_exchange": "sending", "wait_for_all": "waiting"}
    transport = object_store.ObjectStoreTransport
    with contextlib.ExitStack() as stack:
        for name, where in hooked.items():
            stack.enter_context(
                mock.patch.object(object_store, name, functools.partial(at, where, getattr(object_store, name)))
            )
        fill = functools.partialmethod(_fill, functools.partial(at, "taking"), transport._fill)
        stack.enter_context(mock.patch.object(transport, "_fill", fill))
        yield


def _fill(self: Any, at: Callable[..., Any], original: Callable[..., Any], *args: Any) -> None:
    at(functools.partial(original, self), *args)


@functools.cache
def left_alone(rule: str, num_steps: int = NUM_STEPS) -> Trainer:
    return Trainer(small(), getattr(stepwell, rule), service="inprocess", **RULES[rule]).run(num_steps)


def begin(cluster: Cluster, rule: str = "Prodigy") -> Trainer:
    return Trainer(small(), getattr(stepwell, rule), service=cluster.start(), **RULES[rule])


def successor_of(trainer: Trainer, rule: str = "Prodigy") -> Trainer:
    """A new process in a worker's place."""
    service = trainer.optimizer.service
    successor = Trainer(small(), getattr(stepwell, rule), shift=3.0, service=service, **RULES[rule])
    successor.step = successor.optimizer.num_steps
    return successor


def require_same(trainer: Trainer, rule: str = "Prodigy") -> None:
    """Train to the end; it is that of a run left alone."""
    assert_same_training(trainer.run(NUM_STEPS), left_alone(rule))


def ids(*faults: Fault) -> str:
    return "+".join(map(str, faults))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fault", shard_faults(1, FAILING), ids=str)
def test_one_shard(fault: Fault, rule: str) -> None:
    with simulated(NUM_SHARDS, [fault], log_steps=LOG_STEPS) as cluster:
        require_same(begin(cluster, rule), rule)
        assert bool(cluster.happened) == (rule != "AdamW" or not fault.point.startswith("summ")), "AdamW sums once"


@pytest.mark.parametrize("faults", shard_pairs(FAILING), ids=lambda faults: ids(*faults))
def test_two_shards(faults: tuple[Fault, ...]) -> None:
    with simulated(NUM_SHARDS, faults, log_steps=LOG_STEPS) as cluster:
        require_same(begin(cluster))
        assert cluster.happened


@pytest.mark.parametrize(
    ("who", "point"),
    [*((who, point) for who in (0, 1) for point in RECOVERY_POINTS), *((1, point) for point in REBUILDING_POINTS)],
)
def test_shard_while_one_is_brought_back(who: int, point: str) -> None:
    """The same one again, or another that lives, and so is not rebuilt."""
    with simulated(NUM_SHARDS, [fail_at(1, FAILING, "voted"), Fault(who, point, FAILING - 1)]) as cluster:
        require_same(begin(cluster))
        assert not cluster.to_come


@pytest.mark.parametrize("point", COORDINATOR_POINTS)
@pytest.mark.parametrize("fault", shard_faults(0, FAILING), ids=str)
def test_shard_and_coordinator(fault: Fault, point: str) -> None:
    with simulated(2, [fault, Fault("coordinator", point, 1)], log_steps=LOG_STEPS) as cluster:
        require_same(begin(cluster))
        assert cluster.happened


@pytest.mark.parametrize("point", WORKER_POINTS)
@pytest.mark.parametrize("fault", [None, *shard_faults(1, FAILING)], ids=str)
def test_shard_and_worker(fault: Fault | None, point: str) -> None:
    with simulated(2, [fault] if fault else [], log_steps=LOG_STEPS) as cluster:
        trainer = begin(cluster).run(FAILING - 1)
        with killed_at(point), pytest.raises(WorkerKilled):
            trainer.run(FAILING)
        require_same(successor_of(trainer))


@pytest.mark.parametrize(
    ("fault", "point"),
    [*((None, point) for point in WORKER_POINTS), *((fault, "sending 1") for fault in shard_faults(1, FAILING))],
    ids=str,
)
def test_worker_that_is_dismissed(fault: Fault | None, point: str) -> None:
    """Whatever shards have its push, and though one of them is lost: its step is taken by all or by none."""
    with simulated(2, [fault] if fault else [], log_steps=LOG_STEPS) as cluster:
        trainer = begin(cluster).run(FAILING - 1)
        with killed_at(point), pytest.raises(WorkerKilled):
            trainer.run(FAILING)
        service: Any = trainer.optimizer.service
        Patience(LIMIT_S, "the test").go_on_with(service.dismiss_workers)
        require_same(successor_of(trainer))


@pytest.mark.parametrize("point", KEEPER_POINTS[:-1])
def test_keeper(point: str) -> None:
    with simulated(NUM_SHARDS, [Fault("keeper", point, FAILING - 1)], log_steps=LOG_STEPS) as cluster:
        require_same(begin(cluster))
        assert cluster.happened


@pytest.mark.parametrize("point", KEEPER_POINTS)
@pytest.mark.parametrize("fault", shard_faults(1, FAILING), ids=str)
def test_shard_and_keeper(fault: Fault, point: str, tmp_path: Path) -> None:
    """What only the keeper had is gone; then the error says so, and the checkpoint brings all back."""
    with simulated(2, [fault, Fault("keeper", point, FAILING - 1)], log_steps=LOG_STEPS) as cluster:
        trainer = begin(cluster).run(2)
        service = trainer.optimizer.service
        service.save(str(tmp_path))
        try:
            trainer.run(NUM_STEPS)
        except CheckpointRestoreNeededError:
            assert cluster.happened, "something was lost"
            service.restore(str(tmp_path))
            trainer.optimizer.refresh()
            trainer.step = 2
        require_same(trainer)


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(1, point, FAILING) for point in SAVING_POINTS),
        *(Fault("coordinator", point, FAILING) for point in COORDINATOR_SAVING_POINTS),
    ],
    ids=str,
)
def test_save_that_is_cut_off_leaves_a_whole_checkpoint_or_none(fault: Fault, tmp_path: Path) -> None:
    with simulated(NUM_SHARDS, [fault], log_steps=LOG_STEPS) as cluster:
        trainer = begin(cluster).run(FAILING)
        service, uri = trainer.optimizer.service, str(tmp_path)
        try:
            service.save(uri)
        except StepwellError:
            assert not (tmp_path / MANIFEST_NAME).exists()
        else:
            assert not find_damages(uri)
        assert cluster.happened
        require_same(trainer)
        assert service.save(uri) == NUM_STEPS
        assert not find_damages(uri)


def lossy(seed: int) -> Disturb:
    """Calls of worker and shards are dropped, doubled and late, and so are replies."""
    chance = random.Random(seed)

    def disturb(caller: int | str, callee: int | str, method: str) -> str:
        if caller == "worker" and method in ("exchange", "decided", "parameters"):
            return chance.choices(["", "drop call", "drop reply", "double", "delay"], [20, 1, 1, 1, 1])[0]
        if caller != "coordinator" and callee != "coordinator":
            return chance.choices(["", "delay"], [10, 1])[0]
        return ""

    return disturb


@pytest.mark.parametrize("seed", range(6))
def test_lossy_network_costs_no_step_and_takes_none_twice(seed: int) -> None:
    with simulated(NUM_SHARDS, log_steps=LOG_STEPS, worker_timeout_s=0.3) as cluster:
        trainer = begin(cluster)
        cluster.disturb = lossy(seed)
        require_same(trainer)


def test_partition_between_a_worker_and_a_shard_is_waited_for() -> None:
    num_left = itertools.count(20, -1)

    def partition(caller: int | str, callee: int | str, method: str) -> str:
        return "drop call" if caller == "worker" and callee == 1 and next(num_left) > 0 else ""

    with simulated(NUM_SHARDS, worker_timeout_s=0.3) as cluster:
        trainer = begin(cluster).run(2)
        cluster.disturb = partition
        require_same(trainer)
        assert next(num_left) < 0


def test_slow_peer_only_takes_time() -> None:
    with simulated(NUM_SHARDS) as cluster:
        cluster.disturb = lambda caller, callee, method: "delay" if 2 in (caller, callee) else ""
        require_same(begin(cluster))


def test_shard_that_comes_back_on_another_kind_of_machine_is_refused() -> None:
    with simulated(NUM_SHARDS, [fail_at(1, FAILING, "voted")], log_steps=LOG_STEPS) as cluster:
        trainer = begin(cluster).run(FAILING - 1)
        with (
            mock.patch("stepwell.sharding.owned_state.kernel_identity", return_value="torch 2, eager, cpu OLD"),
            pytest.raises(
                CheckpointRestoreNeededError, match=r"shard 1, started again, .*expected cpu \S+, got cpu OLD"
            ),
        ):
            trainer.run(FAILING)


def test_shards_on_machines_of_different_kinds_take_no_job() -> None:
    kinds = ["torch 2, eager, cpu AVX512", "torch 2, eager, cpu AVX2"]
    with (
        simulated(2) as cluster,
        mock.patch("stepwell.server.coordinated_shard.kernel_identity", side_effect=kinds),
        pytest.raises(KernelError, match=r"shard 1 computes other bits .*expected cpu AVX\w+, got cpu AVX\w+"),
    ):
        begin(cluster)
