"""What a shard has in common with the others of its set, between two steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..sharding.owned_state import Replicated
from ..sharding.reports import ShardStatus
from .workers import Worker


@dataclasses.dataclass(frozen=True, slots=True)
class Estate:
    """All that makes another shard of the same job, but for the slots.

    Attributes:
        job: The job, packed.
        code: The job's compiled kernels.
        status, replicated: Where the shard stands.
        workers: Whom it has admitted, by rank.
        left: Which of them have said goodbye.
        requests: The changes that it has taken.
    """

    job: bytes
    code: bytes
    status: ShardStatus
    replicated: Replicated
    workers: Mapping[int, Worker]
    left: frozenset[int]
    requests: tuple[str, ...]
