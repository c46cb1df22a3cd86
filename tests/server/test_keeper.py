"""The keeper: which steps follow on which copy, and memory that outlives its owner."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
import torch

from stepwell.server.keeper import Copy, Keeper, LogEntry, LoggedPush
from stepwell.sharding.errors import SegmentError
from stepwell.sharding.history import History
from stepwell.sharding.owned_state import Replicated
from stepwell.sharding.reports import ShardStatus
from stepwell.sharding.segments import ALIGNMENT, Address, Placement, Span, allocate, open_segment
from stepwell.sharding.world import World

T = TypeVar("T")


def run(call: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(call)


def memory() -> tuple[Any, Address]:
    segment, (part,) = allocate([(4, torch.float32)])
    part.fill_(3.0)
    return part, segment.address


GRADIENT = memory()


def copy_at(sequence: int, address: Address, *, timeline: int = 1) -> Copy:
    status = ShardStatus(0, timeline, sequence, sequence, 0, 16, "eager", {}, (), in_flight=False, world=World((0,)))
    return Copy(b"job", b"", status, Replicated(History(timeline), {}, World((0,))), {}, frozenset(), (), (), address)


def entry(sequence: int, address: Address | None = None, *, timeline: int = 1) -> LogEntry:
    place = Placement(address or GRADIENT[1], (Span(ALIGNMENT, 4, torch.float32),))
    return LogEntry(timeline, sequence, (LoggedPush(b"request", place, {}),), ())


def sequences(keeper: Keeper) -> list[int]:
    found = run(keeper.fetch(0))
    assert found is not None
    return [each.sequence for each in found[1]]


def ready(sequence: int = 4) -> tuple[Keeper, Any]:
    """A keeper with a copy after this step."""
    keeper, (part, address) = Keeper(), memory()
    run(keeper.begin(0, 1, sequence))
    assert run(keeper.keep(0, copy_at(sequence, address)))
    return keeper, part


def test_steps_follow_one_another_and_another_try_replaces_a_step() -> None:
    keeper, _ = ready()
    assert [run(keeper.log(0, entry(sequence))) for sequence in (5, 6, 6, 7)] == [True] * 4
    assert sequences(keeper) == [5, 6, 7]
    assert run(keeper.log(0, entry(6)))
    assert sequences(keeper) == [5, 6]


@pytest.mark.parametrize("other", [entry(4), entry(7), entry(5, timeline=2)])
def test_step_that_does_not_follow_is_refused(other: LogEntry) -> None:
    keeper, _ = ready()
    assert not run(keeper.log(0, other))
    assert sequences(keeper) == []


def test_copy_cuts_the_log_and_one_that_the_log_does_not_reach_is_refused() -> None:
    keeper, part = ready()
    for sequence in (5, 6, 7):
        run(keeper.log(0, entry(sequence)))
    later, address = memory()
    for other in (copy_at(8, address), copy_at(3, address), copy_at(6, address, timeline=2)):
        assert not run(keeper.keep(0, other))
    assert run(keeper.keep(0, copy_at(6, address)))
    assert sequences(keeper) == [7]
    assert torch.equal(part, later)


def test_keeper_that_was_started_again_knows_nothing() -> None:
    keeper, (_, address) = Keeper(), memory()
    assert run(keeper.fetch(0)) is None
    assert not run(keeper.log(0, entry(5)))
    assert not run(keeper.keep(0, copy_at(4, address)))


def test_a_log_that_begins_anew_has_no_copy_before_the_next() -> None:
    keeper, _ = ready()
    run(keeper.begin(0, 2, 0))
    assert run(keeper.fetch(0)) is None
    assert run(keeper.log(0, entry(1, timeline=2)))
    part, address = memory()
    assert run(keeper.keep(0, copy_at(0, address, timeline=2)))
    assert sequences(keeper) == [1]
    assert part[0] == 3.0


def test_memory_outlives_its_owner_and_goes_when_nothing_lies_in_it() -> None:
    keeper, part = ready()
    gradient, address = memory()
    run(keeper.log(0, entry(5, address)))
    del part, gradient
    found = run(keeper.fetch(0))
    assert found is not None
    copy, (logged,) = found
    held = logged.pushes[0].gradient.address
    for each in (copy.memory, held):
        assert torch.equal(open_segment(each).tensor(Span(ALIGNMENT, 4, torch.float32)), torch.full((4,), 3.0))
    next_part, next_address = memory()
    assert run(keeper.keep(0, copy_at(5, next_address)))
    assert keeper._held.keys() == {next_address.token}
    del next_part


def test_memory_that_cannot_be_reached_changes_nothing() -> None:
    keeper, _ = ready()
    nowhere = Address(os.getpid(), 999_999, 4112, b"x" * 16)
    assert run(keeper.log(0, entry(5)))
    with pytest.raises(SegmentError):
        run(keeper.log(0, entry(6, nowhere)))
    with pytest.raises(SegmentError):
        run(keeper.keep(0, copy_at(5, nowhere)))
    assert sequences(keeper) == [5]


def test_memory_of_a_try_goes_when_another_one_replaces_it() -> None:
    keeper, _ = ready()
    tries = [memory() for _ in range(3)]
    for _, address in tries:
        run(keeper.log(0, entry(5, address)))
    assert [address.token in keeper._held for _, address in tries] == [False, False, True]
    assert not run(keeper.log(0, entry(9, tries[0][1])))
    assert tries[0][1].token not in keeper._held


def test_forgotten_shard_has_no_copy() -> None:
    keeper, _ = ready()
    run(keeper.forget(0))
    assert run(keeper.fetch(0)) is None
    assert not keeper._held
