"""What a coordinator does before it serves anybody: it brings to an end what another one began."""

from __future__ import annotations

from collections.abc import Sequence

from ..sharding.job import JobSpec
from .knowledge import ShardReport, authority, behind
from .shards import Shards


async def finish_changes(shards: Shards, reports: Sequence[ShardReport]) -> list[ShardReport]:
    """Have all shards take what any of them has taken of a change that another coordinator began.

    See *Note: Epochs* in docs/design.md.

    Args:
        shards: The shards, which may be held still.
        reports: What each of them told when the present epoch began.

    Returns:
        What each of them would tell now.
    """
    newest, lagging = behind(reports)
    if lagging:
        await shards.some(lagging, "adopt", newest, what="the shards to take what others have taken")
        reports = await shards.all("report", what="the shards to tell what they know")
    first = authority(reports)
    if first is not None and first.job is not None:
        await _align_workers(shards, reports, first, first.job)
    return list(reports)


async def _align_workers(shards: Shards, reports: Sequence[ShardReport], first: ShardReport, job: JobSpec) -> None:
    """Tell the shards which workers there are, where they know others than the one whose report counts."""
    kind = job.world_size, job.gradients
    for index, report in enumerate(reports):
        if report.job is None:
            continue
        is_of_others = (report.job.world_size, report.job.gradients) != kind
        if is_of_others:
            await shards.some([index], "set_workers", *kind, what="a shard to take the workers")
        # A step that is not yet taken here may bring the world that the first one has.
        world = first.world if report.step == first.step else report.world
        if is_of_others or (report.workers, report.world) != (first.workers, world):
            await shards.some([index], "admit", first.workers, world, what="a shard to admit the workers")
        if missed := sorted(first.left - report.left):
            await shards.some([index], "leave", missed, what="a shard to note that workers left")
