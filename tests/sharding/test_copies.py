"""A copy of a shard in memory: what is read from it is what the shard was."""

from __future__ import annotations

import pytest
import torch

from stepwell.optim import Rule
from stepwell.sharding.copies import pieces_of, read_copy, size_of, write_copy
from stepwell.sharding.errors import CheckpointError
from stepwell.sharding.shard import Shard
from tests.sharding.test_compiled import EVERY_RULE
from tests.zoo import Run, assert_same_state, small, straddling


def copied(shard: Shard) -> Shard:
    snapshot, replicated = shard.snapshot(), shard.replicated()
    pieces, members = pieces_of(snapshot), dict(shard.members.by_rank)
    memory = torch.empty(size_of(pieces), dtype=torch.uint8)
    write_copy(snapshot, memory)
    status = snapshot.status
    other = Shard(shard.spec, shard=status.shard, num_shards=3)
    other.rebuild(read_copy(memory, pieces, status), replicated, members)
    return other


@pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=EVERY_RULE.keys())
def test_shards_that_were_rebuilt_go_on_to_the_same_bits(rule: Rule) -> None:
    run, expected = (Run(small(), rule, num_shards=3, world_size=2).steps(4) for _ in range(2))
    run.group.shards[:] = [copied(shard) for shard in run.group.shards]
    assert_same_state(run.state(), expected.state())
    assert_same_state(run.steps(8).state(), expected.steps(8).state())


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes_and_strides_lie_where_they_can_be_read(dtype: str) -> None:
    rule = EVERY_RULE["Prodigy"]
    run, expected = (Run(straddling().as_dtype(dtype), rule, num_shards=3).steps(2) for _ in range(2))
    run.group.shards[:] = [copied(shard) for shard in run.group.shards]
    assert_same_state(run.steps(4).state(), expected.steps(4).state())


def test_copy_is_of_its_moment_though_steps_are_taken_before_it_is_written() -> None:
    rule = EVERY_RULE["Prodigy"]
    run, expected = (Run(small(), rule, num_shards=3).steps(3) for _ in range(2))
    shards, moments = run.group.shards, []
    for shard in shards:
        snapshot = shard.snapshot()
        moments.append((snapshot, pieces_of(snapshot), shard.replicated()))
    run.steps(5)
    for index, (snapshot, pieces, replicated) in enumerate(moments):
        memory = torch.empty(size_of(pieces), dtype=torch.uint8)
        write_copy(snapshot, memory)
        other = Shard(run.group.spec, shard=index, num_shards=3)
        other.rebuild(read_copy(memory, pieces, snapshot.status), replicated, dict(shards[index].members.by_rank))
        shards[index] = other
    assert_same_state(run.state(), expected.state())


def test_snapshot_that_was_closed_gives_no_copy() -> None:
    snapshot = Run(small(), EVERY_RULE["AdamW"]).steps(1).group.shards[0].snapshot()
    memory = torch.empty(size_of(pieces_of(snapshot)), dtype=torch.uint8)
    snapshot.close("a test")
    with pytest.raises(CheckpointError, match="a test"):
        write_copy(snapshot, memory)
