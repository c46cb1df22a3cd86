"""Workers that are gone without a goodbye are dismissed, without Ray: others take their place, in any number."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stepwell.sharding.errors import (
    CheckpointRestoreNeededError,
    IncarnationError,
    JobMismatchError,
    NotRegisteredError,
    UnknownRankError,
)
from tests.server.test_elastic import Job, gradient, run_test


async def begin_again(job: Job, world_size: int) -> None:
    """Other workers register, and take a step with just their gradients."""
    before = await job.value()
    for rank in range(world_size):
        told = await job.register(rank, world_size, process="b")
        assert (told.ranks, told.needs_parameters) == (tuple(range(world_size)), False)
    for reply in [job.push(rank, process="b") for rank in range(world_size)]:
        assert (await reply).ranks == tuple(range(world_size))
    await job.require_stepped(before, range(world_size))


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_others_take_the_place_of_workers_that_are_dismissed(world_size: int, elastic: bool) -> None:
    @run_test(elastic=elastic)
    async def test(job: Job) -> None:
        await job.begin(2)
        await job.step((0, 1))
        (waiting,) = await job.waiting(0)
        await job.coordinator.dismiss()
        with pytest.raises(IncarnationError, match="rank 0: the job's workers were dismissed; end this process"):
            await waiting
        with pytest.raises(IncarnationError, match="rank 0: process 0-a has left, or was dismissed; end it"):
            await job.push(0)
        await begin_again(job, world_size)
        with pytest.raises((IncarnationError, UnknownRankError)):
            await job.push(1)
        await job.coordinator.leave(0, "0-a")
        assert await job.ranks() == tuple(range(world_size)), "what a dismissed worker says does not count"

    test()


@run_test()
async def test_step_that_all_had_pushed_for_is_taken(job: Job) -> None:
    await job.begin(2)
    replies = [job.push(rank) for rank in range(2)]
    while not job.actor._steps.is_stepping:
        await asyncio.sleep(0)
    await job.coordinator.dismiss()
    for reply in replies:
        assert (await reply).ranks == (0, 1)
    await job.require_stepped(0.0, [0, 1])
    await begin_again(job, 3)


@run_test(elastic=False)
async def test_workers_of_another_number_are_refused_until_the_ones_before_are_dismissed(job: Job) -> None:
    await job.begin(2)
    await job.coordinator.leave(0, "0-a")
    with pytest.raises(JobMismatchError, match=r"has 2, rank 0 has 3.*have not: 1\..*call service.dismiss_workers\(\)"):
        await job.register(0, 3, process="b")
    await job.coordinator.dismiss()
    await begin_again(job, 3)


@run_test()
async def test_service_without_a_job_has_nobody_to_dismiss(job: Job) -> None:
    with pytest.raises(NotRegisteredError, match="has no job yet"):
        await job.coordinator.dismiss()


@run_test(elastic=False)
async def test_workers_that_had_no_time_to_load_are_dismissed(job: Job) -> None:
    await job.register(0, 2)
    await job.coordinator.dismiss()
    assert (await job.register(0, 1, process="b")).needs_parameters


def test_service_that_has_lost_its_state_says_so_and_takes_others_after_a_restore(tmp_path: Path) -> None:
    @run_test(elastic=False)
    async def test(job: Job) -> None:
        await job.begin(2)
        await job.step((0, 1))
        await job.coordinator.begin_save("save", str(tmp_path))
        await job.coordinator.end_save("save", str(tmp_path))
        saved = await job.value()
        job.actor._steps.shard = None
        with pytest.raises(CheckpointRestoreNeededError, match="shard 0 holds no job"):
            await job.coordinator.dismiss()
        assert (await job.coordinator.restore(str(tmp_path), "restore")).step == 1
        await job.coordinator.dismiss()
        assert await job.value() == saved == -gradient(0) * 0.75
        await begin_again(job, 1)

    test()
