"""One step of a group of shards: the vote, what is skipped or given up, and where a step may be interrupted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from stepwell.optim import AdamWRule, LAMBRule, ProdigyRule, Rule
from stepwell.sharding.errors import MissingRankError, NotRegisteredError, StepAbortedError
from stepwell.sharding.inprocess import run_in_lockstep
from stepwell.sharding.partials import sum_vectors
from stepwell.sharding.push import Push
from stepwell.sharding.reports import Receipt, StepResult
from stepwell.sharding.running import Reduction
from stepwell.sharding.vote import Decision
from tests.zoo import Run, assert_same_state, assert_same_tensors, constant, initial_state, small

RULES = pytest.mark.parametrize("rule", [ProdigyRule(d0=1e-3), AdamWRule(), LAMBRule()], ids=lambda rule: rule.name)


def ready(rule: Rule, *, num_shards: int = 3, world_size: int = 2) -> Run:
    """A run after three steps."""
    return Run(small(), rule, num_shards=num_shards, world_size=world_size).steps(3, schedule=constant)


def receive(run: Run, pushes: Sequence[Push]) -> list[Receipt]:
    return [shard.receive(push) for shard, push in zip(run.group.shards, pushes, strict=True)]


def receive_all(run: Run) -> None:
    for rank in range(run.world_size):
        receive(run, run.pushes(rank))


@RULES
def test_missing_rank_gives_the_step_up_and_changes_nothing(rule: Rule) -> None:
    run = ready(rule)
    before, buffers = run.state(), run.buffers()
    assert run.group.push(run.pushes(0)) is None
    with pytest.raises(MissingRankError, match="step 4: rank 1 of 2 did not push"):
        run.group.run_step()
    assert_same_tensors(run.buffers(), buffers)
    assert_same_state(run.state(), before)


def test_missing_rank_on_one_shard_gives_the_step_up_on_all() -> None:
    run = ready(ProdigyRule())
    before = run.buffers()
    receive(run, run.pushes(0))
    late = run.pushes(1)
    for shard, push in list(zip(run.group.shards, late, strict=True))[:2]:
        shard.receive(push)
    with pytest.raises(MissingRankError, match=r"rank 1 of 2 did not push to shard 2"):
        run.group.run_step()
    assert_same_tensors(run.buffers(), before)


@pytest.mark.parametrize("missing", [0, 1])
def test_step_that_was_given_up_may_be_tried_again(missing: int) -> None:
    run, untroubled = ready(ProdigyRule()), ready(ProdigyRule())
    run.group.push(run.pushes(1 - missing))
    with pytest.raises(StepAbortedError):
        run.group.run_step()
    assert run.group.push(run.pushes(1 - missing, attempt=1)) is None, "the abort is not the answer to a new try"
    result = run.group.push(run.pushes(missing))
    assert result is not None
    assert result.decision is Decision.COMMIT
    untroubled.step()
    assert_same_state(run.state(), untroubled.state())


def test_last_result_is_still_told_after_the_next_step_was_given_up() -> None:
    """A rank that did not hear of step 3 asks again while step 4 is in trouble."""
    run = ready(ProdigyRule())
    last = run.pushes(1, sequence=3, gradients={})
    run.group.push(run.pushes(0))
    with pytest.raises(StepAbortedError):
        run.group.run_step()
    result = run.group.push(last)
    assert result is not None
    assert (result.sequence, result.decision) == (3, Decision.COMMIT)


def test_shards_with_different_attempts_give_the_step_up() -> None:
    run = ready(ProdigyRule())
    before = run.buffers()
    receive(run, run.pushes(0))
    old, new = run.pushes(1, attempt=0), run.pushes(1, attempt=1)
    receive(run, [old[0], new[1], old[2]])
    with pytest.raises(StepAbortedError, match="different attempts") as caught:
        run.group.run_step()
    assert not isinstance(caught.value, MissingRankError)
    assert_same_tensors(run.buffers(), before)
    assert run.group.shards[0].sequence == 3


def test_shards_with_different_hyperparameters_give_the_step_up() -> None:
    run = ready(AdamWRule(), world_size=1)
    pushes = run.pushes()
    run.groups[0]["lr"] = 0.5
    receive(run, [pushes[0], *run.pushes()[1:]])
    with pytest.raises(StepAbortedError):
        run.group.run_step()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@RULES
def test_nonfinite_gradient_skips_the_step_on_all_shards(rule: Rule, bad: float) -> None:
    """One element on one rank and one shard; the other shards see nothing of it but the vote."""
    run = ready(rule)
    before, buffers = run.state(), run.buffers()
    gradients = run.gradients(3, rank=1)
    gradients[7].view(-1)[-1] = bad
    run.group.push(run.pushes(0))
    result = run.group.push(run.pushes(1, gradients=gradients))
    assert result is not None
    assert result.decision is Decision.SKIP
    assert result.scalars == before.scalars
    assert_same_tensors(run.buffers(), buffers)
    after = run.state()
    assert after.counters == (4, 4, 1)
    assert_same_state(dataclasses.replace(after, counters=before.counters), before)
    assert [shard.status().skipped_steps for shard in run.group.shards] == [1, 1, 1]
    assert run.step().decision is Decision.COMMIT


@RULES
def test_no_slot_has_moved_before_the_vote(rule: Rule) -> None:
    run, untroubled = ready(rule), ready(rule)
    buffers = run.buffers()
    receive_all(run)
    steps = [shard.step() for shard in run.group.shards]
    for step in steps:
        next(step)
    assert_same_tensors(run.buffers(), buffers)
    for step in steps:
        step.close()
    assert_same_tensors(run.buffers(), buffers)
    assert_same_state(run.state(), untroubled.state())
    for either in (run, untroubled):
        either.step()
    assert_same_state(run.state(), untroubled.state())


@RULES
def test_vote_that_fails_leaves_the_shard_as_it_was(rule: Rule) -> None:
    run = ready(rule)
    buffers = run.buffers()
    receive_all(run)
    step = run.group.shards[0].step()
    next(step)
    with pytest.raises(ConnectionError):
        step.throw(ConnectionError())
    assert_same_tensors(run.buffers(), buffers)
    run.group.shards[0].require_whole()


@pytest.mark.parametrize("how", ["close", "throw"])
def test_shard_that_was_interrupted_after_the_commit_refuses_everything(how: str) -> None:
    """Its slots have moved, its parameters have not: only a load brings it back."""
    run = ready(ProdigyRule(), num_shards=2)
    receive_all(run)
    steps = [shard.step() for shard in run.group.shards]
    total = sum_vectors([next(step) for step in steps])
    for step in steps:
        step.send(total)
    lost = run.group.shards[0]
    if how == "close":
        steps[0].close()
    else:
        with pytest.raises(ConnectionError):
            steps[0].throw(ConnectionError())
    pushes = run.pushes(0)
    with pytest.raises(NotRegisteredError, match="interrupted within step 4"):
        lost.receive(pushes[0])
    with pytest.raises(NotRegisteredError):
        lost.result(1, 3)
    with pytest.raises(NotRegisteredError):
        lost.require_whole()
    assert lost.sequence == 3

    steps[1].close()
    run.group.load(initial_state(run.problem), timeline=2)
    fresh = Run(run.problem, ProdigyRule(), num_shards=2, world_size=2)
    for either in (run, fresh):
        either.step()
    assert_same_state(run.state(), fresh.state())


def test_load_is_refused_while_a_step_is_being_decided() -> None:
    run = ready(ProdigyRule())
    receive_all(run)
    step = run.group.shards[0].step()
    next(step)
    with pytest.raises(StepAbortedError, match="being decided"):
        run.group.shards[0].load(initial_state(run.problem), timeline=2)
    step.close()


def test_lockstep_leaves_no_step_half_way_when_one_shard_fails() -> None:
    run = ready(ProdigyRule())
    receive_all(run)

    def without_memory() -> Reduction:
        raise MemoryError
        yield

    steps = [*(shard.step() for shard in run.group.shards[:2]), without_memory()]
    with pytest.raises(MemoryError):
        run_in_lockstep(steps)
    assert [shard.status().in_flight for shard in run.group.shards] == [False, False, False]
    assert run.step(attempt=1).decision is Decision.COMMIT


@RULES
def test_reducing_rule_reduces_once_an_elementwise_one_never(rule: Rule) -> None:
    """Beside the vote, which is one small vector."""
    run = ready(rule, num_shards=1, world_size=1)
    receive_all(run)
    vectors = []

    def drive(step: Reduction) -> StepResult:
        vectors.append(next(step))
        try:
            while True:
                vectors.append(step.send(vectors[-1]))
        except StopIteration as stop:
            result: StepResult = stop.value
            return result

    assert drive(run.group.shards[0].step()).decision is Decision.COMMIT
    assert len(vectors) == (1 if isinstance(rule, AdamWRule) else 2)
    assert vectors[0].shape == (5 + 17,), "five numbers of one shard, a partial for each block"


def test_absent_everywhere_is_a_step_that_moves_nothing() -> None:
    run = ready(AdamWRule(), world_size=1)
    before = run.state()
    assert run.step(gradients={}).decision is Decision.COMMIT
    after = run.state()
    assert after.counters == (4, 4, 0)
    assert_same_state(dataclasses.replace(after, counters=before.counters), before)


def test_status_shows_the_shard_in_numbers() -> None:
    run = ready(ProdigyRule(), num_shards=2)
    first, second = (shard.status() for shard in run.group.shards)
    assert (first.shard, second.shard) == (0, 1)
    assert (first.timeline, first.sequence, first.step, first.skipped_steps) == (1, 3, 3, 0)
    assert first.step_counts == (3, 3, 3, 0, 3, 3, 3, 3)
    assert first.scalars == second.scalars
    assert first.size_bytes + second.size_bytes == 17 * 256 * 5 * 4
    assert torch.__version__ in first.kernel_identity


def test_number_of_workers_may_change_between_steps() -> None:
    run = ready(ProdigyRule())
    for shard in run.group.shards:
        shard.set_workers(1, "local")
    run.group.admit(0, "worker-0")
    run.world_size = 1
    assert run.step().decision is Decision.COMMIT
