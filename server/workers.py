"""What the coordinator knows of a job's workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..sharding.coverage import Holdings
from ..sharding.errors import MessageError
from ..sharding.job import JobSpec
from ..sharding.shard import Shard
from .messages import pack_holdings, unpack_holdings


@dataclasses.dataclass(frozen=True, slots=True)
class Worker:
    """A registered worker: its process, and what it holds of a sharded model, packed."""

    incarnation: str
    holdings: bytes

    def held(self, spec: JobSpec) -> Holdings:
        """What it holds, unpacked.

        Raises:
            MessageError: If it named nothing.
        """
        holdings = unpack_holdings(self.holdings, spec.params)
        if holdings is None:
            raise MessageError("holdings: expected ranges from every rank of a sharded model, got none")
        return holdings


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """A worker that registers: its job, packed, its rank and its process."""

    job: bytes
    rank: int
    worker: Worker


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What one rank brings to add a parameter group; see :meth:`Coordinator.extend`."""

    spec: JobSpec
    holdings: bytes
    values: Sequence[Any]


def workers_of(shard: Shard) -> tuple[Mapping[int, Worker], frozenset[int]]:
    """Whom a shard has admitted, by rank, and which of them have said goodbye."""
    members = shard.members.by_rank
    workers = {rank: Worker(each.incarnation, pack_holdings(each.holdings)) for rank, each in members.items()}
    return workers, frozenset(rank for rank, each in members.items() if each.has_left)
