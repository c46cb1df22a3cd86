"""A spare takes a lost shard's place: declared faults, alone and in pairs, end with the same bits."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from stepwell.server.config import ServiceConfig
from tests.faults import COORDINATOR_POINTS, REBUILDING_POINTS, SPARE_POINTS, Fault, fail_at, shard_faults
from tests.server.simulated import Cluster, simulated
from tests.server.test_faults import FAILING, LOG_STEPS, NUM_SHARDS, begin, require_same

# Processes die here with tasks under way; what is left of them goes when Python collects it, with no loop to run on.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def _leave_nothing_to_be_collected_in_other_modules() -> Iterator[None]:
    yield
    gc.collect()


def seated(cluster: Cluster) -> dict[int, int | str]:
    """Which process is which shard; nobody is two, and no two are one."""
    seats = [(process.actor._shard, process.name) for process in (*cluster.shards, *cluster.spares)]
    shards = [(shard, name) for shard, name in seats if shard is not None]
    assert sorted(shard for shard, _ in shards) == list(range(cluster.config.num_shards))
    return dict(shards)


def require_same_with_spare(*faults: Fault, num_shards: int = NUM_SHARDS, standby: int = 1) -> dict[int, int | str]:
    """Train while these happen; who is which shard in the end."""
    with simulated(num_shards, faults, log_steps=LOG_STEPS, standby=standby) as cluster:
        require_same(begin(cluster))
        assert cluster.happened
        return seated(cluster)


@pytest.mark.parametrize("fault", shard_faults(1, FAILING), ids=str)
def test_spare_is_the_shard_that_is_lost(fault: Fault) -> None:
    places = require_same_with_spare(fault)
    assert places == {0: 0, 1: 1 if fault.what == "lose" else "spare 0", 2: 2}


@pytest.mark.parametrize("point", ["voting", "applied", "asked keep"])
def test_lost_shard_is_the_next_spare(point: str) -> None:
    """Shard 1 dies twice, shard 0 later: a process for each, and a spare again after it."""
    faults = [fail_at(1, 2, point), fail_at(1, 4, point), fail_at(0, 7, point)]
    with simulated(2, faults, log_steps=LOG_STEPS, standby=1) as cluster:
        require_same(begin(cluster))
        assert not cluster.to_come
        assert seated(cluster) == {0: "spare 0", 1: 1}


@pytest.mark.parametrize("point", COORDINATOR_POINTS)
@pytest.mark.parametrize("fault", shard_faults(0, FAILING)[::3], ids=str)
def test_coordinator_that_is_started_again_finds_the_spare_by_its_claim(fault: Fault, point: str) -> None:
    require_same_with_spare(fault, Fault("coordinator", point, 1), num_shards=2)


@pytest.mark.parametrize(
    "second",
    [*(Fault("spare", point) for point in SPARE_POINTS), *(Fault(1, point) for point in REBUILDING_POINTS)],
    ids=str,
)
def test_spare_that_dies_as_it_becomes_the_shard(second: Fault) -> None:
    """Whoever is there first is the shard then: it again, or the process that was it before."""
    with simulated(NUM_SHARDS, [fail_at(1, FAILING, "voted"), second], log_steps=LOG_STEPS, standby=1) as cluster:
        require_same(begin(cluster))
        assert not cluster.to_come
        assert seated(cluster)[1] in (1, "spare 0")


@pytest.mark.parametrize("others", [[0], [2], [0, 2]], ids=str)
def test_more_shards_than_spares_are_lost(others: Sequence[int]) -> None:
    with simulated(NUM_SHARDS, [], log_steps=LOG_STEPS, standby=1) as cluster:
        trainer = begin(cluster).run(FAILING)
        for index in (1, *others):
            cluster.do(cluster.shards[index].kill)
        require_same(trainer)
        seated(cluster)  # whoever was there first


def test_coordinator_dies_when_all_is_well_and_finds_who_is_which() -> None:
    with simulated(2, [fail_at(1, 2, "voting")], log_steps=LOG_STEPS, standby=1) as cluster:
        trainer = begin(cluster).run(FAILING)
        service: Any = trainer.optimizer.service
        before = seated(cluster)
        cluster.do(cluster.coordinator.kill)
        assert service.status()["standby"]["wanted"] == 1
        assert [shard._process.name for shard in service.find_shards()] == [before[0], before[1]] == [0, "spare 0"]
        require_same(trainer)
        assert seated(cluster) == before


@pytest.mark.parametrize("changes", [{"redundancy": 0}, {"num_gpus_per_shard": 1}, {"standby": -1}])
def test_standby_is_refused_where_a_spare_could_be_no_shard(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="standby: expected 0"):
        ServiceConfig("test", **{"standby": 1, **changes})
