"""Groups that are added during training."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import prodigyopt
import pytest
import torch
from torch import nn

import stepwell
from stepwell.optim import LAMBRule
from stepwell.sharding.errors import HyperparameterError, JobMismatchError, TimelineError
from tests.client.lines import Fault, FaultyTransport, SharedShards, SharedTransport, reached_by
from tests.client.training import assert_close, assert_equal, copies_of, drive, make_net, set_grads, values_of
from tests.zoo import straddling


def make_params(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(300, 7), (5,), (), (40, 40), (0, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def grow(optimizer: torch.optim.Optimizer, first: list[nn.Parameter], added: list[nn.Parameter], **group: Any) -> None:
    """Five steps, an added group, five more."""
    drive(first, optimizer, range(5))
    optimizer.add_param_group({"params": added, **group})
    drive([*first, *added], optimizer, range(5, 10))


@pytest.mark.parametrize(
    ("make", "reference"),
    [(stepwell.AdamW, torch.optim.AdamW), (stepwell.Prodigy, prodigyopt.Prodigy)],
    ids=["AdamW", "Prodigy"],
)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_added_group_trains_as_with_the_reference(make: Any, reference: Any, num_shards: int) -> None:
    first, added = make_params(0), make_params(1)
    oracle_first, oracle_added = copies_of(first), copies_of(added)
    grow(make(first, num_shards=num_shards), first, added, weight_decay=0.1)
    grow(reference(oracle_first), oracle_first, oracle_added, weight_decay=0.1)
    assert_close([*first, *added], [*oracle_first, *oracle_added], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [stepwell.Prodigy, stepwell.AdamW, stepwell.LAMB])
def test_bits_after_an_added_group_are_the_same_for_any_number_of_shards(rule: Any) -> None:
    results = []
    for num_shards in (1, 2, 3, 7):
        first = straddling().parameters()
        added = copies_of(first[:6])
        optimizer = rule(first, num_shards=num_shards)
        grow(optimizer, first, added)
        results.append((values_of([*first, *added]), optimizer.state_dict()))
    for values, state_dict in results[1:]:
        assert_equal(values, results[0][0])
        assert state_dict["param_groups"] == results[0][1]["param_groups"]


def test_adding_a_group_leaves_what_exists_as_it_is() -> None:
    first, added = make_params(0), make_params(1)
    optimizer = stepwell.Prodigy(first)
    drive(first, optimizer, range(5))
    before, values, initial = optimizer.state_dict(), values_of(first), values_of(added)
    optimizer.add_param_group({"params": added, "lr": 0.5})
    after = optimizer.state_dict()
    assert_equal(first, values)
    assert_equal(added, initial)
    assert after["state"].keys() == before["state"].keys()
    for index, state in before["state"].items():
        assert all(torch.equal(torch.as_tensor(after["state"][index][k]), torch.as_tensor(v)) for k, v in state.items())
    assert optimizer.param_groups[1]["d"] == optimizer.param_groups[0]["d"]
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.service.status()["num_params"] == 10


def test_resumed_run_lays_an_added_group_out_as_it_was(tmp_path: Any) -> None:
    """What was registered together fixes the order of sums, so that a checkpoint says it."""
    first, added = straddling().parameters(), copies_of(straddling().parameters()[:6])
    optimizer = stepwell.LAMB(first, num_shards=2, lr=0.01)
    grow(optimizer, first, added)
    optimizer.service.save(str(tmp_path / "checkpoint"))
    drive([*first, *added], optimizer, range(10, 15))

    params = copies_of([*first, *added])
    groups: list[dict[str, Any]] = [{"params": params[: len(first)]}, {"params": params[len(first) :]}]
    resumed = stepwell.LAMB(groups, num_shards=3, lr=0.01)
    resumed.service.restore(str(tmp_path / "checkpoint"))
    resumed.refresh()
    drive(params, resumed, range(10, 15))
    assert_equal(params, [*first, *added])


def test_state_dict_of_an_optimizer_with_an_added_group_loads_into_a_fresh_one() -> None:
    first, added = make_params(0), make_params(1)
    optimizer = stepwell.AdamW(first)
    grow(optimizer, first, added)
    params = copies_of([*first, *added])
    other = stepwell.AdamW([{"params": params[:5]}, {"params": params[5:]}])
    other.load_state_dict(optimizer.state_dict())
    drive([*first, *added], optimizer, range(10, 13))
    drive(params, other, range(10, 13))
    assert_equal(params, [*first, *added])


@pytest.mark.parametrize("group", [{"params": []}, {"params": [], "lr": 0.1}])
def test_empty_group_can_be_added(group: dict[str, Any]) -> None:
    params, untroubled = make_params(), make_params()
    optimizer = stepwell.AdamW(params)
    optimizer.add_param_group(group)
    drive(params, optimizer, range(2))
    drive(untroubled, stepwell.AdamW(untroubled), range(2))
    assert_equal(params, untroubled)


def test_group_of_another_dtype_can_be_added() -> None:
    first, added = make_params(0), copies_of(make_params(1), torch.float64)
    exact = copies_of(added)
    grow(stepwell.AdamW(first), first, added)
    oracle = torch.optim.AdamW(exact)
    for step in range(5, 10):
        set_grads([*make_params(0), *exact], step)
        oracle.step()
    torch.testing.assert_close(added[0], exact[0], rtol=1e-12, atol=1e-12)


def test_refused_group_changes_nothing() -> None:
    first, untroubled = make_params(0), make_params(0)
    optimizer = stepwell.AdamW(first)
    drive(first, optimizer, range(3))
    with pytest.raises(HyperparameterError, match=r"group 1: Invalid learning rate: -1"):
        optimizer.add_param_group({"params": make_params(1), "lr": -1.0})
    with pytest.raises(ValueError, match="of group 1 appears in group 0 already"):
        optimizer.add_param_group({"params": [first[0]]})
    assert len(optimizer.param_groups) == 1
    drive(first, optimizer, range(3, 6))
    drive(untroubled, stepwell.AdamW(untroubled), range(6))
    assert_equal(first, untroubled)


@pytest.mark.parametrize(
    "fault",
    [Fault("extend", 1, "after", OSError("cut")), Fault("read_parameters", 2, "before", OSError("cut"))],
    ids=["unknown to the worker", "parameters not read"],
)
def test_group_that_the_service_took_although_adding_it_failed_is_added_again(fault: Fault) -> None:
    first, added = make_params(0), make_params(1)
    untroubled = make_params(0), make_params(1)
    with reached_by(lambda rank: FaultyTransport(SharedTransport(SharedShards(), rank), fault)):
        optimizer = stepwell.AdamW(first)
    drive(first, optimizer, range(5))
    with pytest.raises(OSError, match="cut"):
        optimizer.add_param_group({"params": added})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TimelineError, match="refresh"):
        optimizer.step()
    with pytest.raises(JobMismatchError, match=r"10 parameters, rank 0 has 5: a parameter group was added"):
        optimizer.refresh()
    optimizer.add_param_group({"params": added})
    assert optimizer.service.status()["num_params"] == 10
    drive([*first, *added], optimizer, range(5, 10))
    grow(stepwell.AdamW(untroubled[0]), *untroubled)
    assert_equal([*first, *added], [*untroubled[0], *untroubled[1]])


def test_several_ranks_add_a_group_together() -> None:
    shared = SharedShards(num_shards=2)
    models = [(make_params(0), make_params(rank)) for rank in range(2)]

    def train(rank: int) -> None:
        first, added = models[rank]
        with_rank: dict[str, Any] = {"rank": rank, "world_size": 2}
        grow(stepwell.AdamW(first, **with_rank), first, added)

    with reached_by(lambda rank: SharedTransport(shared, rank)), ThreadPoolExecutor(2) as pool:
        list(pool.map(train, range(2)))
    alone = make_params(0), make_params(0)
    grow(stepwell.AdamW(alone[0]), *alone)
    for first, added in models:
        assert_equal([*first, *added], [*alone[0], *alone[1]])


def test_rule_base_class_takes_added_groups_too() -> None:
    net = make_net()
    optimizer = stepwell.ServiceOptimizer(net[0].parameters(), LAMBRule())
    optimizer.add_param_group({"params": net[2].parameters()})
    assert optimizer.service.status()["num_params"] == 4
