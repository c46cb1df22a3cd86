"""A shard's part when another set of shards takes its set's place. See *Note: Another set of shards* in docs/design.md.

The coordinator has the shards of the new set inherit what those of the old one hold, each from whoever holds what it is
to own, and then take office. Both kinds of shards are of this class, as each set is new once and old once.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any

from ..sharding.buffers import Buffers
from ..sharding.resharding import TileRun, rows_of, runs_in_common
from ..sharding.saved import SavedCheckpoint
from .calls import gather
from .epochs import change_of_coordinator, of_coordinator
from .estate import Estate
from .messages import pack_job, unpack_job
from .resting_shard import RestingShard
from .wire import WireTensor, from_wire, to_wire
from .workers import workers_of

RUN_TIMEOUT_S = 60.0
"""Limit for one run of tiles on its way."""


class SucceedingShard(RestingShard):
    """A coordinated shard with what a change of the set takes; see :class:`CoordinatedShard` for its arguments."""

    # Of the old set

    @of_coordinator
    async def estate(self) -> tuple[Estate, SavedCheckpoint | None]:
        """What this shard has in common with the others, and the last checkpoint; called on shard 0 alone.

        Raises:
            NotRegisteredError: If there is no whole state.
        """
        shard = self._steps.whole_job()
        workers, left = workers_of(shard)
        job, code, requests = pack_job(shard.spec), self._redundancy.code, self._changes.taken
        return Estate(job, code, shard.status(), shard.replicated(), workers, left, requests), self._saves.saved

    @of_coordinator
    async def kernels(self) -> tuple[bytes, bytes]:
        """The job, packed, and its compiled kernels, for spares; called on shard 0 alone."""
        return pack_job(self._steps.job().spec), self._redundancy.code

    async def rows(self, run: TileRun) -> WireTensor:
        """Some of the owned tiles, flat; called by shards of the new set while the service is held."""
        return to_wire(rows_of(self._steps.whole_job().buffers, run))

    # Of the new set

    @change_of_coordinator
    async def inherit(
        self, estate: Estate, saved: SavedCheckpoint | None, request: str, predecessors: Sequence[Any]
    ) -> None:
        """Become a shard of the same job, in the same state; the old set is held meanwhile.

        Args:
            estate: What its shards have in common.
            saved: The checkpoint that was completed last, if they know of one.
            request: Names what was asked for.
            predecessors: Handles of its shards, by index.
        """
        spec, present = unpack_job(estate.job), self._steps.shard
        if present is None or present.spec != spec:  # it has changed since this shard was told to lay it out
            timeline = estate.status.timeline
            await self._steps.compute(lambda: self._lay_out(spec, estate.code, timeline=timeline))
        shard = self._steps.job()
        await asyncio.gather(
            *(
                self._fetch(shard.buffers, predecessor, index, len(predecessors))
                for index, predecessor in enumerate(predecessors)
            )
        )
        shard.succeed(estate.status, estate.replicated)
        self._admit(estate.workers)
        for rank in estate.left:
            shard.members.leave(rank)
        self._changes.recall((*estate.requests, request))
        self._saves.saved = saved
        await self._copy()

    @change_of_coordinator
    async def take_office(self) -> None:
        """Be of the set that counts, from now on: all of it has inherited."""
        self._is_in_office = True

    async def _fetch(self, buffers: Buffers, predecessor: Any, index: int, num_shards: int) -> None:
        """Take over the tiles that were those of shard ``index`` and are this shard's now, one run after the other."""
        for run in runs_in_common(buffers, index, num_shards):
            what = f"shard {index} to hand {run.slot} over"
            (wire,) = await gather([predecessor.rows.remote(run)], timeout_s=RUN_TIMEOUT_S, what=what)
            rows = rows_of(buffers, run)
            await self._steps.compute(functools.partial(rows.copy_, from_wire(wire).view_as(rows)))
