"""State that goes over to another number of shards in mid-run: the bits are those of the run left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from unittest import mock

import pytest

from stepwell.optim import Rule
from stepwell.sharding import resharding
from stepwell.sharding.errors import NotRegisteredError
from stepwell.sharding.reports import Receipt
from stepwell.sharding.resharding import rows_of, runs_in_common
from stepwell.sharding.shard import Shard
from tests.sharding.test_compiled import EVERY_RULE
from tests.zoo import Run, assert_same_state, small, straddling


def resharded(shards: Sequence[Shard], num_shards: int) -> list[Shard]:
    """As many new shards that go on where ``shards`` are."""
    first, successors = shards[0], []
    for index in range(num_shards):
        shard = Shard(first.spec, shard=index, num_shards=num_shards)
        with pytest.raises(NotRegisteredError):
            shard.require_whole()
        for before, predecessor in enumerate(shards):
            for run in runs_in_common(shard.buffers, before, len(shards)):
                rows_of(shard.buffers, run).copy_(rows_of(predecessor.buffers, run))
        shard.succeed(first.status(), first.replicated())
        for rank, member in first.members.by_rank.items():
            shard.admit(rank, member.incarnation, member.holdings)
        successors.append(shard)
    return successors


def reshard(run: Run, num_shards: int) -> None:
    run.group.shards[:] = resharded(run.group.shards, num_shards)


@pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=EVERY_RULE.keys())
def test_run_goes_on_to_the_same_bits_with_other_numbers_of_shards(rule: Rule) -> None:
    run, expected = Run(small(), rule, num_shards=4, world_size=2).steps(3), Run(small(), rule, world_size=2)
    for num_shards, stop in ((7, 6), (2, 8), (1, 9), (3, 10)):
        reshard(run, num_shards)
        assert_same_state(run.state(), expected.steps(run.next_sequence - 1).state())
        run.steps(stop)
    assert_same_state(run.state(), expected.steps(10).state())


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_large_slots_go_over_in_runs_of_limited_size(dtype: str) -> None:
    rule = EVERY_RULE["Prodigy"]
    run, expected = (Run(straddling().as_dtype(dtype), rule, num_shards=3).steps(2) for _ in range(2))
    with mock.patch.object(resharding, "RUN_BYTES", 3 * 256 * 8):
        shard = run.group.shards[1]
        sizes = [rows_of(shard.buffers, each).nbytes for each in runs_in_common(shard.buffers, 0, 2)]
        assert 0 < min(sizes) <= max(sizes) <= 3 * 256 * 8
        reshard(run, 5)
    assert_same_state(run.steps(4).state(), expected.steps(4).state())


def test_shards_that_take_over_know_of_the_last_step() -> None:
    """Who did not hear of it asks them, and who pushes it once more is told that it is taken."""
    run = Run(small(), EVERY_RULE["AdamW"], num_shards=2).steps(2)
    pushes = run.pushes()
    run.group.push(pushes)
    expected = run.group.shards[0].status()
    reshard(run, 3)
    for shard, push in zip(run.group.shards, [*pushes, pushes[0]], strict=True):
        assert shard.receive(push) is Receipt.DECIDED
        result = shard.result(push.header.timeline, push.header.sequence)
        assert result is not None
        assert result.sequence == 3
        here = shard.status()
        assert here == dataclasses.replace(expected, shard=here.shard, size_bytes=here.size_bytes)


def test_shards_that_take_over_go_on_with_the_history() -> None:
    run = Run(small(), EVERY_RULE["AdamW"], num_shards=2).steps(3)
    expected = run.group.shards[0].history.chronicle.columns()
    reshard(run, 3)
    run.steps(4)
    for shard in run.group.shards:
        columns = shard.history.chronicle.columns()
        assert columns["step"] == [1, 2, 3, 4]
        assert {name: values[:3] for name, values in columns.items()} == expected
