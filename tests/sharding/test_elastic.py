"""Elastic jobs: steps go on without ranks that stay away, join or leave, to the bits of a job of just those ranks.

The oracle averages by hand, and steps with one rank on one shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import pytest
import torch

from stepwell.optim import AdamWRule, LAMBRule, ProdigyRule, Rule
from stepwell.sharding.errors import AttemptError, MissingRankError, RankExcludedError, UnknownRankError
from stepwell.sharding.partials import sum_vectors
from stepwell.sharding.recovery import LoggedStep
from stepwell.sharding.reports import StepResult
from stepwell.sharding.running import RunningStep
from stepwell.sharding.shard import Shard
from stepwell.sharding.vote import Decision
from stepwell.sharding.world import World
from tests.sharding.test_recovery import Kept
from tests.zoo import Run, assert_same_state, small

NUM_SHARDS = 2
RULES = pytest.mark.parametrize(
    "rule", [ProdigyRule(d0=1e-2), AdamWRule(), LAMBRule(lr=0.01)], ids=lambda rule: rule.name
)


class Elastic:
    """An elastic job of three ranks, and its oracle."""

    def __init__(self, rule: Rule | None = None, *, world_size: int = 3) -> None:
        rule = rule or ProdigyRule(d0=1e-2)
        self.run = Run(small(), rule, num_shards=NUM_SHARDS, world_size=world_size, is_elastic=True, kernel="eager")
        self.oracle = Run(small(), rule, kernel="eager")
        self.shards = self.run.group.shards

    def push(self, rank: int, shards: Iterable[int] = range(NUM_SHARDS)) -> None:
        """Let a rank's push reach some of the shards."""
        pushes = self.run.pushes(rank)
        for index in shards:
            self.shards[index].receive(pushes[index])

    def step(self, ranks: Sequence[int], *, expected: Sequence[int] | None = None) -> StepResult:
        """Some ranks push, and the step is taken with whoever has reached all shards, as the oracle takes it."""
        for rank in ranks:
            self.push(rank)
        return self.end_step(ranks if expected is None else expected)

    def end_step(self, expected: Sequence[int]) -> StepResult:
        step = self.run.next_sequence - 1
        each = [self.run.gradients(step, rank) for rank in expected]
        total = {index: sum((its[index] for its in each[1:]), each[0][index]) for index in each[0]}
        result = self.run.group.run_step()
        assert (result.decision, result.ranks) == (Decision.COMMIT, tuple(expected))
        self.oracle.step(gradients={index: value / len(expected) for index, value in total.items()})
        assert_same_state(self.run.state(), self.oracle.state())
        return result

    def set_world(self, world: World) -> None:
        for shard in self.shards:
            shard.set_world(world)

    def join(self, rank: int) -> None:
        self.run.group.admit(rank, f"worker-{rank}")
        self.set_world(self.run.world.joined(rank))


@RULES
def test_ranks_that_stay_away_come_back_join_and_leave(rule: Rule) -> None:
    job = Elastic(rule)
    job.step((0, 1, 2))
    job.step((0, 2))
    assert job.run.world.excluded == {1: 2}
    job.step((2, 0), expected=(0, 2))
    job.join(1)
    assert job.run.world.excluded == {}
    job.step((2, 1, 0), expected=(0, 1, 2))
    job.join(7)
    job.step((7, 0, 1, 2), expected=(0, 1, 2, 7))
    job.set_world(job.run.world.left(0).left(7))
    job.step((1, 2))
    job.set_world(job.run.world.left(1))
    job.step((2,))
    job.step((2,))
    assert job.run.world.ranks == (2,)


def test_rank_that_died_between_two_shards_is_left_out_on_both() -> None:
    job = Elastic()
    job.push(0)
    job.push(1, [1])
    job.push(2)
    job.end_step((0, 2))
    assert [shard.world for shard in job.shards] == [dataclasses.replace(job.run.world, excluded={1: 1})] * NUM_SHARDS


def test_ranks_that_other_shards_lack_are_left_out_one_after_the_other() -> None:
    job = Elastic(world_size=4)
    job.push(0, [1])
    job.push(1, [0])
    job.push(3)
    job.end_step((3,))
    assert job.run.world.excluded == {0: 1, 1: 1, 2: 1}


def test_step_that_nobody_brought_to_all_shards_is_given_up_and_excludes_nobody() -> None:
    job = Elastic(world_size=2)
    before = job.run.state()
    job.push(0, [0])
    job.push(1, [1])
    with pytest.raises(MissingRankError, match="step 1: rank 1 of 2 did not push to shard 0 within 5 s; no shard"):
        job.run.group.run_step()
    assert_same_state(job.run.state(), before)
    assert job.run.world.ranks == (0, 1)
    job.step((0, 1))


def test_job_that_is_not_elastic_gives_the_step_up() -> None:
    run = Run(small(), AdamWRule(), num_shards=NUM_SHARDS, world_size=3, kernel="eager")
    for rank in (0, 2):
        run.group.push(run.pushes(rank))
    with pytest.raises(MissingRankError, match="rank 1 of 3 did not push to shard 0 within 5 s"):
        run.group.run_step()
    assert run.world.ranks == (0, 1, 2)


def test_shards_that_hold_different_attempts_exclude_nobody() -> None:
    """Who is left out changes with a step that is taken, as everything else does."""
    job = Elastic()
    job.push(0)
    job.push(2)
    job.shards[1].receive(job.run.pushes(2, attempt=1)[1])
    before = job.run.state()
    result = [RunningStep(shard.step()) for shard in job.shards]
    while any(each.vector is not None for each in result):
        total = sum_vectors([each.vector for each in result if each.vector is not None])
        for each in result:
            each.take(total)
    assert [each.result.decision for each in result if each.result is not None] == [Decision.ABORT] * NUM_SHARDS
    assert_same_state(job.run.state(), before)
    assert job.run.world.ranks == (0, 1, 2)


@pytest.mark.parametrize("attempt", [0, 1])
def test_excluded_rank_is_told_so_whenever_its_push_comes(attempt: int) -> None:
    job = Elastic()
    late = job.run.pushes(1, attempt=attempt)
    job.step((0, 2))
    text = "rank 1: from step 1 on the job goes on with ranks 0, 2, as this one did not push within 5 s. Call refresh"
    for pushes in (late, job.run.pushes(1)):
        for shard, push in zip(job.shards, pushes, strict=True):
            with pytest.raises(RankExcludedError, match=text):
                shard.receive(push)
    with pytest.raises(RankExcludedError, match=text):
        job.shards[0].require_taken(1, "worker-1", attempt)
    job.join(1)
    with pytest.raises(AttemptError, match="step 1 was taken without rank 1"):
        job.shards[0].receive(late[0])
    job.step((0, 1, 2))


def test_push_of_a_rank_that_left_is_dropped_and_no_more_are_taken() -> None:
    job = Elastic()
    job.push(1)
    job.set_world(job.run.world.left(1))
    with pytest.raises(UnknownRankError, match="expected one of ranks 0, 2, got 1"):
        job.push(1)
    job.step((0, 2))


def test_hyperparameters_limits_and_parameters_by_hand_of_the_first_rank_count() -> None:
    job = Elastic()
    changed = torch.full((257,), 0.5)
    for group in job.run.groups:
        group["lr"] = 0.25
    job.run.group.push(job.run.pushes(2, reloaded={2: torch.zeros(257)}, max_grad_value=1e-9))
    for group in (*job.run.groups, *job.oracle.groups):
        group["lr"] = 0.5
    job.run.group.push(job.run.pushes(1, reloaded={2: changed}))
    each = [job.run.gradients(0, rank) for rank in (1, 2)]
    assert job.run.group.run_step().ranks == (1, 2)
    mean = {index: (each[0][index] + each[1][index]) / 2 for index in each[0]}
    job.oracle.step(gradients=mean, reloaded={2: changed})
    assert_same_state(job.run.state(), job.oracle.state())


def test_shard_that_is_rebuilt_takes_a_step_again_without_the_rank_that_stayed_away() -> None:
    job = Elastic()
    job.step((0, 1, 2))
    kept = Kept(job.shards[1])
    pushes = [job.run.pushes(rank)[1] for rank in (0, 2)]
    job.step((0, 2))
    first = LoggedStep(tuple(pushes), tuple(job.shards[1].history.last_sums))
    assert len(first.sums) == 3, "two votes and the partials"
    second = [job.run.pushes(rank)[1] for rank in (0, 2)]
    job.step((0, 2))

    for num_known in range(4):
        shard = Shard(job.run.group.spec, shard=1, num_shards=NUM_SHARDS)
        kept.rebuild(shard)
        running = shard.replay(dataclasses.replace(first, sums=first.sums[:num_known]))
        for total in first.sums[num_known:]:
            running.take(total)
        assert shard.world.excluded == {1: 2}
        last = shard.replay(LoggedStep(tuple(second), tuple(job.shards[1].history.last_sums)))
        assert last.result is not None
        assert last.result.ranks == (0, 2)
        for (_, _, ours), (_, _, theirs) in zip(shard.buffers.export(), job.shards[1].buffers.export(), strict=True):
            assert torch.equal(ours, theirs)
