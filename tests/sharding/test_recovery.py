"""Shards that die within a step are rebuilt from a copy and a log, and all finish the step to the same bits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import pytest
import torch

from stepwell.optim import AdamWRule, LAMBRule, ProdigyRule, Rule
from stepwell.sharding.buffers import StateSource
from stepwell.sharding.errors import IncarnationError, MissingRankError
from stepwell.sharding.partials import sum_vectors
from stepwell.sharding.pieces import HeldPieces
from stepwell.sharding.push import Push
from stepwell.sharding.recovery import LoggedStep, Standing, known_sums
from stepwell.sharding.reports import StepResult
from stepwell.sharding.running import RunningStep
from stepwell.sharding.shard import Shard
from stepwell.sharding.vote import Decision
from tests.zoo import Run, assert_same_state, small

NUM_SHARDS = 3
COPIED_AT, FAILING, LAST = 2, 5, 7
"""The step after which copies are made, the one within which shards die, and the last one."""

RULES = pytest.mark.parametrize(
    "rule", [ProdigyRule(d0=1e-2), AdamWRule(), LAMBRule(lr=0.01)], ids=lambda rule: rule.name
)


class Kept:
    """What survives a shard: a copy of it as it was between two steps, and the steps since."""

    def __init__(self, shard: Shard) -> None:
        self._status, self._replicated = shard.status(), shard.replicated()
        self._workers = dict(shard.members.by_rank)
        exported = shard.buffers.export()
        self._held = HeldPieces(
            [{(piece.param, slot, piece.offset): values.clone() for slot, piece, values in exported}]
        )
        self.log: list[LoggedStep] = []

    def rebuild(self, shard: Shard) -> None:
        status = self._status
        source = StateSource(
            read=self._held.read,
            available=self._held.available,
            step_counts=dict(enumerate(status.step_counts)),
            scalars=dict(status.scalars),
            sequence=status.sequence,
            step=status.step,
            skipped_steps=status.skipped_steps,
        )
        shard.rebuild(source, self._replicated, self._workers)


class Fragile:
    """A run whose shards are driven one by one, as actors are, and can be lost."""

    def __init__(self, rule: Rule, *, world_size: int = 2) -> None:
        self.run = Run(small(), rule, num_shards=NUM_SHARDS, world_size=world_size)
        self.shards = self.run.group.shards
        self.kept = [Kept(shard) for shard in self.shards]

    def keep(self) -> None:
        """Copy every shard; its log begins anew."""
        self.kept = [Kept(shard) for shard in self.shards]

    def begin(self) -> list[RunningStep]:
        """Every rank pushes, it is logged, and every shard waits for the vote."""
        per_rank = [self.run.pushes(rank) for rank in range(self.run.world_size)]
        for index, shard in enumerate(self.shards):
            pushes: list[Push] = [each[index] for each in per_rank]
            for push in pushes:
                shard.receive(push)
            self.kept[index].log.append(LoggedStep(tuple(pushes)))
        return [RunningStep(shard.step()) for shard in self.shards]

    def step(self) -> None:
        self.finish(self.begin())

    def finish(self, running: list[RunningStep]) -> None:
        """Sum up whatever the shards wait for until they are done."""
        while any(each.vector is not None for each in running):
            self.reduce(running, range(NUM_SHARDS))
        self.log_sums()

    def reduce(self, running: list[RunningStep], told: Iterable[int]) -> None:
        """One all-reduce, whose sum reaches some shards alone."""
        vectors = [each.vector for each in running]
        assert all(vector is not None for vector in vectors)
        total = sum_vectors([vector for vector in vectors if vector is not None])
        for index in told:
            running[index].take(total.clone())

    def log_sums(self) -> None:
        """What is logged of a step once it is done; the next one's entry has it with it."""
        for kept, shard in zip(self.kept, self.shards, strict=True):
            kept.log[-1] = dataclasses.replace(kept.log[-1], sums=tuple(shard.history.last_sums))

    def recover(self, running: list[RunningStep], dead: Iterable[int]) -> StepResult:
        """Rebuild the dead, hand out what is known, and finish the step."""
        for index in dead:
            running[index].close()
            shard = self.shards[index] = Shard(self.run.group.spec, shard=index, num_shards=NUM_SHARDS)
            self.kept[index].rebuild(shard)
            *before, last = self.kept[index].log
            for logged in before:
                assert shard.replay(logged).result is not None
            running[index] = shard.replay(last)
        standings = [shard.standing() for shard in self.shards]
        known = known_sums(standings)
        for standing, each in zip(standings, running, strict=True):
            if each.result is None:
                step = standing.sequence + 1
                for total in known.get(step, ())[len(standing.sums.get(step, ())) :]:
                    each.take(total)
        self.finish(running)
        results = [each.result for each in running]
        first = results[0]
        assert first is not None
        assert all(result is not None and result.decision is first.decision for result in results)
        return first


def undisturbed(rule: Rule) -> Run:
    fragile = Fragile(rule)
    for _ in range(LAST):
        fragile.step()
    return fragile.run


def num_sums(rule: Rule) -> int:
    return 1 if isinstance(rule, AdamWRule) else 2


SUBSETS = [list(each) for size in (1, 2, 3) for each in itertools.combinations(range(NUM_SHARDS), size)]


@RULES
@pytest.mark.parametrize("dead", SUBSETS, ids=str)
def test_step_is_finished_whoever_dies_wherever_it_is(rule: Rule, dead: list[int]) -> None:
    """The last sum reaches any of the shards before some die: some that have it, some that have not, or both."""
    expected = undisturbed(rule)
    for phase, told in itertools.product(range(num_sums(rule)), [[], *SUBSETS]):
        fragile = Fragile(rule)
        for step in range(1, FAILING):
            fragile.step()
            if step == COPIED_AT:
                fragile.keep()
        running = fragile.begin()
        for _ in range(phase):
            fragile.reduce(running, range(NUM_SHARDS))
        fragile.reduce(running, told)
        assert fragile.recover(running, dead).decision is Decision.COMMIT
        while fragile.shards[0].sequence < LAST:
            fragile.step()
        assert_same_state(fragile.run.state(), expected.state())


def test_step_that_a_shard_has_lost_is_voted_down_and_taken_anew() -> None:
    rule = ProdigyRule(d0=1e-2)
    fragile = Fragile(rule)
    running = fragile.begin()
    fragile.kept[1].log[-1] = LoggedStep(())
    result = fragile.recover(running, [1])
    assert isinstance(result.error, MissingRankError)
    assert fragile.shards[0].sequence == 0
    for kept in fragile.kept:
        kept.log.pop()
    for _ in range(LAST):
        fragile.step()
    assert_same_state(fragile.run.state(), undisturbed(rule).state())


def test_rebuilt_shard_knows_its_history() -> None:
    fragile = Fragile(ProdigyRule(d0=1e-2))
    for _ in range(3):
        fragile.step()
    before, after = fragile.shards[1], Shard(fragile.run.group.spec, shard=1, num_shards=NUM_SHARDS)
    Kept(before).rebuild(after)
    assert after.status() == before.status()
    assert after.result(1, 3) == before.result(1, 3)
    after.require_taken(0, "worker-0", 0)
    with pytest.raises(IncarnationError):
        after.require_taken(0, "another", 0)


def test_most_of_what_is_known_of_a_step_counts() -> None:
    vote, partials = torch.ones(2), torch.ones(3)
    known = known_sums([Standing(4, {4: [vote], 5: [vote]}), Standing(4, {5: []}), Standing(5, {5: [vote, partials]})])
    assert {step: len(sums) for step, sums in known.items()} == {4: 1, 5: 2}
