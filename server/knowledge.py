"""Where a service stands: what each shard tells a coordinator that takes over, and what follows from it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..sharding.job import JobSpec
from ..sharding.reports import ShardStatus
from ..sharding.saved import SavedCheckpoint
from ..sharding.world import World
from .changes import NUM_REMEMBERED
from .collective import NO_GENERATION, Generation
from .config import ServiceConfig
from .keeper import Holding
from .recoveries import Recoveries
from .shard_saves import SaveUnderWay
from .workers import Worker


@dataclasses.dataclass(frozen=True, slots=True)
class ShardReport:
    """What one shard tells.

    Attributes:
        job: Its job; None if it has none.
        status: Where it stands; None without a job.
        workers: The workers that it has admitted, by rank.
        left: Which of them have said goodbye.
        generation: Of the group that it can use.
        prepared: The timeline of the change that it has prepared, if it has.
        requests: The changes that it has taken, the last ones at least.
        saves: The saves that it has a part in, by their names.
        saved: The checkpoint that was completed last, if this shard knows.
        was_restarted: Whether another process was this shard before.
        is_in_office: Whether its set has taken another one's place, and this process was told so.
    """

    job: JobSpec | None
    status: ShardStatus | None
    workers: Mapping[int, Worker]
    left: frozenset[int]
    generation: Generation
    prepared: int | None
    requests: tuple[str, ...]
    saves: Mapping[str, SaveUnderWay]
    saved: SavedCheckpoint | None
    was_restarted: bool
    is_in_office: bool = False

    @property
    def timeline(self) -> int:
        """The one that it is on; 0 before it has a state."""
        return 0 if self.status is None else self.status.timeline

    @property
    def step(self) -> tuple[int, int]:
        """Timeline and sequence number; zeros without a job."""
        return (0, 0) if self.status is None else (self.status.timeline, self.status.sequence)

    @property
    def world(self) -> World | None:
        """The ranks that its next step waits for; None without a job."""
        return None if self.status is None else self.status.world


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceStatus:
    """Where a service stands, as its coordinator tells.

    Attributes:
        config: Its settings.
        spec: The job; None without one.
        generation: Of the shards' group.
        epoch: Of the coordinator.
        shards: Every shard's status; None of one without a job.
        holdings: What each keeper that answers has, by keeper and shard.
        recoveries: Of shards, by this coordinator.
        num_spares_ready: How many spares could be a shard at once.
    """

    config: ServiceConfig
    spec: JobSpec | None
    generation: Generation
    epoch: int
    shards: Sequence[ShardStatus | None]
    holdings: Mapping[int, Mapping[int, Holding]]
    recoveries: Recoveries
    num_spares_ready: int

    def redundancy(self) -> list[dict[str, dict[str, Any]]]:
        """For each shard what its keepers hold, by the keepers' numbers, as plain values."""
        return [
            {str(keeper): dataclasses.asdict(held[shard]) for keeper, held in self.holdings.items() if shard in held}
            for shard in range(self.config.num_shards)
        ]


@dataclasses.dataclass(slots=True)
class Knowledge:
    """What a coordinator knows of its service. The shards know all of it too.

    Attributes:
        spec: The job; None before the first one was registered.
        workers: The registered workers, by rank.
        left: Ranks whose worker has said goodbye.
        timeline: The last one that was begun, or tried.
        is_loaded: Whether the job has had parameters.
        is_lost: Whether no shard knows of a job, though there may have been one.
        requests: The last changes that were made, by what was asked for.
    """

    spec: JobSpec | None = None
    workers: dict[int, Worker] = dataclasses.field(default_factory=dict)
    left: set[int] = dataclasses.field(default_factory=set)
    timeline: int = 0
    is_loaded: bool = False
    is_lost: bool = False
    requests: collections.deque[str] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=NUM_REMEMBERED)
    )

    @classmethod
    def of(cls, reports: Sequence[ShardReport], *, is_first: bool = False) -> Knowledge:
        """What follows from the reports of all shards.

        A job that is not on all of them counts if it has had parameters: then a shard was restarted. Else it was being
        laid out, and whoever asked for that asks again.

        Args:
            reports: Of all shards.
            is_first: Whether the service is just being launched, so that nothing can be lost.
        """
        first = authority(reports)
        if first is None or (first.timeline == 0 and any(report.job is None for report in reports)):
            return cls(is_lost=not is_first and first is None and any(report.was_restarted for report in reports))
        return cls(
            spec=first.job,
            workers=dict(first.workers),
            left=set(first.left),
            timeline=first.timeline,
            is_loaded=first.timeline > 0,
            requests=collections.deque(first.requests, maxlen=NUM_REMEMBERED),
        )


def authority(reports: Sequence[ShardReport]) -> ShardReport | None:
    """The report that counts where they differ, if any shard has a job.

    The first shard is told first of what is not prepared, such as a registration; a shard that was restarted knows
    nothing, and one that lacks the last change is behind.
    """
    return max((report for report in reports if report.job is not None), key=lambda of: of.timeline, default=None)


def behind(reports: Sequence[ShardReport]) -> tuple[int, list[int]]:
    """The newest timeline, and the shards that have prepared it and not taken it, though others have."""
    newest = max(report.timeline for report in reports)
    return newest, [index for index, report in enumerate(reports) if report.prepared == newest]


def common_generation(reports: Sequence[ShardReport]) -> Generation:
    """The generation of the group that all shards can use; :data:`NO_GENERATION` if there is none."""
    generations = {report.generation for report in reports}
    return generations.pop() if len(generations) == 1 else NO_GENERATION
