"""Exactly once: whatever reaches the shards how often, in what order and how late, each step is taken once.

And with one push of each rank, the same on all shards. Every push here has a gradient of its own, so that a step tells
by its bits what it was taken with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepwell.optim import AdamWRule
from stepwell.sharding.errors import (
    AttemptError,
    FutureRequestError,
    IncarnationError,
    RequestError,
    StaleRequestError,
    StepAbortedError,
    TimelineError,
    UnknownRankError,
)
from stepwell.sharding.reports import Receipt
from tests.zoo import Run, assert_same_state, small

NUM_SHARDS, WORLD_SIZE = 2, 2
BOTH = (0, 1)
KEPT, COMPLETE, DECIDED = Receipt.WAITING, Receipt.COMPLETE, Receipt.DECIDED


@dataclasses.dataclass(frozen=True)
class Sent:
    """A push that reaches some shards, and what each of them says.

    Attributes:
        rank, attempt, process: Whose it is; process 0 is the first one of its rank.
        told: What the shards say, one after the other: a receipt, or an error.
        shards: Which shards it reaches.
        step: How many steps after the next one it is of.
        timeline: How many timelines after the present one.
    """

    rank: int
    told: Receipt | type[RequestError]
    attempt: int = 0
    process: int = 0
    shards: Sequence[int] = BOTH
    step: int = 0
    timeline: int = 0


@dataclasses.dataclass(frozen=True)
class Admitted:
    """Another process registers as a rank."""

    rank: int


@dataclasses.dataclass(frozen=True)
class Voted:
    """The shards begin the step with what they have. What it is taken with: of each rank attempt and process."""

    taken: tuple[tuple[int, int], tuple[int, int]] | None


Event = Sent | Admitted | Voted
FIRST = (0, 0), (0, 0)

CASES: dict[str, list[Event]] = {
    "once": [Sent(0, KEPT), Sent(1, COMPLETE), Voted(FIRST)],
    "repeated before, while complete and after": [
        Sent(0, KEPT), Sent(0, KEPT), Sent(1, COMPLETE), Sent(0, COMPLETE), Voted(FIRST),
        Sent(0, DECIDED, step=-1), Sent(1, DECIDED, step=-1), Sent(0, KEPT), Sent(1, COMPLETE), Voted(FIRST),
    ],
    "shards hear of ranks in different orders": [
        Sent(0, KEPT, shards=[0]), Sent(1, KEPT, shards=[1]), Sent(1, COMPLETE, shards=[0]),
        Sent(0, COMPLETE, shards=[1]), Voted(FIRST),
    ],
    "two attempts of a rank, one on each shard": [
        Sent(0, KEPT, shards=[0]), Sent(0, KEPT, attempt=1, shards=[1]), Sent(1, COMPLETE), Voted(None),
        Sent(0, KEPT, attempt=2), Sent(1, COMPLETE, attempt=1), Voted(((2, 0), (1, 0))),
    ],
    "attempts that overtake each other": [
        Sent(0, KEPT, attempt=1, shards=[0]), Sent(0, AttemptError, shards=[0]), Sent(0, KEPT, shards=[1]),
        Sent(0, KEPT, attempt=1, shards=[1]), Sent(1, COMPLETE), Voted(((1, 0), (0, 0))),
        Sent(0, AttemptError, step=-1), Sent(0, DECIDED, attempt=1, step=-1),
    ],
    "a new attempt at a step that was taken": [
        Sent(0, KEPT), Sent(1, COMPLETE), Voted(FIRST), Sent(0, AttemptError, attempt=1, step=-1),
    ],
    "the next step's push comes before this one's": [
        Sent(0, KEPT), Sent(0, FutureRequestError, step=1), Sent(1, COMPLETE), Voted(FIRST),
        Sent(0, KEPT), Sent(1, COMPLETE), Voted(FIRST),
    ],
    "a push comes two steps late": [
        Sent(0, KEPT), Sent(1, COMPLETE), Voted(FIRST), Sent(0, KEPT), Sent(1, COMPLETE), Voted(FIRST),
        Sent(0, StaleRequestError, step=-2), Sent(1, StaleRequestError, attempt=7, step=-2),
    ],
    "a rank that died on its way to the second shard": [
        Sent(0, KEPT), Sent(1, COMPLETE, shards=[0]), Voted(None), Sent(0, KEPT, attempt=1),
        Sent(1, COMPLETE, attempt=1), Voted(((1, 0), (1, 0))),
    ],
    "a successor's push beside its predecessor's": [
        Sent(1, KEPT), Admitted(1), Sent(1, IncarnationError, attempt=1), Sent(0, KEPT),
        Sent(1, COMPLETE, process=1), Voted(((0, 0), (0, 1))),
        Sent(1, IncarnationError, step=-1), Sent(1, DECIDED, process=1, step=-1), Sent(1, IncarnationError),
    ],
    "a successor that comes after the step its predecessor has pushed for": [
        Sent(0, KEPT), Sent(1, COMPLETE), Voted(FIRST), Admitted(1), Sent(1, AttemptError, process=1, step=-1),
        Sent(1, IncarnationError, step=-1), Sent(1, KEPT, process=1), Sent(0, COMPLETE), Voted(((0, 0), (0, 1))),
    ],
    "other timelines and ranks": [
        Sent(0, TimelineError, timeline=1), Sent(0, TimelineError, timeline=-1), Sent(2, UnknownRankError),
        Sent(0, KEPT), Sent(1, COMPLETE), Voted(FIRST), Sent(1, TimelineError, timeline=-1, step=-1),
    ],
}  # fmt: skip


class Job:
    """The shards of a job, and its oracle: one shard that is told only what a step was taken with."""

    def __init__(self) -> None:
        rule = AdamWRule()
        self.run = Run(small(), rule, num_shards=NUM_SHARDS, world_size=WORLD_SIZE, kernel="eager")
        self.oracle = Run(small(), rule, world_size=WORLD_SIZE, kernel="eager")
        self.num_processes = [1] * WORLD_SIZE
        for job in (self.run, self.oracle):
            for rank in range(WORLD_SIZE):
                job.group.admit(rank, process_name(rank, 0))

    def gradients(self, rank: int, attempt: int, process: int) -> dict[int, Tensor]:
        factor = 1.0 + attempt + 10.0 * process
        return {
            index: grad * factor for index, grad in self.oracle.gradients(self.oracle.next_sequence - 1, rank).items()
        }

    def send(self, sent: Sent) -> list[Receipt | type[Exception]]:
        """What each shard says; whatever it is, nothing but its inbox changes."""
        before = self.run.state()
        shard = self.run.group.shards[0]
        pushes = self.run.pushes(
            sent.rank,
            gradients=self.gradients(sent.rank, sent.attempt, sent.process),
            sequence=shard.sequence + 1 + sent.step,
            timeline=shard.timeline + sent.timeline,
            attempt=sent.attempt,
            incarnation=process_name(sent.rank, sent.process),
        )
        told: list[Receipt | type[Exception]] = []
        for index in sent.shards:
            try:
                told.append(self.run.group.shards[index].receive(pushes[index]))
            except RequestError as error:
                told.append(type(error))
        assert_same_state(self.run.state(), before)
        return told

    def admit(self, rank: int) -> None:
        self.run.group.admit(rank, process_name(rank, self.num_processes[rank]))
        self.num_processes[rank] += 1

    def vote(self) -> tuple[tuple[int, int], ...] | None:
        """Begin the step with what there is; what it was taken with. The oracle takes it, if it is, with the same."""
        before = self.run.state()
        try:
            result = self.run.group.run_step()
        except StepAbortedError:
            assert_same_state(self.run.state(), before)
            for shard in self.run.group.shards:
                assert shard.result(shard.timeline, shard.sequence + 1) is None, (
                    "who asks is told that it was not taken"
                )
            return None
        taken = []
        for shard in self.run.group.shards:
            assert shard.result(shard.timeline, shard.sequence) == result, "who asks is told that it was taken"
            headers = [shard.history.taken_with(rank) for rank in range(WORLD_SIZE)]
            taken.append(tuple((each.attempt, process_of(each.incarnation)) for each in headers if each is not None))
        assert taken == [taken[0]] * NUM_SHARDS
        for rank, (attempt, process) in enumerate(taken[0]):
            self.oracle.group.admit(rank, process_name(rank, process))
            gradients = self.gradients(rank, attempt, process)
            name = process_name(rank, process)
            self.oracle.group.push(self.oracle.pushes(rank, gradients=gradients, attempt=attempt, incarnation=name))
        assert_same_state(self.run.state(), self.oracle.state())
        return taken[0]


def process_name(rank: int, process: int) -> str:
    return f"process-{rank}-{process}"


def process_of(incarnation: str) -> int:
    return int(incarnation.rpartition("-")[2])


@pytest.mark.parametrize("name", CASES)
def test_step_is_taken_once_and_with_one_push_of_each_rank(name: str) -> None:
    job = Job()
    for number, event in enumerate(CASES[name]):
        if isinstance(event, Sent):
            assert job.send(event) == [event.told] * len(event.shards), f"event {number}: {event}"
        elif isinstance(event, Admitted):
            job.admit(event.rank)
        else:
            assert job.vote() == event.taken, f"event {number}: {event}"


SENT = st.builds(
    Sent,
    rank=st.integers(0, WORLD_SIZE - 1),
    told=st.just(KEPT),
    attempt=st.integers(0, 2),
    process=st.sampled_from([0, 0, 0, 1]),
    shards=st.sampled_from([BOTH, (0,), (1,)]),
    step=st.sampled_from([0, 0, 0, 0, -1, 1]),
)
EVENTS = st.lists(st.one_of(SENT, SENT, SENT, st.builds(Admitted, st.just(1)), st.just(Voted(None))), max_size=24)


@settings(max_examples=60, deadline=None)
@given(events=EVENTS)
def test_step_is_never_made_of_two_attempts_whatever_comes(events: list[Event]) -> None:
    job = Job()
    for event in events:
        if isinstance(event, Sent):
            job.send(event)
        elif isinstance(event, Admitted):
            if job.num_processes[event.rank] < 2:
                job.admit(event.rank)
        else:
            job.vote()
    # And none of it stands in the way of the next step.
    for rank in range(WORLD_SIZE):
        job.send(Sent(rank, KEPT, attempt=9, process=job.num_processes[rank] - 1))
    assert job.vote() == tuple((9, number - 1) for number in job.num_processes)
